"""What every console command shares: readable errors, signals, exit status, and the logger on the terminal."""

from __future__ import annotations

import errno
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from nnssl.errors import NnsslError, PeerLostError

__all__ = ["Stopped", "configure_logging", "run_command", "stop_on_signals"]

_USER_ERRNO = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS}

LOST = 75
"""Exit status of a process of a run that ended because another one had: the first to end has told why."""


class Stopped(KeyboardInterrupt):
    """A signal asked the program to end.

    Attributes:
        number: of the signal.
    """

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


class _Terminal(logging.StreamHandler):
    """Writes to whatever ``sys.stdout`` is at the moment of the message."""

    def __init__(self) -> None:
        super().__init__(sys.stdout)

    @property
    def stream(self) -> Any:
        return sys.stdout

    @stream.setter
    def stream(self, value: Any) -> None:
        pass


def configure_logging(level: int = logging.INFO) -> logging.Logger:
    """Let the "nnssl" logger write plain messages to stdout; a second call changes the level only."""
    logger = logging.getLogger("nnssl")
    if not any(isinstance(h, _Terminal) for h in logger.handlers):
        handler = _Terminal()
        handler.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(handler)
    logger.setLevel(level)
    return logger


def _first() -> bool:
    """Whether this process speaks for a run: the first, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def run_command(body: Callable[[], int | None]) -> int:
    """Run the body of a command and return its exit status.

    An :class:`NnsslError`, and a disk that is full or not writable, are printed to stderr without a traceback (status 1);
    Ctrl-C gives 130, SIGTERM 143, SIGHUP 129. Any other exception is a defect and keeps its traceback.
    """
    configure_logging()
    try:
        with stop_on_signals():
            return body() or 0
    except PeerLostError as error:
        if "NNSSL_LAUNCHER" not in os.environ:  # else the launcher tells it once
            sys.stderr.write(f"Error: {error}\n")
        return LOST
    except NnsslError as error:
        sys.stderr.write(f"Error: {error}\n")
        return 1
    except OSError as error:
        if error.errno not in _USER_ERRNO:
            raise
        sys.stderr.write(f"Error: {error}\n")
        return 1
    except KeyboardInterrupt as stopped:
        if _first():
            sys.stderr.write("Stopped.\n")
        return 128 + getattr(stopped, "number", signal.SIGINT)
