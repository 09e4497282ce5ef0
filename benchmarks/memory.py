"""Memory of a run against the number of its cases.

    python benchmarks/memory.py

For each number of cases a fresh process lists them, starts one loader worker and reads batches of crops. Told are the peak
resident memory of the main process, and the proportional set size of the worker after its last batch (Linux). Cases are links to
one volume of 96 x 112 x 96 voxels, 4.1 MB as float32; a worker that held volumes would grow by that for each it has seen.
"""

from __future__ import annotations

import json
import multiprocessing
import resource
import subprocess
import sys
from pathlib import Path

from common import arguments, make_dataset, report, workspace


def child(batches: int) -> None:
    """In a process of its own: prints the numbers as JSON."""
    from nnssl.plans import load_plan
    from nnssl.pretrain.data import SampleStream, make_loader
    from nnssl.pretrain.methods import CropRequest
    from nnssl.pretrain.prepare import prepare_sources

    plan = load_plan(901)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    pool = prepare_sources(plan, [plan.dataset_name])
    listed = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    size = tuple(plan.patch_size)
    loader = make_loader(pool, plan, CropRequest(size, size), SampleStream(0, 8), range(batches + 8), num_workers=1)
    worker, stream = None, iter(loader)
    for _ in range(batches):
        next(stream)
    for process in multiprocessing.active_children():
        smaps = Path(f"/proc/{process.pid}/smaps_rollup")
        if smaps.exists():
            worker = next(int(line.split()[1]) for line in smaps.read_text().splitlines() if line.startswith("Pss:"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    row = {"cases": len(pool.cases), "imports_MiB": before / 1024, "listed_MiB": listed / 1024, "peak_MiB": peak / 1024}
    sys.stdout.write(json.dumps(row | {"worker_pss_MiB": None if worker is None else worker / 1024}))


def main() -> None:
    """Print the table."""
    args = arguments(__doc__, batches=(100, "batches of 8 crops"), child=(0, "used by the script itself"))
    if args.child:
        child(args.child)
        return
    rows = []
    shape, patch = ((24, 24, 24), (16, 16, 16)) if args.quick else ((96, 112, 96), (64, 64, 64))
    for n in (20, 200) if args.quick else (100, 1000, 20_000):
        with workspace():
            make_dataset(n, shape=shape, patch=patch, features=(4, 8))
            batches = 10 if args.quick else args.batches
            command = [sys.executable, __file__, "--child", str(batches)]
            out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            rows.append(json.loads(out.splitlines()[-1]))
    report("memory against the number of cases", rows, args.out)


if __name__ == "__main__":
    main()
