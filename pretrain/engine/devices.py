"""Which device a run uses, and the processes of a run on several."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from nnssl.distributed import is_distributed, rank
from nnssl.errors import NnsslError
from nnssl.malloc import keep_freed_memory

__all__ = ["launch", "pick_device", "process_group", "restarted", "shared_preparation"]

DEVICES = ("cuda", "cpu", "mps")
PREPARATION_LIMIT = timedelta(days=7)


def pick_device(name: str) -> torch.device:
    """The torch device of this process.

    Args:
        name: ``"cuda"``, ``"cpu"`` or ``"mps"``; of several GPUs the one of this process's local rank.

    Raises:
        NnsslError: unknown, or not there.
    """
    if name not in DEVICES:
        raise NnsslError(f"-device {name}: known are {', '.join(DEVICES)}.")
    if name == "cuda":
        if not torch.cuda.is_available():
            raise NnsslError("no CUDA device is available. On a machine without a GPU add -device cpu (or mps).")
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
        return device
    if name == "mps" and not torch.backends.mps.is_available():
        raise NnsslError("no MPS device is available. Use -device cpu.")
    if name == "cpu":
        torch.set_num_threads(_threads())
        keep_freed_memory()
    return torch.device(name)


def _threads() -> int:
    if "OMP_NUM_THREADS" in os.environ:
        return max(1, int(os.environ["OMP_NUM_THREADS"]))
    return os.cpu_count() or 1


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Join the other processes that ``torchrun`` or :func:`launch` started; nothing to do for a single one."""
    started = int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized()
    if started:
        # The elastic launcher may keep its key-value store when it starts processes again, with the addresses of the dead ones.
        store, index, size = next(rendezvous("env://"))
        store = dist.PrefixStore(f"nnssl_start_{_restarts()}", store)
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=index, world_size=size)
        if rank() != 0:
            logging.getLogger("nnssl").setLevel(logging.ERROR)
    try:
        yield
    finally:
        if started:
            dist.destroy_process_group()


@contextmanager
def shared_preparation() -> Iterator[None]:
    """Rank 0 runs the body first, alone; the others wait as long as it takes, then find everything prepared."""
    if not is_distributed():
        yield
        return
    waiting = dist.new_group(backend="gloo", timeout=PREPARATION_LIMIT)
    if rank() != 0:
        dist.barrier(group=waiting)  # type: ignore[arg-type]
    yield
    if rank() == 0:
        dist.barrier(group=waiting)  # type: ignore[arg-type]


def _restarts() -> int:
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def restarted() -> bool:
    """Whether torch's elastic launcher has started this process again after one of its processes had ended."""
    return _restarts() > 0


def launch(arguments: list[str], processes: int, restarts: int = 0) -> int:
    """Start ``nnssl_pretrain`` in several processes on this machine with torch's elastic launcher.

    Args:
        arguments: of the command.
        processes: one per GPU.
        restarts: times that all processes are started again, from the last checkpoint, after one was killed or failed.

    Returns:
        The exit status; each process has told its own error.
    """
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id="nnssl",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=restarts,
    )
    try:
        elastic_launch(config, sys.executable)("-m", "nnssl.pretrain.cli", *arguments)
    except ChildFailedError as error:
        return max(1, min(255, abs(next(iter(error.failures.values())).exitcode)))
    return 0
