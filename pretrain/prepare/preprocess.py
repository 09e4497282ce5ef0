"""Preprocesses a source's images with the target's plans, once: in parallel, resumable, into a folder of its own."""

from __future__ import annotations

import contextlib
import logging
import os
import random
import shutil
import socket
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import numpy as np

from nnssl.errors import NnsslError
from nnssl.plans import Plan
from nnssl.plans.unlabelled import prepared_folder
from nnssl.preprocessed import IMAGE, LABELS, PROPERTIES, complete
from nnssl.pretrain.data.case_set import BadCase
from nnssl.pretrain.data.folders import beside
from nnssl.pretrain.prepare.index import Entry, Index
from nnssl.pretrain.prepare.integrity import quiet
from nnssl.pretrain.prepare.processes import KILLED, run_tasks
from nnssl.pretrain.prepare.raw import RawCase
from nnssl.pretrain.prepare.request import SourceRequest
from nnssl.pretrain.prepare.worker import CaseWorker, Result, Task, Worker

log = logging.getLogger("nnssl")

ABANDONED_SECONDS = 24 * 3600.0  # after this a temporary folder of another machine counts as left behind
GB = 1e9


def done_cases(folder: Path) -> dict[str, tuple[int, int]]:
    """Cases of a folder whose files are there and not empty -> (bytes, modification time in ns) of the image; opens nothing."""
    if not folder.is_dir():
        return {}
    found, others = {}, set()
    with os.scandir(folder) as entries:
        for entry in entries:
            name = entry.name
            if name.endswith(IMAGE) and not name.endswith(LABELS):
                info = entry.stat()
                if info.st_size:
                    found[name[: -len(IMAGE)]] = (info.st_size, info.st_mtime_ns)
            elif name.endswith((PROPERTIES, LABELS)) and entry.stat().st_size:
                others.add(name)
    return {n: v for n, v in found.items() if {n + PROPERTIES, n + LABELS} <= others}


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _remove_abandoned(parent: Path) -> None:
    """Remove temporary folders of processes that are gone."""
    for folder in parent.iterdir():
        host, _, pid = folder.name.rpartition("-")
        with contextlib.suppress(OSError):
            old = time.time() - folder.stat().st_mtime > ABANDONED_SECONDS
            if old or (host == socket.gethostname() and pid.isdecimal() and os.name != "nt" and not _alive(int(pid))):
                shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def temporary_folder(folder: Path, variable: str = "nnUNet_preprocessed") -> Iterator[Path]:
    """A folder of this process beside ``folder``, removed in the end; makes ``folder`` too. ``variable`` is named in errors."""
    parent = beside(folder, "tmp")
    mine = parent / f"{socket.gethostname()}-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        parent.mkdir(exist_ok=True)
        _remove_abandoned(parent)
        mine.mkdir(exist_ok=True)
    except OSError as error:
        raise NnsslError(
            f"Cannot write into {folder.parent}: {error.strerror}. {variable} must be writable."
        ) from error
    try:
        yield mine
    finally:
        shutil.rmtree(mine, ignore_errors=True)
        with contextlib.suppress(OSError):
            parent.rmdir()


def _tasks(
    cases: Mapping[str, RawCase],
    index: Index,
    done: Mapping[str, tuple[int, int]],
    retry_bad: bool,
    folder: Path | None,
) -> list[Task]:
    """What is left to do. A case is done where its file is there and its line tells the raw files as they are now."""
    tasks = []
    for name, case in cases.items():
        entry = index.entries.get(name)
        settled = entry is not None and (not retry_bad if entry.bad else name in done)
        if entry is not None and settled and entry.files == case.stamps:
            if folder is not None and not entry.bad and not complete(folder, name):
                tasks.append(Task(case, stale=True))  # damaged after it was made
            continue
        trust = ""
        if name in done and entry is None and done[name][1] > max(s[2] for s in case.stamps):
            trust = "any"  # the line was lost
        elif name in done and entry is not None and [s[:2] for s in entry.files] == [s[:2] for s in case.stamps]:
            trust = entry.sha256  # copied or touched: same size, another time
        tasks.append(Task(case, trust, stale=name in done))
    return tasks


def _raise_fatal(result: Result, folder: Path, left: int) -> NoReturn:
    """Say why nothing can be written at the moment."""
    if result.fatal == "write":
        raise NnsslError(
            f"{result.entry.name} could not be written into {folder}: {result.detail}. What is done is kept."
        )
    sizes = [size for size, _ in done_cases(folder).values()]
    need = left * (sum(sizes) / len(sizes) if sizes else result.nbytes)
    free = shutil.disk_usage(folder).free
    raise NnsslError(
        f"No space left in {folder}: {left} images are still to be preprocessed, which takes about {need / GB:.2g} GB, and "
        f"{free / GB:.2g} GB are free. What is done is kept: make room and start again, and it goes on from there."
    )


def _killed(task: Task, how: str) -> Result:
    cause = "the image does not fit into this machine's memory" if how == KILLED else "the file is damaged"
    reason = f"its process {how}, though it worked alone: most likely {cause}"
    return Result(Entry(task.case.name, task.case.stamps, bad=reason, bad_file=task.case.files[0]))


def _too_large(result: Result) -> Result:
    if result.fatal != "memory":
        return result
    file = result.entry.files[0][0] if result.entry.files else ""
    reason = "it does not fit into this machine's memory, also alone"
    return Result(replace(result.entry, bad=reason, bad_file=file))


def in_memory(
    worker: Callable[[Task], Result], tasks: Sequence[Task], n_processes: int, description: str
) -> Generator[Result, None, None]:
    """Do all tasks; one for which memory ran out, or whose process was killed, is done again alone in the end.

    What does not fit even then is the image's fault: its entry is bad and says so.
    """
    again: list[Task] = []
    by_name = {task.case.name: task for task in tasks}
    alone = min(n_processes, len(tasks)) <= 1
    with contextlib.closing(run_tasks(worker, tasks, n_processes, description, killed=_killed)) as results:
        for result in results:
            if result.fatal == "memory" and not alone:
                again.append(by_name[result.entry.name])
            else:
                yield _too_large(result)
    for task in again:
        yield _too_large(worker(task))


def do_all(worker: Worker, tasks: list[Task], index: Index, n_processes: int, description: str) -> None:
    """Do tasks, and write a line to the index for each; raises :class:`NnsslError` where there is no space or no permission.

    The worker gets a temporary folder.
    """
    # in another order in each process: several machines may work on the same folder and seldom meet
    random.Random(f"{socket.gethostname()}-{os.getpid()}").shuffle(tasks)
    folder = worker.folder
    with temporary_folder(folder) as temporary:
        worker = replace(worker, temporary=temporary)
        with contextlib.closing(in_memory(worker, tasks, n_processes, description)) as results:
            for count, result in enumerate(results):
                if result.fatal:
                    _raise_fatal(result, folder, len(tasks) - count)
                try:
                    index.append(result.entry)
                except OSError as error:
                    if shutil.disk_usage(folder).free < 1 << 20:
                        _raise_fatal(Result(result.entry, "disk", nbytes=1), folder, len(tasks) - count)
                    raise NnsslError(f"Cannot write {index.path}: {error.strerror}.") from error


def _try_plans(plan: Plan) -> None:
    """Preprocess a few random voxels, so that plans which cannot are blamed themselves, and not each image in turn."""
    data = np.random.default_rng(0).normal(100, 20, (plan.n_channels, 11, 12, 13)).astype(np.float32)
    spacing = [1.0] * 3
    if plan.dim == 3:
        spacing = [plan.spacing[plan.transpose_forward.index(i)] * 0.9 for i in range(3)]
    try:
        plan.manager.image_reader_writer_class  # noqa: B018  looked up by name
        with quiet():
            made, _, _ = plan.config.preprocessor_class(verbose=False).run_case_npy(
                data, None, {"spacing": spacing}, plan.manager, plan.config, plan.dataset_json
            )
        odd = int((~np.isfinite(made)).sum())
        if made.ndim != 4 or made.shape[0] != plan.n_channels or odd:
            raise ValueError(f"they make an array of shape {made.shape} with {odd} odd voxels")
    except MemoryError:
        return  # the target spacing is very fine: the images decide
    except Exception as error:  # nnU-Net looks names up and calls what it finds
        raise NnsslError(
            f"Plans '{plan.plans_name}' of {plan.dataset_name}, configuration {plan.configuration}, cannot preprocess any image "
            f"({type(error).__name__}: {' '.join(str(error).split())[:200]}). Look at the reader, normalization_schemes, "
            "resampling functions and foreground_intensity_properties_per_channel in the plans."
        ) from error


def preprocess_source(
    asked: SourceRequest, source: str, cases: Mapping[str, RawCase]
) -> tuple[dict[str, Entry], list[BadCase]]:
    """Preprocess those raw images of a dataset that are not done, with nnU-Net's own preprocessor and no labels.

    Returns the index entries of the good cases, and the bad ones.
    """
    plan, folder = asked.plan, prepared_folder(asked.plan, source)
    index = Index(beside(folder, "index.jsonl"), asked.part.label if asked.part is not None else "")
    tasks = _tasks(cases, index, done_cases(folder), not asked.skip_bad, folder if asked.thorough else None)
    if tasks:
        log.info("Preprocessing %d of %d images of %s into %s", len(tasks), len(cases), source, folder)
        _try_plans(plan)
        do_all(CaseWorker(plan, folder, Path()), tasks, index, asked.processes, f"Preprocessing {source}")
    entries = [index.entries[name] for name in cases]
    return {e.name: e for e in entries if not e.bad}, [e.refusal for e in entries if e.bad]
