"""Many cases at once: spawned processes that end with their parent, and a progress bar."""

from __future__ import annotations

import errno
import logging
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait as wait_for
from typing import Any, TypeVar

import torch
from nnunetv2.configuration import default_num_processes
from tqdm import tqdm

from nnssl.errors import NnsslError
from nnssl.words import counted

log = logging.getLogger("nnssl")

IN_FLIGHT = 3  # jobs handed out per process: few, so that 100,000 cases are not queued at once
KILLED = "was killed"

J = TypeVar("J")
R = TypeVar("R")

_worker: Callable[[Any], Any] | None = None


def _start(worker: Callable[[Any], Any]) -> None:
    """First thing in a process: leave Ctrl-C to the main process, and end with it even if it is killed."""
    global _worker
    _worker = worker
    for name in ("SIGINT", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    torch.set_num_threads(1)
    parent = multiprocessing.parent_process()
    if parent is not None:

        def watch() -> None:
            wait_for([parent.sentinel])
            os._exit(1)

        threading.Thread(target=watch, daemon=True).start()


def _do(task: Any) -> Any:
    if _worker is None:
        raise RuntimeError("the process was not started by run_tasks")
    return _worker(task)


def run_tasks(
    worker: Callable[[J], R],
    tasks: Sequence[J],
    n_processes: int | None,
    description: str,
    *,
    killed: Callable[[J, str], R] | None = None,
) -> Generator[R, None, None]:
    """Do all tasks and yield results as they come, with a progress bar.

    Where a process ends (most often killed, because memory ran out), what was at work is done again, one task at a time, and
    the rest goes on with half as many processes.

    Args:
        worker: does one; pickles.
        tasks: in any order.
        n_processes: spawned processes; 0 and 1 work in this process. nnU-Net's default where None.
        description: of the progress bar.
        killed: the result of a task whose process ended even when it was the only one, from the task and from how it ended
            ("was killed", "crashed (SIGSEGV)"); None raises :class:`NnsslError`.
    """
    n = min(default_num_processes if n_processes is None else n_processes, len(tasks))
    with tqdm(total=len(tasks), desc=description, disable=None if tasks else True, dynamic_ncols=True) as bar:
        for result in map(worker, tasks) if n <= 1 else _in_processes(worker, tasks, n, killed):
            bar.update()
            yield result


def _in_processes(
    worker: Callable[[J], R], tasks: Sequence[J], n: int, killed: Callable[[J, str], R] | None
) -> Iterator[R]:
    waiting = iter(tasks)
    while True:
        broken: list[J] = []
        how = yield from _pool(worker, waiting, n, broken)
        if not broken:
            return
        n = max(1, n // 2)
        why = ", most likely because memory ran out" if how == KILLED else ""
        text = "A process %s%s. What was at work is done again, one by one; then the rest with %s."
        log.warning(text, how, why, counted(n, "process", "processes"))
        while broken:
            todo = iter(broken)
            lost: list[J] = []
            how = yield from _pool(worker, todo, 1, lost)
            if lost:  # a single process works in order: the first of them is to blame
                first = min(lost, key=lambda task: next(i for i, known in enumerate(broken) if known is task))
                if killed is None:
                    raise NnsslError(
                        f"A process {how} though it was the only one. What is done is kept"
                        + (": most likely memory ran out; make some free and start again." if how == KILLED else ".")
                    )
                yield killed(first, how)
                lost = [task for task in lost if task is not first]
            broken = [*lost, *todo]


def _how(processes: Sequence[Any]) -> str:
    """How the first of these processes ended that did not because the pool ended it."""
    for code in (process.exitcode for process in processes):
        if code == -getattr(signal, "SIGKILL", 9):
            return KILLED
        if code and code != -signal.SIGTERM:
            name = signal.Signals(-code).name if -code in set(signal.Signals) else f"exit status {code}"
            return f"crashed ({name})"
    return KILLED


def _pool(worker: Callable[[J], R], waiting: Iterator[J], n: int, broken: list[J]) -> Generator[R, None, str]:
    """Do tasks in ``n`` processes until all are done or a process ends: ``broken`` gets those at work then.

    Returns how the process ended; "" where all are done.
    """
    try:
        executor = ProcessPoolExecutor(n, multiprocessing.get_context("spawn"), _start, (worker,))
    except OSError as error:  # locks of processes live in shared memory
        if error.errno != errno.ENOSPC:
            raise
        raise NnsslError(
            "Shared memory ran out, which processes need. Start the container with --ipc=host or a larger --shm-size, or work in "
            "one process (-np 1)."
        ) from error
    running: dict[Future[R], J] = {}
    try:
        while True:
            while len(running) < IN_FLIGHT * n and (task := next(waiting, None)) is not None:
                try:
                    running[executor.submit(_do, task)] = task
                except BrokenProcessPool:
                    broken.append(task)
                    break
            if not running:
                break
            for future in wait(running, return_when=FIRST_COMPLETED)[0]:
                task = running.pop(future)
                try:
                    result = future.result()
                except BrokenProcessPool:
                    broken.append(task)
                else:
                    yield result
            if broken:
                broken += running.values()
                processes = list((getattr(executor, "_processes", None) or {}).values())
                for process in processes:  # one that started while the pool broke was not ended with the others
                    process.terminate()
                executor.shutdown()
                return _how(processes)
        executor.shutdown()
        return ""
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
