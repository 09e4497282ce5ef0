"""Preprocesses a source's images with the target's plans, once: in parallel, resumable, into a folder of its own."""

from __future__ import annotations

import contextlib
import logging
import os
import random
import shutil
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from nnssl.errors import NnsslError
from nnssl.plans import Plan
from nnssl.pretrain.data.folders import beside, own_folder
from nnssl.pretrain.data.pool import BadCase
from nnssl.pretrain.prepare.index import Entry, Index
from nnssl.pretrain.prepare.processes import run_jobs
from nnssl.pretrain.prepare.raw import RawCase
from nnssl.pretrain.prepare.worker import CaseWorker, Job, Reply

__all__ = ["done_cases", "preprocess_source", "raise_fatal", "temporary_folder"]

log = logging.getLogger("nnssl")

ABANDONED_SECONDS = 24 * 3600.0
"""After this a temporary folder of another machine counts as left behind."""

GB = 1e9


def done_cases(folder: Path) -> dict[str, tuple[int, int]]:
    """Cases of a folder of preprocessed cases -> (bytes, modification time in ns); opens nothing."""
    if not folder.is_dir():
        return {}
    found = {}
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.endswith(".b2nd") and not entry.name.endswith("_seg.b2nd"):
                info = entry.stat()
                found[entry.name[: -len(".b2nd")]] = (info.st_size, info.st_mtime_ns)
    return found


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
    """A folder of this process beside ``folder``, removed in the end; makes ``folder`` too. ``variable`` is told in errors."""
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


def _jobs(
    cases: Mapping[str, RawCase], index: Index, done: Mapping[str, tuple[int, int]], retry_bad: bool
) -> list[Job]:
    """What is left to do. A case is done where its file is there and its line tells the raw files as they are now."""
    jobs = []
    for name, case in cases.items():
        entry = index.entries.get(name)
        settled = entry is not None and (not retry_bad if entry.bad else name in done)
        if entry is not None and settled and entry.files == case.stamps:
            continue
        trust = ""
        if name in done and entry is None and done[name][1] > max(s[2] for s in case.stamps):
            trust = "any"  # the line was lost
        elif name in done and entry is not None and [s[:2] for s in entry.files] == [s[:2] for s in case.stamps]:
            trust = entry.sha256  # copied or touched: same size, another time
        jobs.append(Job(case, trust, stale=name in done))
    # in another order in each process: several machines may work on the same folder and seldom meet
    random.Random(f"{socket.gethostname()}-{os.getpid()}").shuffle(jobs)
    return jobs


def raise_fatal(reply: Reply, folder: Path, left: int) -> None:
    """Say why nothing can be written at the moment. Raises :class:`NnsslError`."""
    if reply.fatal == "memory":
        raise NnsslError(
            f"Memory ran out while {reply.entry.name} was preprocessed. What is done is kept: start again with fewer "
            "processes (-np)."
        )
    if reply.fatal == "write":
        raise NnsslError(
            f"{reply.entry.name} could not be written into {folder}: {reply.detail}. What is done is kept."
        )
    sizes = [size for size, _ in done_cases(folder).values()]
    need = left * (sum(sizes) / len(sizes) if sizes else reply.nbytes)
    free = shutil.disk_usage(folder).free
    raise NnsslError(
        f"No space left in {folder}: {left} images are still to be preprocessed, which takes about {need / GB:.2g} GB, and "
        f"{free / GB:.2g} GB are free. What is done is kept: make room and start again, and it goes on from there."
    )


def preprocess_source(
    plan: Plan, source: str, cases: Mapping[str, RawCase], *, n_processes: int, retry_bad: bool, part: str = ""
) -> tuple[dict[str, Entry], list[BadCase]]:
    """Preprocess those cases that are not done, with nnU-Net's own preprocessor and no labels.

    Args:
        plan: of the target; decides spacing, normalisation, transpose and file layout.
        source: name of the dataset.
        cases: its raw images.
        n_processes: processes.
        retry_bad: look again at images that were bad the last time and have not changed since.
        part: label of the part of the preprocessing that these cases are, see :class:`nnssl.pretrain.prepare.parts.Part`.

    Returns:
        The index entries of the good cases, and the bad ones.

    Raises:
        NnsslError: no space, no permission, no memory, or a killed process; a second start continues.
    """
    folder = own_folder(plan, source)
    index = Index(beside(folder, "index.jsonl"), part)
    jobs = _jobs(cases, index, done_cases(folder), retry_bad)
    if jobs:
        log.info("Preprocessing %d of %d images of %s into %s", len(jobs), len(cases), source, folder)
        with temporary_folder(folder) as temporary, contextlib.closing(index):
            worker = CaseWorker(plan.plans, plan.configuration, plan.dataset_json, plan.n_channels, folder, temporary)
            replies = run_jobs(worker, jobs, n_processes, f"Preprocessing {source}")
            with contextlib.closing(replies):
                for count, reply in enumerate(replies):
                    if reply.fatal:
                        raise_fatal(reply, folder, len(jobs) - count)
                    _append(index, reply.entry, folder, len(jobs) - count)
    good, bad = {}, []
    for name in cases:
        entry = index.entries[name]
        if entry.bad:
            bad.append(BadCase(name, entry.bad_file, entry.bad))
        else:
            good[name] = entry
    return good, bad


def _append(index: Index, entry: Entry, folder: Path, left: int) -> None:
    try:
        index.append(entry)
    except OSError as error:
        if shutil.disk_usage(folder).free < 1 << 20:
            raise_fatal(Reply(entry, "disk", nbytes=1), folder, left)
        raise NnsslError(f"Cannot write {index.path}: {error.strerror}.") from error
