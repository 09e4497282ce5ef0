"""The learning rates that were applied, by group: kept beside nnU-Net's log, whose keys are fixed, and drawn below its figure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["describe_rates", "draw_below", "draw_rates", "merge_names"]

Row = Mapping[str, Any]


def merge_names(values: Mapping[str, Any]) -> dict[str, Any]:
    """Join neighbouring names that have the same value: ``{"a, b": value, "c": other}``, in their order."""
    merged: list[tuple[list[str], Any]] = []
    for name, value in values.items():
        if merged and merged[-1][1] == value:
            merged[-1][0].append(name)
        else:
            merged.append(([name], value))
    return {_join(names): value for names, value in merged}


def _join(names: Sequence[str]) -> str:
    """``"decoder stage 2, decoder stage 1"`` -> ``"decoder stages 2-1"``."""
    kinds: dict[str, list[str]] = {}
    for name in names:
        kind, stage, number = name.partition(" stage ")
        kinds.setdefault(kind, []).extend([number] if stage else [])
    return ", ".join(
        kind if not n else f"{kind} stage {n[0]}" if len(n) == 1 else f"{kind} stages {n[0]}-{n[-1]}"
        for kind, n in kinds.items()
    )


def describe_rates(rates: Mapping[str, float]) -> str:
    """One line for the log: ``"seg_layers 0.0003, encoder stages 5-0 frozen"``."""
    return ", ".join(f"{name} {f'{lr:.4g}' if lr else 'frozen'}" for name, lr in merge_names(rates).items())


def draw_rates(rows: Sequence[Row], path: Path) -> None:
    """Add a panel with each group's learning rate to the bottom of nnU-Net's ``progress.png``.

    Args:
        rows: one per epoch: ``{"epoch": int, "first": {group: lr}, "last": {group: lr}}``, the rates of its first and last step.
        path: the figure that nnU-Net has just drawn.
    """
    draw_below(path, lambda ax: _draw(rows, ax))


def draw_below(path: Path, draw: Callable[[Any], None]) -> None:
    """Add a panel to the bottom of a figure that has been written.

    Args:
        path: a PNG.
        draw: draws into matplotlib's axes.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from PIL import Image

    above = Image.open(path).convert("RGB")
    dpi = 100
    figure = Figure(figsize=(above.width / dpi, 14), dpi=dpi)
    canvas = FigureCanvasAgg(figure)
    ax = figure.subplots()
    draw(ax)
    figure.tight_layout()
    canvas.draw()
    below = Image.frombuffer("RGBA", canvas.get_width_height(), canvas.buffer_rgba()).convert("RGB")
    whole = Image.new("RGB", (above.width, above.height + below.height), "white")
    whole.paste(above, (0, 0))
    whole.paste(below, (0, above.height))
    temporary = path.with_name(f".{path.name}.tmp")
    whole.save(temporary, format="png", compress_level=2)
    temporary.replace(path)


def _draw(rows: Sequence[Row], ax: Any) -> None:
    x = [row["epoch"] + part for row in rows for part in (0.0, 0.99)]
    curves = {name: tuple(row[part][name] for row in rows for part in ("first", "last")) for name in rows[-1]["last"]}
    for name, values in merge_names(curves).items():
        ax.plot(x, values, linewidth=4, label=name if any(values) else f"{name} (frozen)")
    ax.set_xlabel("epoch", fontsize=30)
    ax.set_ylabel("learning rate by group", fontsize=30)
    ax.tick_params(labelsize=28)
    ax.yaxis.get_offset_text().set_fontsize(28)
    ax.grid(alpha=0.4)
    ax.legend(fontsize=26)
