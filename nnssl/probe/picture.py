"""The picture: cases in rows, networks in columns, the true outline and the one that a linear layer draws."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from nnssl.pictures import new_figure, png
from nnssl.probe.cases import Case
from nnssl.probe.result import Probe
from nnssl.probe.scores import best_slice
from nnssl.probe.verdict import Row
from nnssl.words import counted

TRUE = "#ffffff"
COLOURS = ("#ffb000", "#35d0e6", "#ff5a8a", "#8ce04a", "#b79bff", "#ff7a2f", "#4f9bff", "#f4f06a")
MOST_CASES = 3
MARGIN = 0.35


def choose_cases(found: Probe) -> list[str]:
    """The scored cases of lowest, middle and highest Dice, averaged over all networks; all where there are at most three."""
    names = found.setup.scored
    means = np.nan_to_num(np.stack([row.cases for row in found.rows])).mean(0)
    order = [names[i] for i in np.argsort(means, kind="stable")]
    return order if len(order) <= MOST_CASES else [order[0], order[len(order) // 2], order[-1]]


def _box(mask: np.ndarray, spacing: tuple[float, float]) -> tuple[slice, slice]:
    """A window around what is drawn, with a margin, equally wide in mm on both axes where the slice allows it."""
    where = np.argwhere(mask)
    if not len(where):
        return slice(None), slice(None)
    low, high = where.min(0), where.max(0) + 1
    side = max((high - low) * spacing) * (1 + 2 * MARGIN)
    out = []
    for axis in (0, 1):
        half, middle = side / spacing[axis] / 2, (low[axis] + high[axis]) / 2
        out.append(slice(max(0, math.floor(middle - half)), min(mask.shape[axis], math.ceil(middle + half))))
    return out[0], out[1]


def _outline(panel: Any, mask: np.ndarray, colour: str, width: float, style: str = "solid") -> None:
    if mask.any():
        rows, columns = mask.shape
        panel.contour(
            *np.meshgrid(np.arange(-1, columns + 1), np.arange(-1, rows + 1)),
            np.pad(mask, 1).astype(float),
            [0.5],
            colors=colour,
            linewidths=width,
            linestyles=style,
        )


def _panel(panel: Any, found: Probe, case: Case, masks: np.ndarray) -> None:
    classes, spacing = found.setup.classes, found.setup.plan.spacing
    pixel = spacing[-2], spacing[-1]
    z = best_slice(case, classes)
    image = np.asarray(case.image[0:1, z : z + 1], dtype=np.float32)[0, 0]
    true = classes.masks(case.labels[z])
    box = _box(np.asarray(true.any(0)), pixel)
    low, high = np.percentile(image[box], [1, 99.5])
    panel.imshow(image[box], cmap="gray", vmin=low, vmax=max(high, low + 1e-6), aspect=pixel[0] / pixel[1])
    for i in range(len(classes.names)):
        _outline(panel, masks[i][box], COLOURS[i % len(COLOURS)], 1.6)
        _outline(panel, true[i][box], TRUE, 1.0, "dashed")
    panel.set(xticks=[], yticks=[])


def draw(found: Probe) -> bytes:
    """The picture as PNG: a column each for random weights and every checkpoint, by layers on all encoder stages."""
    from matplotlib.lines import Line2D

    cases, columns = choose_cases(found), list(found.slices)
    encoder: dict[str, Row] = {row.name: row for row in found.rows if row.n_decoder == 0}
    scored, names = found.setup.scored, found.setup.classes.names
    figure = new_figure(max(6.0, 2.6 * len(columns)), 2.75 * len(cases) + 1.0, layout="constrained")
    axes = figure.subplots(len(cases), len(columns), squeeze=False)
    for line, name in zip(axes, cases):
        for panel, column in zip(line, columns):
            _panel(panel, found, found.setup.cases[name], found.slices[column][name])
            own = encoder[column].cases[scored.index(name)]
            # of random weights one initialisation is drawn, and the mean over all is told
            panel.set_xlabel(f"Dice {own:.1f}" if math.isfinite(own) else "no label here", fontsize=9)
        case = found.setup.cases[name]
        line[0].set_ylabel(
            f"{name}\nslice {best_slice(case, found.setup.classes) + 1} of {len(case.labels)}", fontsize=9
        )
    for panel, column in zip(axes[0], columns):
        panel.set_title(
            f"{column}\nmean Dice {encoder[column].mean:.1f} of {counted(len(scored), 'case')}", fontsize=10
        )
    keys = [Line2D([], [], color="0.4", linestyle="dashed", linewidth=1.0, label="true")]
    keys += [Line2D([], [], color=COLOURS[i % len(COLOURS)], linewidth=1.6, label=n) for i, n in enumerate(names[:8])]
    figure.legend(handles=keys, loc="outside lower center", ncols=min(len(keys), 5), fontsize=9, frameon=False)
    shown = "all scored cases" if len(cases) == len(scored) else "the cases of lowest, middle and highest Dice"
    figure.suptitle(
        f"What a linear layer on the frozen encoder finds\n{shown}, each at the slice with the largest labelled area",
        fontsize=10.5,
    )
    return png(figure, 110, metadata={"Software": None})
