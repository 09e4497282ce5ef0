"""Which device a run uses, and the processes of a run on several."""

from __future__ import annotations

import logging
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import fields
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from nnssl.command import LOST, check_device
from nnssl.distributed import is_distributed, rank
from nnssl.errors import NnsslError, PeerLostError
from nnssl.grammar import DEVICES
from nnssl.malloc import keep_freed_memory
from nnssl.pretrain.engine.signals import LAUNCHER, asked_to_stop, on_signals
from nnssl.threads import threads_asked

PREPARATION_LIMIT = timedelta(days=7)

SAVING_SECONDS = 600
"""Time for saving a checkpoint after a signal; then processes are killed."""

_LOST = re.compile(
    r"[Cc]onnection (was )?(closed|reset|refused)|[Bb]roken pipe|remote process exited|[Pp]eer closed|gloo"
)


def pick_device(name: str) -> torch.device:
    """The torch device of this process: of several GPUs the one of its local rank."""
    if name not in DEVICES:
        raise NnsslError(f"-device {name}: known are {', '.join(DEVICES)}.")
    check_device(name)
    if name == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
        return device
    if name == "cpu":
        torch.set_num_threads(threads_asked() or os.cpu_count() or 1)
        keep_freed_memory()
    return torch.device(name)


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Join the other processes that ``torchrun`` or :func:`launch` started; nothing to do for a single one."""
    started = int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized()
    _end_with_launcher()
    if started:
        # The elastic launcher may keep its key-value store when it starts processes again, with the addresses of the dead ones.
        store, index, size = _meet()
        store = dist.PrefixStore(f"nnssl_start_{_restarts()}", store)
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=index, world_size=size)
        if rank() != 0:
            logging.getLogger("nnssl").setLevel(logging.ERROR)
    try:
        yield
    except RuntimeError as error:
        if not started or isinstance(error, NnsslError) or not _lost_peer(error):
            raise
        raise PeerLostError(
            "another process of this run has ended, so this one ends too. Look for its own message; then continue with --c."
        ) from error
    finally:
        if started:
            with suppress(RuntimeError):  # also where the others are gone
                dist.destroy_process_group()


def _meet() -> tuple[Any, int, int]:
    """The store that the processes share, which of them this is, and how many there are."""
    try:
        return next(rendezvous("env://"))
    except ValueError as error:
        raise NnsslError(
            f"WORLD_SIZE={os.environ['WORLD_SIZE']} says that this is one of several processes, but the environment does not say "
            f"how they meet ({str(error).rpartition(': ')[2]}). torchrun and -num_gpus set all of it; for one process type: "
            "unset WORLD_SIZE"
        ) from error


def _lost_peer(error: RuntimeError) -> bool:
    return isinstance(error, getattr(dist, "DistError", ())) or _LOST.search(str(error)) is not None


def _end_with_launcher() -> None:
    """A killed launcher takes its processes along: they save as on SIGTERM, or end at once where they were saving."""
    launcher = int(os.environ.get(LAUNCHER, "0"))
    if not launcher or os.environ.get("WORLD_SIZE") is None:
        return

    def watch() -> None:
        while os.getppid() == launcher:
            time.sleep(0.5)
        os.environ.pop(LAUNCHER, None)  # from here on it speaks for itself
        os.kill(os.getpid(), signal.SIGINT if asked_to_stop() else signal.SIGTERM)
        time.sleep(SAVING_SECONDS)
        os._exit(128 + signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


@contextmanager
def shared_preparation() -> Iterator[None]:
    """Rank 0 runs the body first, alone; the others wait as long as it takes, then find everything prepared."""
    if not is_distributed():
        yield
        return
    waiting: Any = dist.new_group(backend="gloo", timeout=PREPARATION_LIMIT)
    if rank() != 0:
        dist.barrier(group=waiting)
    yield
    if rank() == 0:
        dist.barrier(group=waiting)


def _restarts() -> int:
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def restarted() -> bool:
    """Whether torch's elastic launcher has started this process again after one of its processes had ended."""
    return _restarts() > 0


def launch(arguments: list[str], processes: int, restarts: int = 0) -> int:
    """Start ``nnssl_pretrain`` in several processes on this machine with torch's elastic launcher; returns the exit status.

    Each process reports its own error. ``restarts``: how often all start again, from the last checkpoint, after one has ended.
    """
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    patience: dict[str, Any] = {"shutdown_timeout": SAVING_SECONDS, "signals_to_handle": "SIGQUIT"}
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id="nnssl",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=restarts,
        **{k: v for k, v in patience.items() if k in {f.name for f in fields(LaunchConfig)}},
    )
    # what torch would print of its processes, with tracebacks, is said below in one sentence, or by the processes themselves
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ[LAUNCHER] = str(os.getpid())
    signals: list[int] = []
    try:
        with _passed_on(signals):
            elastic_launch(config, sys.executable)("-m", "nnssl.pretrain.cli", *arguments)
    except ChildFailedError as error:
        return _exit_status(error.failures)
    except SignalException as error:  # the processes have saved and said so
        return 128 + int(signals[0] if signals else error.sigval)
    finally:
        del os.environ[LAUNCHER]
    return 0


@contextmanager
def _passed_on(received: list[int]) -> Iterator[None]:
    """Within, the first signal goes to the processes as it is, a Ctrl-C after it as SIGTERM; others are the first one again.

    Torch's own handlers would take each for a new one, so that a scheduler's third SIGTERM ended the launcher under a checkpoint
    that is being written, and would end a run under nohup.
    """
    from torch.distributed.elastic.multiprocessing import SignalException

    def hear(number: int, frame: Any) -> None:
        received.append(number)
        if len(received) == 1 or number == signal.SIGINT:
            raise SignalException(f"signal {number}", signal.Signals(number))  # torch's agent sends its own signal on

    with on_signals(hear):
        yield


def _exit_status(failures: dict[int, Any]) -> int:
    """The exit status of a launch of which processes failed, after a sentence on one that was killed."""
    codes = {index: int(failure.exitcode) for index, failure in sorted(failures.items())}
    after = (-signal.SIGTERM, LOST)  # ended because another had
    index, code = next(((i, c) for i, c in codes.items() if c not in after), next(iter(codes.items())))
    if code >= 0:
        return min(255, code or 1)
    why = ", most often because memory ran out" if code == -getattr(signal, "SIGKILL", 9) else ""
    sys.stderr.write(
        f"Error: process {index} of the run was killed ({signal.Signals(-code).name}){why}; the others have ended. Continue with "
        "the same command and --c.\n"
    )
    return min(255, 128 - code)
