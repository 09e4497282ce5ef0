"""The loader: an ordered stream of :class:`~nnssl.pretrain.types.Crops` from worker processes that hold no volumes."""

from __future__ import annotations

import contextlib
import errno
import multiprocessing.queues
import os
import shutil
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import blosc2
import torch
from torch.utils.data import DataLoader, Dataset, Sampler
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from nnssl.errors import NnsslError
from nnssl.plans import Plan
from nnssl.pretrain.data.case import CaseFormat, CaseReader
from nnssl.pretrain.data.case_set import CaseSet
from nnssl.pretrain.data.crops import CropDataset, Sample, collate
from nnssl.pretrain.data.folders import body_folder
from nnssl.pretrain.data.reorientation import common_orientation
from nnssl.pretrain.data.sampling import HELD_OUT, SampleStream
from nnssl.pretrain.types import CropRequest, Crops

__all__ = ["AuxiliaryLoader", "CropLoader", "make_loader"]


class AuxiliaryLoader(Protocol):
    """Reads more of a step than its crops, in the same processes; pickles."""

    def read(self, step: int) -> Any:
        """This rank's part of a step: a pure function of the seed and the step."""

    def join(self, crops: Crops, read: Any) -> Any:
        """What the loader yields: the crops and what was read; moves, pins and tells its cases and length as crops do."""


class _Steps(Sampler[list[tuple[int, int]]]):
    """This rank's samples of each step."""

    def __init__(self, steps: range, samples: range) -> None:
        self.steps, self.samples = steps, samples

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step in self.steps:
            yield [(step, sample) for sample in self.samples]

    def __len__(self) -> int:
        return len(self.steps)


@dataclass(frozen=True)
class _Failure:
    """An error for the user on its way out of a worker; raised there, torch would wrap it into a traceback."""

    message: str


NO_SHARED_MEMORY, NO_FILES, NOT_SENT = 81, 82, 83
"""Exit status of a worker whose batch could not be handed over."""


def _not_sent(error: BaseException, batch: Any) -> None:
    """End a worker whose batch cannot be handed over: Python's queues would drop it, and the main process wait for ever."""
    number, text = getattr(error, "errno", None), str(error)
    if number == errno.ENOSPC or "shared memory" in text or "shm" in text:
        os._exit(NO_SHARED_MEMORY)
    if number in (errno.EMFILE, errno.ENFILE) or "Too many open files" in text:
        os._exit(NO_FILES)
    sys.stderr.write(f"A batch could not be handed over: {error!r}\n")
    os._exit(NOT_SENT)


def shared_memory_advice() -> str:
    """What to do where processes cannot share memory; names the size where it can be known."""
    size = ""
    with contextlib.suppress(OSError):
        size = f" (/dev/shm has {shutil.disk_usage('/dev/shm').total / 2**20:.0f} MB)"
    return (
        f"Shared memory ran out{size}: loader processes hand their batches over in it. Start a container with --ipc=host or "
        "a larger --shm-size, for example --shm-size=8g; or read in the main process with -o workers=0."
    )


class _Guarded(Dataset[Any]):
    """Hands a batch's error on as a value; reads what an auxiliary loader has beside the crops."""

    def __init__(self, dataset: CropDataset, auxiliary: AuxiliaryLoader | None = None) -> None:
        self.dataset, self.auxiliary = dataset, auxiliary

    def __getitems__(self, items: list[tuple[int, int]]) -> list[Sample] | tuple[list[Sample], Any] | _Failure:
        try:
            samples = [self.dataset[item] for item in items]
            return samples if self.auxiliary is None else (samples, self.auxiliary.read(items[0][0]))
        except NnsslError as error:
            return _Failure(str(error))
        finally:
            self.dataset.release()

    def collate(self, read: Any) -> Any:
        """Stack the samples of a batch, and put beside them what the auxiliary loader has read."""
        if isinstance(read, _Failure):
            return read
        return collate(read) if self.auxiliary is None else self.auxiliary.join(collate(read[0]), read[1])


def _start_worker(worker: int) -> None:
    """One thread; stop signals, which go to all processes of a group, are for the main process, which saves first.

    A SIGTERM of the main process itself still ends the worker.
    """
    if blosc2.nthreads != 1:  # a forked process must not touch the threads that its parent had
        blosc2.set_nthreads(1)
    queue: Any = multiprocessing.queues.Queue
    queue._on_queue_feeder_error = staticmethod(_not_sent)
    for name in ("SIGINT", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        parent = os.getppid()
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

        def watch() -> None:
            while True:
                with contextlib.suppress(InterruptedError):
                    if signal.sigwaitinfo({signal.SIGTERM}).si_pid in (parent, os.getpid()):
                        os._exit(0)

        threading.Thread(target=watch, daemon=True).start()


def _advice(workers: Sequence[Any]) -> str | None:
    """Why loader processes ended, from their exit status; None where all of them live or ended as they should."""
    for worker in workers:
        worker.join(0.2)
    ended = {worker.exitcode for worker in workers if worker.exitcode}
    if {NO_SHARED_MEMORY, -getattr(signal, "SIGBUS", 0)} & ended:
        return shared_memory_advice()
    if NO_FILES in ended:
        return (
            "A loader process has no file handles left. Raise the limit (ulimit -n 65536), lower -o workers=N, or read in the "
            "main process with -o workers=0."
        )
    killed = {-code for code in ended if code < 0}
    if not killed:
        return None
    names = ", ".join(signal.Signals(s).name for s in sorted(killed))
    return f"A loader process was killed ({names}), most often because memory ran out: lower -o workers=N or -o batch_size=N."


class _Batches:
    """Iterator that raises errors where they can be read."""

    def __init__(self, batches: Iterator[Any], loader: CropLoader) -> None:
        self._batches, self._loader = batches, loader

    def __iter__(self) -> _Batches:
        return self

    def __next__(self) -> Crops:
        try:
            batch = next(self._batches)
        except (RuntimeError, EOFError, OSError) as error:  # what torch says depends on when the worker died
            advice = _advice(getattr(self._batches, "_workers", ()))
            if advice is None:
                raise
            self._close()
            raise NnsslError(advice) from error
        if isinstance(batch, _Failure):
            self._close()
            raise NnsslError(batch.message)
        return batch

    def _close(self) -> None:
        """End the workers now: an iterator that is left to the garbage collector takes seconds to."""
        self._loader._iterator = None
        shutdown = getattr(self._batches, "_shutdown_workers", None)
        if shutdown is not None:
            shutdown()


class CropLoader(DataLoader[Any]):
    """A torch ``DataLoader`` over :class:`CropDataset` whose errors are :class:`NnsslError`."""

    @property
    def crops(self) -> CropDataset:
        """The data set."""
        guarded: Any = self.dataset
        return guarded.dataset

    def __iter__(self) -> Any:
        old = signal.getsignal(signal.SIGCHLD) if self.num_workers and hasattr(signal, "SIGCHLD") else None
        try:
            batches = super().__iter__()
        except OSError as error:  # locks and queues of processes live in shared memory too
            if error.errno != errno.ENOSPC:
                raise
            _MultiProcessingDataLoaderIter._shutdown = True  # else what is half made complains when it is thrown away
            raise NnsslError(shared_memory_advice()) from error
        if old is not None and threading.current_thread() is threading.main_thread():
            # torch's handler raises wherever the main process happens to be, be it in the middle of saving a checkpoint
            signal.signal(signal.SIGCHLD, old)
        return _Batches(batches, self)

    def counts(self) -> dict[str, int]:
        """So far: places rejected because they showed air (``redrawn``), and crops of air, where no place had more (``air``)."""
        if self.crops.counters is None:
            return {"redrawn": 0, "air": 0}
        redrawn, air = self.crops.counters.sum(0).tolist()
        return {"redrawn": int(redrawn), "air": int(air)}


def _counters(workers: int) -> torch.Tensor:
    """``(workers, 2)`` int64, shared with the workers where there are any."""
    counters = torch.zeros(max(1, workers), 2, dtype=torch.int64)
    try:
        return counters.share_memory_() if workers else counters
    except RuntimeError as error:
        raise NnsslError(shared_memory_advice()) from error


def make_loader(
    case_set: CaseSet,
    plan: Plan,
    request: CropRequest,
    stream: SampleStream,
    steps: range,
    *,
    num_workers: int = 0,
    pin_memory: bool = False,
    auxiliary: AuxiliaryLoader | None = None,
) -> CropLoader:
    """Make the loader of one rank.

    What it yields depends on the case set, the request, the stream and the step alone: not on the number of workers, nor on
    where it started. Iterated again, it yields the same again. No global random number is drawn.

    Args:
        case_set: the cases.
        plan: whose preprocessing they have.
        request: crop, read size and crops per case.
        stream: the samples of each step; of held-out cases where its number is :data:`~nnssl.pretrain.data.HELD_OUT`.
        steps: those to yield.
        num_workers: processes that read; 0 reads in this one.
        pin_memory: for copies to a GPU.
        auxiliary: reads more of each step.

    Raises:
        NnsslError: there are no such cases, or the batch cannot be shared by the processes. While iterating: a case's files are
            missing or damaged, or a worker was killed.
    """
    if stream.batch_size < 1 or stream.batch_size % stream.world_size:
        raise NnsslError(
            f"batch_size={stream.batch_size} cannot be shared by {stream.world_size} processes; use a multiple."
        )
    held_out = stream.number == HELD_OUT
    refs = case_set.held_out if held_out else case_set.train
    if not refs:
        raise NnsslError(f"There are no {'held-out' if held_out else 'train'} cases.")
    blosc2.set_nthreads(1)  # as nnU-Net's data sets do, before workers are forked
    bodies = {s: body_folder(plan, s) for s in {r.source for r in refs}} if request.body else None
    reader = CaseReader(CaseFormat.from_plan(plan), bodies=bodies)
    orientation = common_orientation(case_set.cases, reader, plan.spacing) if request.reorient else None
    dataset = CropDataset(refs, reader, request, stream, orientation)
    dataset.counters = _counters(num_workers)
    guarded = _Guarded(dataset, auxiliary)
    return CropLoader(
        guarded,
        batch_sampler=_Steps(steps, stream.own),
        collate_fn=guarded.collate,
        num_workers=num_workers,
        pin_memory=pin_memory,
        worker_init_fn=_start_worker,
        persistent_workers=num_workers > 0,
        generator=torch.Generator(),  # torch would draw from the global one, and a resumed run would differ
    )
