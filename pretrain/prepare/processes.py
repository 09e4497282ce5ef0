"""Many cases at once: spawned processes that end with their parent, and a progress bar."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait as wait_for
from typing import Any, TypeVar

import torch
from tqdm import tqdm

from nnssl.errors import NnsslError

__all__ = ["run_jobs"]

IN_FLIGHT = 3
"""Jobs handed out per process: few, so that 100,000 cases are not queued at once."""

J = TypeVar("J")
R = TypeVar("R")

_worker: Callable[[Any], Any] | None = None


def _start(worker: Callable[[Any], Any]) -> None:
    """First thing in a process: leave Ctrl-C to the main process, and end with it even if it is killed."""
    global _worker
    _worker = worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    parent = multiprocessing.parent_process()
    if parent is not None:

        def watch() -> None:
            wait_for([parent.sentinel])
            os._exit(1)

        threading.Thread(target=watch, daemon=True).start()


def _do(job: Any) -> Any:
    if _worker is None:
        raise RuntimeError("the process was not started by run_jobs")
    return _worker(job)


def run_jobs(worker: Callable[[J], R], jobs: Sequence[J], n_processes: int, description: str) -> Iterator[R]:
    """Do all jobs and yield replies as they come, with a progress bar.

    Args:
        worker: does one; pickles.
        jobs: in any order.
        n_processes: spawned processes; 0 and 1 work in this process.
        description: of the progress bar.

    Raises:
        NnsslError: a process was killed.
    """
    with tqdm(total=len(jobs), desc=description, disable=None if jobs else True, dynamic_ncols=True) as bar:
        if min(n_processes, len(jobs)) <= 1:
            replies: Iterator[R] = map(worker, jobs)
        else:
            replies = _in_processes(worker, jobs, min(n_processes, len(jobs)))
        for reply in replies:
            bar.update()
            yield reply


def _in_processes(worker: Callable[[J], R], jobs: Sequence[J], n: int) -> Iterator[R]:
    executor = ProcessPoolExecutor(n, multiprocessing.get_context("spawn"), _start, (worker,))
    running: set[Future[R]] = set()
    waiting = iter(jobs)
    try:
        while True:
            while len(running) < IN_FLIGHT * n and (job := next(waiting, None)) is not None:
                running.add(executor.submit(_do, job))
            if not running:
                break
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                yield future.result()
        executor.shutdown()
    except BrokenProcessPool as error:
        raise NnsslError(
            "A preprocessing process was killed, most likely because memory ran out. What is done is kept: start again "
            f"with fewer processes than {n} (-np) and it goes on from there."
        ) from error
    except BaseException:
        _end(executor)
        raise


def _end(executor: ProcessPoolExecutor) -> None:
    """Stop the processes at once; each case is whole or not there."""
    processes = list((getattr(executor, "_processes", None) or {}).values())
    executor.shutdown(wait=False, cancel_futures=True)
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + 5
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
        if process.is_alive():
            process.kill()
