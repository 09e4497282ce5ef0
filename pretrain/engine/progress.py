"""``progress.png``: at most six panels that a person needs; ``progress_details.png``: every logged number by its name."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from nnssl.pictures import new_figure, write_png
from nnssl.pretrain.engine.pictures import wrapped
from nnssl.pretrain.types import Curve, Level

MOST_PANELS = 6
DPI = 80
HELD_OUT, TRAINING = "#1f5fa8", "#e0892b"
_WITHOUT_PREFIX = ("embedding_sd", "effective_rank")
_COLOURS = (HELD_OUT, "#b5402f", "#3a8f4d", "#7d4ba0")

PLACE = Curve(
    "Does it look at the image?",
    "variance of the features that the\nposition inside the crop explains (%)",
    {"place_crops": "on held-out images", "place_noise": "on pure noise"},
    hint="if both rise far, it counts voxels from the edge",
    percent=True,
)
"""For any method: the diagnostics of :mod:`nnssl.pretrain.engine.place`."""

SPREAD = Curve(
    "Are images told apart?",
    "spread of the images' descriptions\n(1: evenly spread, 0: all alike)",
    {"embedding_sd": "held-out images"},
    levels=(Level("", "all images look the same to the network", 0.0),),
    hint="must stay clearly above 0",
)
"""For methods that describe each image by a vector."""

Rows = Sequence[Mapping[str, Any]]
Panel = Callable[[Any], None]


def plot_progress(
    history: Rows,
    path: Path,
    curves: Sequence[Curve] = (),
    panels: Sequence[Panel] = (),
    *,
    first: Mapping[str, float] | None = None,
    title: str = "",
    sentence: str = "",
) -> None:
    """Draw the method's curves that have values, then what hooks draw, then :data:`PLACE` and :data:`SPREAD`: the first six.

    ``history``: epoch rows, whose keys ``train/*`` and ``held_out/*`` are terms; ``first``: held-out terms before the first step,
    drawn at epoch 0; ``sentence``: what the method itself says of the run so far.
    """
    start = {k if k in _WITHOUT_PREFIX else f"held_out/{k}": v for k, v in (first or {}).items()}
    rows: list[Mapping[str, Any]] = [{"epoch": 0, **start}] if first else []
    rows += history
    drawn = [*_panels(curves, rows), *panels, *_panels((PLACE, SPREAD), rows)][:MOST_PANELS]
    across = min(3, len(drawn)) if len(drawn) != 4 else 2
    down = math.ceil(len(drawn) / across)
    width = 5.2 * across
    above, below = wrapped(title, width - 0.4, 13, dpi=DPI, bold=True), wrapped(sentence, width - 0.4, 10.5, dpi=DPI)
    height = 4.0 * down + 0.25 * len(above) + 0.2 * len(below) + 0.3
    figure = new_figure(width, height, facecolor="white")
    axes = figure.subplots(down, across, squeeze=False).ravel()
    for ax, panel in zip(axes, drawn):
        panel(ax)
        _finish(ax)
    for ax in axes[len(drawn) :]:
        ax.axis("off")
    bottom, top = (0.2 * len(below) + 0.15) / height, 1 - (0.25 * len(above) + 0.1) / height
    figure.tight_layout(rect=(0, bottom, 1, top), h_pad=2.0, w_pad=2.0)
    if above:
        figure.text(0.5, 1 - 0.1 / height, "\n".join(above), ha="center", va="top", fontsize=13, fontweight="bold")
    if below:
        figure.text(0.2 / width, 0.1 / height, "\n".join(below), ha="left", va="bottom", fontsize=10.5)
    write_png(path, figure, DPI)


def plot_details(history: Rows, path: Path) -> None:
    """Draw every logged number over epochs by its name in ``metrics.jsonl``; ``train/x`` and ``held_out/x`` share a panel."""
    from matplotlib.ticker import MaxNLocator

    names = list(dict.fromkeys(_plain_name(k) for row in history for k, v in row.items() if _number(v)))
    names = [n for n in names if n not in ("epoch", "step")]
    across = 4
    figure = new_figure(17, 2.9 * math.ceil(len(names) / across), facecolor="white")
    axes = figure.subplots(math.ceil(len(names) / across), across, squeeze=False).ravel()
    for ax, name in zip(axes, names):
        kinds = (("train/", "training", TRAINING), ("held_out/", "held out", HELD_OUT), ("", None, "0.3"))
        for prefix, label, colour in kinds:
            _line(ax, history, prefix + name, label=label, color=colour, linewidth=1.5)
        ax.set_title(name, fontsize=10)
        ax.set_xlabel("epoch", fontsize=8)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8, min_n_ticks=1))
        ax.grid(alpha=0.3)
        if ax.get_legend_handles_labels()[0]:
            ax.legend(fontsize=7)
    for ax in axes[len(names) :]:
        ax.axis("off")
    figure.tight_layout()
    write_png(path, figure, 65)


def _plain_name(key: str) -> str:
    return key.removeprefix("train/").removeprefix("held_out/")


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _key(rows: Rows, term: str) -> str | None:
    """Where a term stands in the rows, held out before training."""
    keys = (f"held_out/{term}", term, f"train/{term}")
    return next((k for k in keys if any(_number(r.get(k)) for r in rows)), None)


def _panels(curves: Sequence[Curve], rows: Rows) -> list[Panel]:
    """Of the curves that have any value."""
    return [partial(_draw, c, rows) for c in curves if any(_key(rows, term) for term in c.lines)]


def _draw(curve: Curve, rows: Rows, ax: Any) -> None:
    scale = 100.0 if curve.percent else 1.0
    for i, (term, label) in enumerate(curve.lines.items()):
        key = _key(rows, term)
        if key is None:
            continue
        if len(curve.lines) > 1 or not key.startswith(("held_out/", "train/")):
            _line(ax, rows, key, scale=scale, label=label, color=_COLOURS[i % len(_COLOURS)], linewidth=2.2)
            continue
        learnt_from, thin = "cases that it learns from", 1.4
        if key.startswith("train/"):
            learnt_from, thin = f"{learnt_from} (not measured on others)", 2.4
        _line(ax, rows, f"train/{term}", scale=scale, label=learnt_from, color=TRAINING, linewidth=thin)
        if key.startswith("held_out/"):
            _line(ax, rows, key, scale=scale, label="held-out cases", color=HELD_OUT, linewidth=2.4)
    for level, style in zip(curve.levels, ("--", ":", "-.")):
        _level(ax, rows, level, style, scale)
    if curve.percent:
        ax.set_ylim(0.0, min(103.0, max(20.0, 1.1 * ax.get_ylim()[1])))
    ax.set_ylabel(curve.unit, fontsize=9)
    ax.set_title(curve.title, fontsize=11.5, fontweight="bold", pad=20 if curve.hint else 8)
    if curve.hint:
        ax.text(0.5, 1.02, curve.hint, transform=ax.transAxes, ha="center", va="bottom", fontsize=9, color="0.3")


def _level(ax: Any, rows: Rows, level: Level, linestyle: str, scale: float) -> None:
    style = {"label": level.label, "color": "0.35", "linestyle": linestyle, "linewidth": 1.5}
    if not level.term:
        ax.axhline(level.factor * scale, **style)
        return
    key = _key(rows, level.term)
    if key is not None:
        _line(ax, rows, key, scale=scale * level.factor, marked=False, **style)


def _line(ax: Any, rows: Rows, key: str, *, scale: float = 1.0, marked: bool = True, **style: Any) -> None:
    """A curve of one number; ``style``: matplotlib's."""
    points = [(r["epoch"], r[key] * scale) for r in rows if _number(r.get(key))]
    if len(points) == 1 and not marked:
        ax.axhline(points[0][1], **style)
    elif points:
        ax.plot(*zip(*points), marker="." if marked and len(points) < 40 else None, **style)


def _finish(ax: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    ax.set_xlabel("epoch (0: before training)" if ax.get_xlim()[0] < 0.5 else "epoch", fontsize=9)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8, min_n_ticks=1))
    ax.tick_params(labelsize=8.5)
    ax.grid(alpha=0.3)
    ax.spines[["top", "right"]].set_visible(False)
    if ax.get_legend_handles_labels()[0]:
        ax.legend(fontsize=8, framealpha=0.85)
