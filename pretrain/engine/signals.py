"""SIGTERM, SIGHUP and Ctrl-C ask the loop to save and end; a second Ctrl-C interrupts at once."""

from __future__ import annotations

import os
import signal
import threading
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Any

SIGNALS = ("SIGTERM", "SIGINT", "SIGHUP")

LAUNCHER = "NNSSL_LAUNCHER"
"""Variable with the process number of the launcher, in the processes that it has started."""

_asked = threading.Event()


def asked_to_stop() -> bool:
    """Whether the loop of this process is ending because of a signal."""
    return _asked.is_set()


def _answer() -> None:
    """Tell whoever pressed Ctrl-C that it was heard; straight to the terminal, since a stream may be at work when it comes."""
    if os.environ.get("RANK", "0") == "0":
        with suppress(OSError):
            if os.isatty(2):
                os.write(2, b"\nStopping: a checkpoint is saved first. Ctrl-C again ends at once, without it.\n")


class StopSignals:
    """While entered, remembers that a signal asked the run to end.

    A second Ctrl-C raises KeyboardInterrupt. Processes of a launcher hear of it as SIGTERM after SIGINT; a second SIGINT is there
    the first one again, which a scheduler has sent to every process.

    Attributes:
        received: whether one came.
        name, number: the first.
    """

    def __init__(self) -> None:
        self.received = False
        self.name = ""
        self.number = 0
        self._old: dict[int, Any] = {}

    @property
    def spoken(self) -> str:
        """The first one as a person knows it."""
        return "Ctrl-C" if self.number == signal.SIGINT else self.name

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received:
            if self._interrupts(number):
                raise KeyboardInterrupt
            return
        self.received, self.number, self.name = True, number, signal.Signals(number).name
        _asked.set()
        if number == signal.SIGINT:
            _answer()

    def _interrupts(self, number: int) -> bool:
        if LAUNCHER in os.environ:
            return (self.number, number) == (signal.SIGINT, signal.SIGTERM)
        return number == signal.SIGINT

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for name in SIGNALS:
                number = getattr(signal, name, None)  # Windows has no SIGHUP
                ignored = (
                    name == "SIGHUP" and number is not None and signal.getsignal(number) is signal.SIG_IGN
                )  # nohup
                if number is not None and not ignored:
                    self._old[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)
        _asked.clear()
