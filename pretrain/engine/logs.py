"""What a run tells: the log file, ``metrics.jsonl``, TensorBoard where it is installed, and ``progress.png``."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from logging.handlers import MemoryHandler
from pathlib import Path
from typing import Any

from nnssl.files import write_atomic

__all__ = ["RunLog", "add_log_file", "keep_lines", "plot_progress"]

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
    path = folder / f"training_log_{now.year}_{now.month}_{now.day}_{now.hour:02}_{now.minute:02}_{now.second:02}.txt"
    handler = logging.FileHandler(path, encoding="utf-8")
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
        history: epoch rows of the part of the run that is being continued.
    """

    def __init__(self, folder: Path | None, history: list[dict[str, Any]] | None = None) -> None:
        self.folder = folder
        self.history = list(history or [])
        self.panels: list[Callable[[Any], None]] = []
        self._tensorboard = _tensorboard(folder)

    def event(self, kind: str, **values: Any) -> None:
        """Append one line ``{"event": kind, "time": ..., ...}``."""
        if self.folder is None:
            return
        row = {"event": kind, "time": round(time.time(), 3), **{k: _plain(v) for k, v in values.items()}}
        with open(self.folder / "metrics.jsonl", "a", encoding="utf-8") as f:
            f.write(json.dumps(row) + "\n")
        if self._tensorboard is not None and "step" in values:
            for key, value in row.items():
                if isinstance(value, (int, float)) and key not in ("step", "time", "epoch"):
                    self._tensorboard.add_scalar(f"{kind}/{key}", value, values["step"])

    def epoch(self, row: dict[str, Any]) -> None:
        """Record an epoch's row."""
        self.history.append({k: _plain(v) for k, v in row.items()})
        self.event("epoch", **row)

    def draw(self) -> None:
        """Redraw ``progress.png``."""
        if self.folder is not None and self.history:
            plot_progress(self.history, self.folder / "progress.png", self.panels)

    def close(self) -> None:
        """Flush TensorBoard."""
        if self._tensorboard is not None:
            self._tensorboard.close()


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.7g}") if math.isfinite(value) else None
    return value


def _tensorboard(folder: Path | None) -> Any:
    if folder is None:
        return None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder / "tensorboard"))


def plot_progress(history: list[dict[str, Any]], path: Path, panels: Sequence[Callable[[Any], None]] = ()) -> None:
    """Draw losses, diagnostics of the embedding, learning rate and speed over epochs.

    Args:
        history: epoch rows; keys ``train/*`` and ``held_out/*`` are losses and diagnostics by term; a term
            ``x_collapse`` is a level drawn beside ``x``.
        path: the PNG.
        panels: draw more, each into an axis of its own.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    epochs = [r["epoch"] for r in history]
    terms = [k.split("/", 1)[1] for k in history[-1] if k.startswith("train/")]
    levels = {t for t in terms if t.endswith("_collapse")}
    terms = ["total"] + [t for t in terms if t != "total" and t not in levels]
    rows = math.ceil((len(terms) + 3 + len(panels)) / 3)
    figure = Figure(figsize=(18, 3.2 * rows))
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, 3, squeeze=False).ravel()
    for ax, term in zip(axes, terms):
        _line(ax, epochs, [r.get(f"train/{term}") for r in history], "training")
        _line(ax, epochs, [r.get(f"held_out/{term}") for r in history], "held out")
        if f"{term}_collapse" in levels:
            level = [r.get(f"train/{term}_collapse") for r in history]
            _line(ax, epochs, level, "all embeddings alike", "grey", style="--")
        ax.set_title(term)
    used = len(terms)
    extra = {
        "learning rate and gradient norm": ("lr", "grad_norm"),
        "embedding of held-out crops": ("embedding_sd", "effective_rank"),
        "seconds per step, share waiting for data": ("step_s", "data_wait"),
    }
    for ax, (title, keys) in zip(axes[used:], extra.items()):
        twin = ax.twinx()
        for a, key, colour in ((ax, keys[0], "C0"), (twin, keys[1], "C1")):
            _line(a, epochs, [r.get(key) for r in history], key, colour)
            a.set_ylabel(key, color=colour)
        ax.set_title(title)
    shown = used + len(extra) + len(panels)
    for ax, panel in zip(axes[used + len(extra) :], panels):
        panel(ax)
    for ax in axes[shown:]:
        ax.axis("off")
    for ax in axes[:shown]:
        ax.set_xlabel("epoch")
        ax.grid(alpha=0.3)
        if ax.get_legend_handles_labels()[0]:
            ax.legend(fontsize=8)
    figure.tight_layout()
    write_atomic(path, lambda file: figure.savefig(file, format="png", dpi=70))


def _line(ax: Any, x: list[int], y: list[Any], label: str, colour: str | None = None, style: str = "-") -> None:
    points = [(a, b) for a, b in zip(x, y) if b is not None]
    if points:
        ax.plot(*zip(*points), label=label, color=colour, linestyle=style, marker="." if len(points) < 40 else None)
