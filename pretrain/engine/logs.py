"""What a run tells: the log file, ``metrics.jsonl``, the loggers that the user chose, and the pictures of the curves."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from datetime import datetime
from logging.handlers import MemoryHandler
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nnssl.journal import append_line
from nnssl.loggers import Logger, check_loggers, installed, logger_names
from nnssl.words import size_text

if TYPE_CHECKING:
    from nnssl.pretrain.engine.spec import RunSpec

log = logging.getLogger("nnssl")


@contextmanager
def keep_lines() -> Iterator[MemoryHandler]:
    """Within, what the ``nnssl`` logger says before a run has its log file is kept for :func:`add_log_file`."""
    kept = MemoryHandler(10_000, flushLevel=logging.CRITICAL + 1, flushOnClose=False)
    log.addHandler(kept)
    try:
        yield kept
    finally:
        log.removeHandler(kept)
        kept.close()


def add_log_file(folder: Path, said: MemoryHandler | None = None) -> logging.Handler:
    """Copy everything that the ``nnssl`` logger says into ``training_log_<time>.txt``, and first what ``said`` has kept."""
    now = datetime.now()
    path = folder / f"training_log_{now.year}_{now.month}_{now.day}_{now:%H_%M_%S}.txt"
    handler = logging.FileHandler(path, encoding="utf-8", errors="backslashreplace")  # names need not be UTF-8
    handler.setFormatter(logging.Formatter("%(asctime)s: %(message)s"))
    if said is not None:
        log.removeHandler(said)
        said.setTarget(handler)
        said.flush()
    log.addHandler(handler)
    return handler


class RunLog:
    """Appends events to ``metrics.jsonl`` and keeps the epoch rows, which the checkpoint carries.

    Args:
        folder: the run's folder, or None for a rank that only computes.
        loggers: get every number of an event that has a step, as ``kind/name``.
    """

    def __init__(self, folder: Path | None, loggers: Sequence[Logger] = ()) -> None:
        self.folder, self.loggers = folder, list(loggers)
        self.history: list[dict[str, Any]] = []

    def event(self, kind: str, **values: Any) -> None:
        """Append one line ``{"event": kind, "time": ..., ...}``."""
        if self.folder is None:
            return
        row = {"event": kind, "time": round(time.time(), 3), **{k: _plain(v) for k, v in values.items()}}
        append_line(self.folder / "metrics.jsonl", row)
        if self.loggers and "step" in values:
            names = [k for k, v in row.items() if isinstance(v, (int, float)) and k not in ("step", "time", "epoch")]
            for logger in self.loggers if names else ():
                logger.log({f"{kind}/{k}": row[k] for k in names}, values["step"])

    def epoch(self, row: dict[str, Any]) -> None:
        """Record an epoch's row."""
        self.history.append({k: _plain(v) for k, v in row.items()})
        self.event("epoch", **row)


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.7g}") if math.isfinite(value) else None
    return value


def choose_loggers(given: str | Sequence[str] | None) -> tuple[str, ...]:
    """Names of the run's loggers; TensorBoard where nothing is asked for and it is installed."""
    names = logger_names(given, default=("tensorboard",) if installed("tensorboard") else ())
    check_loggers(names)
    return names


def run_settings(spec: RunSpec) -> dict[str, Any]:
    """What loggers get of a run: numbers, and names of the method, the plan and the datasets; no case and no path."""
    keys = ("method", "dataset", "plans_name", "configuration", "epochs", "iterations", "batch_size", "seed")
    settings = {k: spec.identity[k] for k in keys}
    settings |= {"sources": " ".join(spec.identity["sources"]), "crop": size_text(spec.request.size)}
    settings |= {"cases": len(spec.case_set.train), "held_out_cases": len(spec.case_set.held_out)}
    return settings | {f"option/{f.name}": str(getattr(spec.config, f.name)) for f in fields(spec.config)}
