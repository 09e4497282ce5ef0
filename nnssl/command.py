"""What every console command shares: readable errors, exit status, and the logger on the terminal."""

from __future__ import annotations

import errno
import logging
import sys
from collections.abc import Callable
from typing import Any

from nnssl.errors import NnsslError

__all__ = ["configure_logging", "run_command"]

_USER_ERRNO = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS}


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


def run_command(body: Callable[[], int | None]) -> int:
    """Run the body of a command and return its exit status.

    An :class:`NnsslError`, and a disk that is full or not writable, are printed to stderr without a traceback (status 1);
    Ctrl-C gives 130. Any other exception is a defect and keeps its traceback.
    """
    configure_logging()
    try:
        return body() or 0
    except NnsslError as error:
        sys.stderr.write(f"Error: {error}\n")
        return 1
    except OSError as error:
        if error.errno not in _USER_ERRNO:
            raise
        sys.stderr.write(f"Error: {error}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("Stopped.\n")
        return 130
