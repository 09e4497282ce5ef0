"""SIGTERM, SIGHUP and Ctrl-C ask the loop to save and end; a second Ctrl-C interrupts at once."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

SIGNALS = ("SIGTERM", "SIGINT", "SIGHUP")

LAUNCHER = "NNSSL_LAUNCHER"
"""Variable with the process number of the launcher, in the processes that it has started."""

_asked = threading.Event()


def asked_to_stop() -> bool:
    """Whether the loop of this process is ending because of a signal."""
    return _asked.is_set()


@contextmanager
def on_signals(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Within, the main thread's :data:`SIGNALS` go to ``handler``; a SIGHUP that is ignored (nohup) stays so."""
    old: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for name in SIGNALS:
            number = getattr(signal, name, None)  # Windows has no SIGHUP
            if number is not None and not (name == "SIGHUP" and signal.getsignal(number) is signal.SIG_IGN):
                old[number] = signal.signal(number, handler)
    try:
        yield
    finally:
        for number, before in old.items():
            signal.signal(number, before)


def _answer() -> None:
    """Tell whoever pressed Ctrl-C that it was heard; straight to the terminal, since a stream may be at work when it comes."""
    if os.environ.get("RANK", "0") == "0":
        with suppress(OSError):
            if os.isatty(2):
                os.write(2, b"\nStopping: a checkpoint is saved first. Ctrl-C again ends at once, without it.\n")


class StopSignals:
    """While entered, remembers that a signal asked the run to end: ``number`` is that of the first, 0 before.

    A second Ctrl-C raises KeyboardInterrupt. Processes of a launcher hear of it as SIGTERM after SIGINT; a second SIGINT is there
    the first one again, which a scheduler has sent to every process.
    """

    def __init__(self) -> None:
        self.number = 0
        self._within = on_signals(self._handle)

    @property
    def received(self) -> bool:
        """Whether one came."""
        return self.number != 0

    @property
    def spoken(self) -> str:
        """The first one as a person knows it."""
        if not self.received:
            return ""
        return "Ctrl-C" if self.number == signal.SIGINT else signal.Signals(self.number).name

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received:
            again = (signal.SIGINT, signal.SIGTERM) if LAUNCHER in os.environ else (self.number, signal.SIGINT)
            if (self.number, number) == again:
                raise KeyboardInterrupt
            return
        self.number = number
        _asked.set()
        if number == signal.SIGINT:
            _answer()

    def __enter__(self) -> StopSignals:
        self._within.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._within.__exit__(*error)
        _asked.clear()
