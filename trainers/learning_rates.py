"""The learning rates that were applied, by group: kept beside nnU-Net's log, whose keys are fixed, and drawn below its figure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from nnssl.files import write_atomic
from nnssl.parts import Part
from nnssl.pictures import new_figure
from nnssl.trainers.schedule import LearningRates

MOST_POINTS = 2000
"""Steps of a training at which its rates are drawn, beside the first of each epoch."""


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
    kinds: dict[str, list[int]] = {}
    for name in names:
        part = Part(name)
        kinds.setdefault(name if part.stage is None else part.kind, []).extend(
            [] if part.stage is None else [part.stage]
        )
    return ", ".join(
        kind if not n else f"{kind} stage {n[0]}" if len(n) == 1 else f"{kind} stages {n[0]}-{n[-1]}"
        for kind, n in kinds.items()
    )


def describe_rates(rates: Mapping[str, float]) -> str:
    """One line for the log: ``"seg_layers 0.0003, encoder stages 5-0 frozen"``."""
    return ", ".join(f"{name} {f'{lr:.4g}' if lr else 'frozen'}" for name, lr in merge_names(rates).items())


def draw_below(path: Path, draw: Callable[[Any], None]) -> None:
    """Add a panel to the bottom of a PNG that has been written; ``draw`` draws into matplotlib's axes."""
    from PIL import Image

    above = Image.open(path).convert("RGB")
    dpi = 100
    figure = new_figure(above.width / dpi, 14, dpi=dpi)
    draw(figure.subplots())
    figure.tight_layout()
    canvas = figure.canvas
    canvas.draw()
    below = Image.frombuffer("RGBA", canvas.get_width_height(), canvas.buffer_rgba()).convert("RGB")
    whole = Image.new("RGB", (above.width, above.height + below.height), "white")
    whole.paste(above, (0, 0))
    whole.paste(below, (0, above.height))
    write_atomic(path, lambda file: whole.save(file, format="png", compress_level=2))


def draw_rates(rates: LearningRates, epochs: int, ax: Any) -> None:
    """Draw each group's learning rate step by step, as they are set; what comes after the ``epochs`` that are done is thin."""
    each, steps = rates.figures.iterations, rates.figures.steps
    stride = max(1, steps // MOST_POINTS)
    at = sorted({*range(0, steps, stride), *range(0, steps, each), steps - 1})
    curves = {name: tuple(rates.at(step, name) for step in at) for name in rates.groups}
    x, done = [step / each for step in at] + [steps / each], sum(step < epochs * each for step in at)
    for i, (name, values) in enumerate(merge_names(curves).items()):
        y, line = [*values, values[-1]], {"drawstyle": "steps-post", "color": f"C{i % 10}"}
        ax.plot(x[: done + 1], y[: done + 1], linewidth=4, label=name if any(values) else f"{name} (frozen)", **line)
        ax.plot(x[done:], y[done:], linewidth=1.5, linestyle="--", **line)
    ax.axvline(epochs, color="0.6", linewidth=2)
    ax.set_xlabel(f"epoch (of {each} optimiser steps; dashed: still to come)", fontsize=30)
    ax.set_ylabel("learning rate of each part", fontsize=30)
    ax.tick_params(labelsize=28)
    ax.yaxis.get_offset_text().set_fontsize(28)
    ax.grid(alpha=0.4)
    ax.legend(fontsize=26)
