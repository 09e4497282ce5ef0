"""Seconds until a run knows its cases, for 100, 1,000 and 20,000 of them.

    python benchmarks/startup.py

Three starts: of nnU-Net's own preprocessed folder; of a source that was preprocessed here, looking at every raw and preprocessed
file; and the same from the manifest that the start before has written (docs/scale.md). Cases are hard links to one tiny case, so
that nothing is read but folders, index and manifest; a local disk. A network file system adds its own time
for each file that is looked at: ``files_looked_at`` counts these (calls of stat).
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from common import arguments, make_dataset, report, workspace


def pretend(plan: Any, source: str, n: int) -> None:
    """Make a preprocessed source of links, with the index that preprocessing would have written."""
    from nnssl.plans.unlabelled import prepared_folder
    from nnssl.pretrain.data.folders import beside
    from nnssl.pretrain.prepare import prepare_sources
    from nnssl.pretrain.prepare.index import Entry

    raw = Path(os.environ["nnUNet_raw"]) / source / "imagesTr"
    prepare_sources(plan, [source], n_processes=1, held_out=0.0)
    folder = prepared_folder(plan, source)
    index = beside(folder, "index.jsonl")
    first = Entry.from_json(json.loads(index.read_text().splitlines()[0]))
    files = sorted(folder.iterdir())
    lines = []
    for i in range(1, n):
        name = f"case_{i:06d}"
        os.link(raw / "case_000000_0000.nii.gz", raw / f"{name}_0000.nii.gz")
        for file in files:
            os.link(file, folder / file.name.replace("case_000000", name))
        info = (raw / f"{name}_0000.nii.gz").stat()
        stamp = (f"{name}_0000.nii.gz", info.st_size, info.st_mtime_ns)
        lines.append(json.dumps(Entry(name, (stamp,), first.shape, first.spacing, f"{i:064x}").to_json()))
    with open(index, "a") as file:
        file.write("".join(f"{line}\n" for line in lines))
    beside(folder, "manifest.json").unlink(missing_ok=True)


def timed(plan: Any, source: str, **options: Any) -> tuple[float, float, int, int]:
    """Wall-clock and CPU seconds, cases, and files that were looked at one by one."""
    from nnssl.pretrain.prepare import prepare_sources, preprocess, raw, sources

    looked = 0
    originals = {
        (m, n): getattr(m, n) for m, n in ((sources, "done_cases"), (preprocess, "done_cases"), (raw, "_scan"))
    }

    def counted(original: Any) -> Any:
        def call(*args: Any) -> Any:
            nonlocal looked
            found = original(*args)
            looked += len(found)
            return found

        return call

    for (module, name), original in originals.items():
        setattr(module, name, counted(original))
    begin, cpu = time.perf_counter(), time.process_time()
    try:
        pool = prepare_sources(plan, [source], n_processes=1, **options)
    finally:
        seconds, cpu = time.perf_counter() - begin, time.process_time() - cpu
        for (module, name), original in originals.items():
            setattr(module, name, original)
    return seconds, cpu, len(pool.cases), looked


def main() -> None:
    """Print the table."""
    args = arguments(__doc__, most=(20_000, "largest number of cases"))
    from nnssl.pretrain.prepare import manifest

    manifest.RACY_SECONDS = -1.0  # the links were made a moment ago
    numbers = [n for n in (100, 1000, 20_000, 160_000) if n <= args.most]
    rows = []
    for n in [20, 200] if args.quick else numbers:
        tiny: dict[str, Any] = {"shape": (12, 16, 12), "patch": (8, 8, 8), "features": (4, 8)}
        with workspace():
            plan = make_dataset(n, **tiny)
            make_dataset(1, id=902, preprocessed=False, **tiny)
            pretend(plan, "Dataset902_Phantom", n)
            starts = {
                "nnU-Net's folder": ("Dataset901_Phantom", {}),
                "own folder, every file": ("Dataset902_Phantom", {}),
                "own folder, manifest": ("Dataset902_Phantom", {}),
            }
            for what, (source, options) in starts.items():
                seconds, cpu, cases, looked = timed(plan, source, **options)
                row = {"cases": cases, "start": what, "wall_s": seconds, "cpu_s": cpu, "files_looked_at": looked}
                rows.append(row)
    report("start-up", rows, args.out)


if __name__ == "__main__":
    main()
