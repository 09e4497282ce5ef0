"""How costs grow with the work: one log-log picture, and for each line the power of the work that it follows.

    python benchmarks/growth.py --picture growth.png

voxels      a training step of mae against the voxels of its crops, batch 2
crops       a training step against the crops in it: mae, which looks at each alone, and macl, which compares them
cases       the start of a run on preprocessed cases (startup.py's third row), and reading a crop, against the number of cases
ranks       a training step of mae and of macl against the ranks that share its crops (gloo, one machine): all ranks together

CPU seconds of one thread, the least of some repetitions. A slope of 1 is linear, 0 means that the cost does not grow. It is
fitted to the upper half of a line's points: the lower ones show what a step costs whatever it computes.
"""

from __future__ import annotations

import multiprocessing
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import cpu_seconds, make_dataset, parser, report, workspace
from startup import pretend, timed
from training import Bench, Training

FEATURES = (8, 16, 32)


def training(name: str, edge: int, batch: int) -> Training:
    """An objective on random crops of ``edge``^3."""
    bench = Bench(torch.device("cpu"), False, 9)
    return Training(bench, name, None, batch, patch=(edge,) * 3, features=FEATURES)


def steps_of(made: Training, repeats: int) -> float:
    """CPU seconds of a step."""
    made.step()
    return cpu_seconds(made.step, repeats)


def voxels(quick: bool) -> list[tuple[str, int, float]]:
    """A step against the voxels of its two crops."""
    edges = (8, 16) if quick else (16, 24, 32, 48, 64)
    return [("step of mae, by voxels", 2 * n**3, steps_of(training("mae", n, 2), 3)) for n in edges]


def crops(quick: bool) -> list[tuple[str, int, float]]:
    """A step against its crops."""
    points = []
    for name, edge, least in (("mae", 16, 2), ("macl", 32, 8)):
        for batch in [least, 2 * least] if quick else [least * 2**i for i in range(5)]:
            points.append((f"step of {name}, by crops", batch, steps_of(training(name, edge, batch), 2)))
    return points


def cases(quick: bool) -> list[tuple[str, int, float]]:
    """Start from the manifest, and reading, against the number of cases."""
    from nnssl.pretrain.data import SampleStream, make_loader
    from nnssl.pretrain.prepare import manifest, prepare_sources
    from nnssl.pretrain.types import CropRequest

    manifest.RACY_SECONDS = -1.0  # the links were made a moment ago
    tiny: dict[str, Any] = {"shape": (12, 16, 12), "patch": (8, 8, 8), "features": (4, 8), "preprocessed": False}
    points = []
    for n in (20, 200) if quick else (100, 300, 1000, 3000, 10_000, 20_000):
        with workspace():
            plan = make_dataset(1, **tiny)
            source = make_dataset(1, id=902, **tiny).dataset_name
            pretend(plan, source, n)
            timed(plan, source)
            seconds = min(timed(plan, source)[1] for _ in range(3))
            pool = prepare_sources(plan, [source], n_processes=1, held_out=0.0)
            request = CropRequest((8, 8, 8), (8, 8, 8))
            stream = iter(make_loader(pool, plan, request, SampleStream(0, 8), range(10_000)))
            next(stream)
            points.append(("start, by cases", n, seconds))
            read = cpu_seconds(partial(lambda s: [next(s) for _ in range(20)], stream))
            points.append(("reading a crop, by cases", n, read / 160))
    return points


def _rank(rank: int, name: str, world: int, total: int, file: str, repeats: int, found: Any) -> None:
    """In a process of its own: its part of a step, in DistributedDataParallel."""
    import torch.distributed as dist

    from nnssl.pretrain.engine.stepping import views_in_parts

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=world)
    made = training(name, 32, total)
    share = total // world
    part = made.crops.part(rank * share, share)
    made.stepper.module = torch.nn.parallel.DistributedDataParallel(made.method)

    def step() -> None:
        batch = next(views_in_parts(made.method, part, 1, made.device, 0, made.at))
        made.stepper.step(batch, made.at, part.case, False)[0].read()
        made.at += 1

    step()
    times = []
    for _ in range(repeats):
        begin = time.process_time()
        step()
        times.append(time.process_time() - begin)
    found.put(times)
    dist.barrier()
    dist.destroy_process_group()


def ranks(quick: bool) -> list[tuple[str, int, float]]:
    """All ranks' time of a step that has 16 crops in all."""
    points, context = [], multiprocessing.get_context("spawn")
    for name, world in [(name, world) for name in ("mae", "macl") for world in ((1, 2) if quick else (1, 2, 4))]:
        with tempfile.TemporaryDirectory() as folder:
            found = context.Queue()
            arguments = (name, world, 8 if quick else 16, f"{folder}/meet", 2 if quick else 4, found)
            processes = [context.Process(target=_rank, args=(rank, *arguments)) for rank in range(world)]
            for process in processes:
                process.start()
            times = [found.get(timeout=600) for _ in processes]
            for process in processes:
                process.join()
        points.append((f"step of {name} on all ranks, by ranks", world, min(map(sum, zip(*times)))))
    return points


LINES: dict[str, Callable[[bool], list[tuple[str, int, float]]]] = {
    "voxels": voxels,
    "crops": crops,
    "cases": cases,
    "ranks": ranks,
}


def slope(work: list[int], costs: list[float]) -> float:
    """The power of the work that the upper half of the costs, at least two of them, follows: least squares of the logarithms."""
    first = min(len(work) // 2, len(work) - 2)
    return float(np.polyfit(np.log(work[first:]), np.log(costs[first:]), 1)[0])


def rows_of(points: list[tuple[str, int, float]]) -> list[dict[str, Any]]:
    """A row for each point, with its line's slope."""
    rows = []
    for what in dict.fromkeys(p[0] for p in points):
        line = [p[1:] for p in points if p[0] == what]
        found = slope([n for n, _ in line], [c for _, c in line])
        for n, seconds in line:
            rows.append({"what": what, "n": n, "cpu_s": seconds, "times_first": seconds / line[0][1], "slope": found})
    return rows


def draw(rows: list[dict[str, Any]], file: Path) -> None:
    """All lines over what each starts from, on logarithmic axes."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 4.2))
    for what, marker in zip(dict.fromkeys(row["what"] for row in rows), "os^Dvx*"):
        line = [row for row in rows if row["what"] == what]
        work = [row["n"] / line[0]["n"] for row in line]
        label = f"{what} from {line[0]['n']:,}: slope {line[0]['slope']:.2f}"
        axes.loglog(work, [row["times_first"] for row in line], marker=marker, markersize=4, linewidth=1, label=label)
    ends = np.array([1, 100])
    axes.loglog(ends, ends, color="0.7", linewidth=1, linestyle="--", label="linear")
    axes.set_xlabel("times the work")
    axes.set_ylabel("times the CPU seconds")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, frameon=False)
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    plt.close(figure)


def main() -> None:
    """Print the table, draw the picture."""
    p = parser(__doc__)
    p.add_argument("--only", nargs="+", choices=sorted(LINES), default=list(LINES), metavar="LINE", help="some lines")
    p.add_argument("--picture", type=Path, help="PNG file of all lines")
    args = p.parse_args()
    torch.set_num_threads(1)
    rows = rows_of([point for name in args.only for point in LINES[name](args.quick)])
    report("cost as work grows", rows, args.out)
    if args.picture is not None:
        draw(rows, args.picture)


if __name__ == "__main__":
    main()
