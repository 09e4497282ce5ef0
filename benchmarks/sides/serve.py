"""One side of benchmarks/peers.py, in a process of its own: answers requests, a line of JSON each, from stdin on stdout.

    python serve.py SIDE SETTINGS.json             # answers until stdin ends
    python serve.py SIDE SETTINGS.json first-step  # runs the side's own training command up to the end of its first step

``SIDE`` is a module beside this one: ours, nnunet or peer. Each has a class ``Side(settings)`` with

``loader(edge, crops)``   CPU seconds per million voxels of ``crops`` crops of edge^3, read and augmented as for training
``preprocess(index)``     CPU seconds of preprocessing one volume
``step()``, ``bare()``    CPU seconds of a training step, and of forward, loss and backward of the same batch
``memory(edge, crops)``   MiB that one loader process holds for itself after as many crops

and a function ``first_step(settings, done)``, which runs the command and has ``done`` called after the first step.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import sys
import time
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any


def clock() -> float:
    """CPU seconds of this process and of its children that have ended."""
    kinds = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return sum(u.ru_utime + u.ru_stime for u in map(resource.getrusage, kinds))


def timed(body: Callable[[], Any]) -> float:
    """CPU seconds of a call."""
    begin = clock()
    body()
    return clock() - begin


def children() -> list[int]:
    """Process numbers of this process's children."""
    found: list[int] = []
    for task in Path(f"/proc/{os.getpid()}/task").iterdir():
        found += map(int, (task / "children").read_text().split())
    return found


def private_mib(pids: list[int]) -> float:
    """Most MiB that one of the processes holds and shares with no other."""
    most = 0.0
    for pid in pids:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        most = max(most, sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1024)
    return most


def worker_memory(batches: Any, crops: int, batch: int) -> float:
    """Private MiB of the loader process of an iterator over batches of ``batch`` crops, after ``crops`` crops."""
    before = set(children())
    stream = iter(batches)
    for _ in range(-(-crops // batch)):
        next(stream)
    found = private_mib([pid for pid in children() if pid not in before])
    if hasattr(batches, "_finish"):  # an augmenter of batchgenerators
        batches._finish()
    return found


def main() -> int:
    """Answer."""
    answers, sys.stdout = sys.stdout, sys.stderr  # what a side prints is no answer
    if not hasattr(typing, "override"):  # Python before 3.12
        vars(typing)["override"] = lambda f: f
    side = importlib.import_module(f"sides.{sys.argv[1]}")
    settings = json.loads(Path(sys.argv[2]).read_text())
    import torch

    torch.set_num_threads(1)
    torch.set_num_threads = lambda n: None  # one thread for each side, whatever its command says
    if len(sys.argv) > 3:

        def done() -> None:
            answers.write(json.dumps({"value": clock()}) + "\n")
            answers.flush()
            os._exit(0)

        side.first_step(settings, done)
        return 1  # it ended without a step
    served = side.Side(settings)
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        begin = time.perf_counter()
        try:
            answer: dict[str, Any] = {"value": getattr(served, name)(*arguments)}
        except Exception as error:  # the other rows go on
            answer = {"error": f"{type(error).__name__}: {error}"[:500]}
        answers.write(json.dumps(answer | {"wall_s": time.perf_counter() - begin}) + "\n")
        answers.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
