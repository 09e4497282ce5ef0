"""Change the code and see whether the tests notice: ``make mutants PATHS="nnssl/losses nnssl/heads"``.

Every mutation (see mutations.py) is written into a copy of the checkout, and the tests that run the changed function are run
until one fails, the quickest first. Which those are is measured once with coverage and kept in ``.mutants/``, by test file:
only files that changed are measured again. What survives is printed, with the share that was caught; ``equivalent.txt`` names
mutations that change nothing that a user could see, with the reason.

Slow tests are not run. A process forked for each mutation has torch loaded already, so that one takes seconds.
"""

from __future__ import annotations

import argparse
import compileall
import contextlib
import fnmatch
import gc
import hashlib
import io
import json
import os
import py_compile
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

for _name in ("OMP_NUM_THREADS", "nnUNet_def_n_proc"):
    os.environ[_name] = "1"
os.environ.update(nnUNet_n_proc_DA="0", nnUNet_compile="f", MPLBACKEND="Agg", PYTEST_DISABLE_PLUGIN_AUTOLOAD="1")

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CAUGHT, SURVIVED, UNTESTED = "caught", "survived", "untested"


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="+", help="files or folders of the package")
    parser.add_argument("--sample", type=int, default=0, help="so many mutations of each path, at random; 0: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=60.0, help="of tests for each mutation")
    parser.add_argument("--stop-after", type=float, default=float("inf"), help="minutes; what was not run is told")
    parser.add_argument("--tests", nargs="*", default=["tests"], help="test files or folders that may guard them")
    parser.add_argument("--match", default="*", help="only mutations whose 'file:function: change' matches (fnmatch)")
    parser.add_argument("--out", type=Path, help="write each result as a JSON line")
    parser.add_argument("--list", action="store_true", help="print the mutations, run nothing")
    args = parser.parse_args()
    sys.path.insert(0, str(HERE))
    chosen = choose(args)
    if args.list:
        print(*(f"{file}:{m.line} {m.label}" for file, m in chosen), sep="\n")
        return 0
    preload()
    with tempfile.TemporaryDirectory(prefix="nnssl-mutants-") as scratch:
        copies = [make_copy(Path(scratch) / str(k)) for k in range(args.jobs)]
        known = measure(copies[0], args.tests)
        deadline = time.monotonic() + 60 * args.stop_after
        results = spread(copies, chosen, known, args.seconds, deadline)
    return report(chosen, results, args.out)


# ---- what to change --------------------------------------------------------------------------------------------------


def choose(args: argparse.Namespace) -> list[tuple[str, object]]:
    """``(file relative to the checkout, Mutation)`` of all paths, without those known to be equivalent."""
    from mutations import mutations

    alike, met, seen = equivalent(), set(), set()
    chosen = []
    for path in args.paths:
        files = sorted((ROOT / path).rglob("*.py")) if (ROOT / path).is_dir() else [ROOT / path]
        found = []
        for file in (f for f in files if "extension" not in f.parts):
            name, text = str(file.relative_to(ROOT)), file.read_text()
            seen.add(name)
            for m in mutations(text):
                labels = {f"{name}:{m.label}", f"{name}:{m.label} @ {text.splitlines()[m.line - 1].strip()}"}
                met |= alike & labels
                if not alike & labels and fnmatch.fnmatch(f"{name}:{m.label}", args.match):
                    found.append((name, m))
        if args.sample and len(found) > args.sample:
            found = sorted(random.Random(args.seed).sample(found, args.sample), key=lambda x: (x[0], x[1].line))
        chosen += found
    for line in sorted(a for a in alike - met if a.partition(":")[0] in seen):
        print(f"equivalent.txt names what is no mutation: {line}", file=sys.stderr)
    return chosen


def equivalent() -> set[str]:
    """``file:function: before -> after`` of the mutations that change nothing; the reasons stand behind ``  #``.

    ``... @ line of the source`` names one of several that read alike in a function.
    """
    file = HERE / "equivalent.txt"
    lines = file.read_text().splitlines() if file.exists() else []
    return {line.split("  #")[0].strip() for line in lines if line.strip() and not line.startswith("#")}


def make_copy(folder: Path) -> Path:
    """The checkout's files (committed or not, without what git ignores) with its links, in a folder of its own."""
    names = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    ).stdout.decode()
    for name in filter(None, names.split("\0")):
        source, target = ROOT / name, folder / name
        if not source.exists() and not source.is_symlink():
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_symlink():
            target.symlink_to(os.readlink(source))
        else:
            shutil.copy2(source, target)
    for part in ("nnssl", "pretrain", "trainers"):  # by content: a changed file never runs as it was before
        mode = py_compile.PycInvalidationMode.CHECKED_HASH
        compileall.compile_dir(folder / part, quiet=1, invalidation_mode=mode)
    return folder.resolve()


# ---- processes -------------------------------------------------------------------------------------------------------


def preload() -> None:
    """Import what takes seconds, and nothing of the package."""
    import matplotlib.pyplot
    import nnunetv2.training.nnUNetTrainer.nnUNetTrainer
    import pandas
    import pytest
    import scipy.ndimage
    import scipy.stats
    import SimpleITK
    import torch

    torch.set_num_threads(1)
    loaded = [m for m in sys.modules if m == "nnssl" or m.startswith("nnssl.")]
    assert not loaded, loaded
    del matplotlib, nnunetv2, pandas, pytest, scipy, SimpleITK
    gc.collect()
    gc.freeze()  # pytest collects garbage several times; in each process that would copy and walk through all of the above


def forked(work: Callable[[], int], copy: Path, seconds: float) -> int | None:
    """The exit status of ``work`` in a process of its own in a copy of the checkout; None where it took too long."""
    pid = os.fork()
    if pid == 0:
        status = 99
        try:
            os.setsid()
            os.chdir(copy)
            os.environ["PYTHONPATH"] = str(copy)
            sys.path[:] = [str(copy), *(p for p in sys.path if p not in ("", str(ROOT), str(HERE)))]
            sys.path_importer_cache.clear()
            with open(copy / "output.txt", "w") as f, contextlib.redirect_stdout(f), contextlib.redirect_stderr(f):
                os.dup2(f.fileno(), 1)
                os.dup2(f.fileno(), 2)
                status = int(work())
        finally:
            os._exit(status)
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None


# ---- which tests run which functions ---------------------------------------------------------------------------------


class Recorder:
    """A pytest plugin: which lines each test ran, how long it took and whether it passed."""

    def __init__(self, cov: object) -> None:
        self.cov, self.seconds, self.failed = cov, Counter(), set()

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """Lines from here on are this test's."""
        self.cov.switch_context(nodeid)

    def pytest_runtest_logreport(self, report: object) -> None:
        """Setup, call and teardown add up."""
        self.seconds[report.nodeid] += report.duration
        if report.outcome != "passed":
            self.failed.add(report.nodeid)


def record(copy: Path, file: str, target: Path) -> int:
    """Run a test file under coverage; write ``{test: {"seconds": s, "functions": ["file:function", ...]}}``."""
    import coverage
    import pytest
    from mutations import functions

    sources = [copy / "nnssl", copy / "pretrain", copy / "trainers"]
    cov = coverage.Coverage(source=[str(s) for s in sources], data_file=str(copy / ".coverage"), config_file=False)
    recorder = Recorder(cov)
    cov.start()
    pytest.main(["-q", "-p", "no:cacheprovider", file], plugins=[recorder])
    cov.stop()
    ran: dict[str, set[str]] = {t: set() for t in recorder.seconds}
    data = cov.get_data()
    for measured in data.measured_files():
        name = str(Path(measured).resolve().relative_to(copy))
        spans = functions((copy / name).read_text())
        for line, tests in data.contexts_by_lineno(measured).items():
            inside = [w for w, (a, b) in spans.items() if a <= line <= b]
            for test in tests:
                if test in ran and inside:
                    ran[test].add(f"{name}:{max(inside, key=len)}")
    out = {
        t: {"seconds": recorder.seconds[t], "functions": sorted(f)} for t, f in ran.items() if t not in recorder.failed
    }
    target.write_text(json.dumps(out))
    return 0


def measure(copy: Path, wanted: list[str]) -> dict[str, dict]:
    """What :func:`record` tells of all test files; of those that did not change, from the last time."""
    store = ROOT / ".mutants"
    store.mkdir(exist_ok=True)
    known: dict[str, dict] = {}
    files = [f for w in wanted for f in (sorted((ROOT / w).rglob("test_*.py")) if (ROOT / w).is_dir() else [ROOT / w])]
    for file in files:
        name = str(file.relative_to(ROOT))
        key = hashlib.sha256(name.encode() + (copy / name).read_bytes()).hexdigest()[:16]
        kept = store / f"{file.stem}.{key}.json"
        if not kept.exists():
            for old in store.glob(f"{file.stem}.*.json"):
                old.unlink()
            started = time.monotonic()
            status = forked(lambda n=name, k=kept: record(copy, n, k), copy, 1200)
            tests = len(json.loads(kept.read_text())) if status == 0 else 0
            print(f"measured {name}: {tests} tests, {time.monotonic() - started:.0f} s", flush=True)
        if kept.exists():
            known |= json.loads(kept.read_text())
    return known


# ---- running ---------------------------------------------------------------------------------------------------------


def tests_for(file: str, where: str, known: dict[str, dict], seconds: float) -> tuple[list[str], float, int]:
    """Tests that run a function (or, outside of any, its file), quickest first, as far as the time goes; that time; how many
    were left out."""
    key = f"{file}:{where}"
    at = [t for t, k in known.items() if key in k["functions"]]
    if not at:  # measured before the function was moved to another file
        at = [t for t, k in known.items() if where and any(f.partition(":")[2] == where for f in k["functions"])]
    if not at:
        at = [t for t, k in known.items() if any(f.startswith((f"{key}.", f"{file}:")) for f in k["functions"])]
    if not at:  # a file without functions: those of the files that import it
        users = tuple(f"{user}:" for user in importers(file))
        at = [t for t, k in known.items() if users and any(f.startswith(users) for f in k["functions"])]
    at.sort(key=lambda t: known[t]["seconds"])
    kept, total = [], 0.0
    for test in at:
        total += known[test]["seconds"]
        if kept and total > seconds:
            break
        kept.append(test)
    return kept, total, len(at) - len(kept)


def importers(file: str) -> list[str]:
    """Files of the packages that import a module by name, relative to the checkout."""
    parent, _, name = file.removesuffix(".py").replace("/", ".").rpartition(".")
    asks = re.compile(
        rf"(from|import) ([\w.]*\.)?({re.escape(parent)}\.{name}\b|{re.escape(parent)} import [^\n]*\b{name}\b)"
    )
    files = [f for part in ("nnssl", "pretrain", "trainers") for f in (ROOT / part).rglob("*.py")]
    return [str(f.relative_to(ROOT)) for f in files if asks.search(f.read_text())]


def judge(copy: Path, file: str, mutation: object, known: dict[str, dict], seconds: float) -> dict:
    """Whether a mutation is caught, and by what."""
    tests, cost, cut = tests_for(file, mutation.where, known, seconds)
    row = {"file": file, "line": mutation.line, "label": mutation.label, "tests": len(tests), "cut": cut}
    if not tests:
        return {**row, "result": UNTESTED}
    target = copy / file
    original = target.read_text()

    def work() -> int:
        import pytest

        return int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *tests]))

    started = time.monotonic()
    try:
        target.write_text(mutation.source)
        status = forked(work, copy, 30 + 4 * min(cost, seconds))
    finally:
        target.write_text(original)
    output = (copy / "output.txt").read_text(errors="replace").splitlines()
    named = next((line[:160] for line in output if line.startswith(("FAILED", "ERROR"))), f"status {status}")
    row |= {"seconds": round(time.monotonic() - started, 1), "by": named if status != 0 else ""}
    return {**row, "result": SURVIVED if status == 0 else CAUGHT}


def spread(copies: list[Path], chosen: list, known: dict, seconds: float, deadline: float) -> list[dict]:
    """Results of all mutations, from as many processes as there are copies."""
    if len(copies) == 1:
        return _all(copies[0], chosen, known, seconds, deadline)
    pids = []
    for k, copy in enumerate(copies):
        pid = os.fork()
        if pid == 0:
            with contextlib.suppress(BaseException):
                rows = _all(copy, chosen[k :: len(copies)], known, seconds, deadline)
                (copy / "results.json").write_text(json.dumps(rows))
            os._exit(0)
        pids.append(pid)
    for pid in pids:
        os.waitpid(pid, 0)
    return [row for copy in copies for row in json.loads((copy / "results.json").read_text())]


def _all(copy: Path, chosen: list, known: dict, seconds: float, deadline: float) -> list[dict]:
    rows = []
    for file, mutation in chosen:
        if time.monotonic() > deadline:
            break
        rows.append(judge(copy, file, mutation, known, seconds))
        if rows[-1]["result"] != CAUGHT:
            cut = f" ({rows[-1]['cut']} slower tests were not run, see --seconds)" if rows[-1]["cut"] else ""
            print(f"{rows[-1]['result']}: {file}:{mutation.line} {mutation.label}{cut}", flush=True)
    return rows


def report(chosen: list, results: list[dict], out: Path | None) -> int:
    """Print what was caught by file; 1 where something was not."""
    if out is not None:
        with open(out, "a") as f:
            f.writelines(json.dumps(row) + "\n" for row in results)
    table = io.StringIO()
    areas: dict[str, Counter] = {}
    for row in results:
        areas.setdefault(row["file"], Counter())[row["result"]] += 1
    areas["all"] = sum(areas.values(), Counter())
    for area, n in areas.items():
        total = sum(n.values())
        share = n[CAUGHT] / max(total, 1)
        print(f"{share:6.1%} of {total:4d} caught, {n[SURVIVED]} survived, {n[UNTESTED]} untested: {area}", file=table)
    print(table.getvalue(), end="")
    if len(results) < len(chosen):
        print(f"{len(chosen) - len(results)} of {len(chosen)} were not run: the time was over.")
    return int(areas["all"][CAUGHT] < sum(areas["all"].values()))


if __name__ == "__main__":
    sys.exit(main())
