"""The streams of a command: closed, cut off, full, or without a letter that is to be shown. None of that ends a run."""

from __future__ import annotations

import errno
import logging
import os
import sys
from contextlib import suppress
from typing import Any


def open_streams() -> None:
    """Let a closed stream (``>&-``) lead nowhere, before a file gets its number; show unknown letters as ``\\xfc``."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115  for as long as the process lasts
        elif mode == "w" and getattr(stream, "errors", None) == "strict" and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def show(text: str) -> None:
    """Write what a command was asked for to stdout: also with ``-q``.

    Raises:
        OSError: it cannot be written; not where the reader has gone (``| head``).
    """
    open_streams()
    try:
        sys.stdout.write(text.rstrip("\n") + "\n")
        sys.stdout.flush()
    except OSError as error:
        _abandon()
        if error.errno != errno.EPIPE:
            raise


def _abandon() -> None:
    """Let stdout lead nowhere, so that what Python still holds is not written, and does not fail, again."""
    with suppress(OSError, ValueError, AttributeError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


class TerminalHandler(logging.StreamHandler):
    """Writes to whatever ``sys.stdout`` is at the moment of the message, for as long as that can be written."""

    def __init__(self) -> None:
        super().__init__(sys.stdout)

    @property
    def stream(self) -> Any:
        """What is ``sys.stdout`` now."""
        return sys.stdout

    @stream.setter
    def stream(self, value: Any) -> None:
        pass

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802  logging's name
        """A reader that has gone (``| head``) or a full disk (``> log.txt``) ends what is shown, not the run."""
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
            return
        _abandon()
        if error.errno != errno.EPIPE:
            with suppress(OSError):
                sys.stderr.write(
                    f"Warning: stdout cannot be written ({error.strerror}); nothing more is shown there.\n"
                )
