"""Run all benchmarks and put their tables and one JSON into a folder.

    python benchmarks/run_all.py --quick
    python benchmarks/run_all.py --folder results

``--quick`` takes minutes and says that everything runs and roughly where the numbers are; without it, let the machine do nothing
else.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
SCRIPTS = (
    "loader",
    "step_time",
    "data_wait",
    "memory",
    "startup",
    "ema_infonce",
    "preprocessing",
    "options",
    "growth",
    "peers",
)


def main() -> int:
    """Run them one after another; a failure is told and the others go on."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small inputs")
    parser.add_argument("--folder", type=Path, help="where results.json goes")
    parser.add_argument("--only", nargs="+", choices=SCRIPTS, default=SCRIPTS, metavar="NAME", help=", ".join(SCRIPTS))
    args = parser.parse_args()
    results, failed = [], []
    folder = args.folder or Path.cwd()
    folder.mkdir(parents=True, exist_ok=True)
    for name in args.only:
        out = folder / f"{name}.json"
        begin = time.perf_counter()
        command = [sys.executable, "-W", "ignore", str(HERE / f"{name}.py"), "--out", str(out)]
        status = subprocess.run([*command, *(["--quick"] if args.quick else [])], cwd=HERE).returncode
        sys.stdout.write(f"\n({name}: {time.perf_counter() - begin:.0f} s)\n")
        sys.stdout.flush()
        if status:
            failed.append(name)
        elif args.folder:
            results.append(json.loads(out.read_text()))
        if not args.folder:
            out.unlink(missing_ok=True)
    if args.folder:
        (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    if failed:
        sys.stderr.write(f"Failed: {', '.join(failed)}\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
