"""What every console command shares: readable errors, signals, exit status, and the logger on the terminal."""

from __future__ import annotations

import argparse
import errno
import logging
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from nnssl.errors import NnsslError, PeerLostError, UsageError
from nnssl.grammar import USAGE
from nnssl.streams import TerminalHandler, open_streams
from nnssl.variables import check_variables

log = logging.getLogger("nnssl")

_USER_ERRNO = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENFILE),
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP),
}
"""Of disks, file systems and limits: the message names what it is about."""

LOST = 75
"""Exit status of a process of a run that ended because another one had: the first to end has said why."""


class Stopped(KeyboardInterrupt):
    """A signal, of this ``number``, asked the program to end."""

    def __init__(self, number: int = signal.SIGINT) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = int(number)


@contextmanager
def stop_on_signals() -> Iterator[None]:
    """Within, the first SIGTERM and SIGHUP raise :class:`Stopped` as Ctrl-C does; a signal that is ignored stays so (nohup)."""
    old: dict[int, Any] = {}
    stopping = False

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal stopping
        if not stopping:  # schedulers send it more than once: what is cleaned up meanwhile is not interrupted
            stopping = True
            raise Stopped(number)

    if threading.current_thread() is threading.main_thread():
        for name in ("SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)  # Windows has no SIGHUP
            if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
                old[number] = signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def configure_logging(level: int = logging.INFO) -> logging.Logger:
    """Let the "nnssl" logger write plain messages of this level to stdout; log files of runs always get everything."""
    handler = next((h for h in log.handlers if isinstance(h, TerminalHandler)), None)
    if handler is None:
        handler = TerminalHandler()
        handler.setFormatter(logging.Formatter("%(message)s"))
        log.addHandler(handler)
    handler.setLevel(level)
    log.setLevel(logging.DEBUG)
    return log


def check_device(name: str) -> None:
    """Refuse a device that is not there.

    Raises:
        NnsslError: names the way out.
    """
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise NnsslError("no CUDA device is available. On a machine without a GPU add -device cpu (or mps).")
    if name == "mps" and not torch.backends.mps.is_available():
        raise NnsslError("no MPS device is available. Use -device cpu.")


class _Others(logging.Filter):
    """Takes what another package's logger says to ours, as a detail."""

    def filter(self, record: logging.LogRecord) -> bool:
        log.debug("%s: %s", record.name, record.getMessage())
        return False


_OTHERS = _Others()
_CHATTY = logging.getLogger("nibabel.global")  # writes to the terminal by itself


@contextmanager
def others_quiet(loud: bool = False) -> Iterator[None]:
    """Within, warnings of other packages are details (``-v``, log files) of ours; started processes show theirs if ``loud``."""
    old, variable = warnings.showwarning, "PYTHONWARNINGS"

    def tell(message: Any, category: type[Warning], filename: str, lineno: int, *_: Any, **__: Any) -> None:
        log.debug("%s: %s (%s:%d)", category.__name__, message, filename, lineno)

    asked = variable in os.environ
    warnings.showwarning = tell
    _CHATTY.addFilter(_OTHERS)
    if not asked and not loud:
        os.environ[variable] = "ignore"
    try:
        yield
    finally:
        warnings.showwarning = old
        _CHATTY.removeFilter(_OTHERS)
        if not asked:
            os.environ.pop(variable, None)


def run_command(body: Callable[[], int | None], args: argparse.Namespace | None = None) -> int:
    """Run the body of a command and return its exit status.

    An :class:`NnsslError`, and a disk that is full or not writable, are printed to stderr without a traceback (status 1; 2 where
    the command line alone shows it); Ctrl-C gives 130, SIGTERM 143, SIGHUP 129. Any other exception is a defect and keeps its
    traceback. ``args`` are those of the command's parser, for ``-v`` and ``-q``.
    """
    open_streams()
    loud = bool(getattr(args, "verbose", False))
    configure_logging(logging.DEBUG if loud else logging.WARNING if getattr(args, "quiet", False) else logging.INFO)
    try:
        with stop_on_signals(), others_quiet(loud):
            check_variables()
            return body() or 0
    except PeerLostError as error:
        if "NNSSL_LAUNCHER" not in os.environ:  # else the launcher tells it once
            sys.stderr.write(f"Error: {error}\n")
        return LOST
    except NnsslError as error:
        if loud:
            traceback.print_exc()
        sys.stderr.write(f"Error: {error}\n")
        return USAGE if isinstance(error, UsageError) else 1
    except OSError as error:
        if error.errno not in _USER_ERRNO:
            raise
        sys.stderr.write(f"Error: {error}\n")
        return 1
    except KeyboardInterrupt as stopped:
        if os.environ.get("RANK", "0") == "0":  # one process of a run speaks
            sys.stderr.write("Stopped.\n")
        return 128 + getattr(stopped, "number", signal.SIGINT)
