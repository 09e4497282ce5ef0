"""The pictures of the report: Dice over labels with bands, and training curves. PNG for documents, SVG for the page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from nnssl.experiments.scores import Key, Scores, label_order
from nnssl.experiments.statistics import seed_means
from nnssl.experiments.summary import curves_of, mean_curve
from nnssl.experiments.tables import labels_text, means
from nnssl.files import write_atomic
from nnssl.pictures import new_figure, write_png

# Okabe and Ito's colours, which colour-blind readers can tell apart; the baseline is grey.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f5f3f", "#7a5fc0")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
GREY = "#5a5f66"
STYLE: Any = {
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.edgecolor": "#8a9099",
    "axes.labelcolor": "#2b2f36",
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e7eb",
    "grid.linewidth": 0.8,
    "xtick.color": "#4a4f57",
    "ytick.color": "#4a4f57",
    "legend.frameon": False,
    "svg.hashsalt": "nnssl",
    "svg.fonttype": "path",
}


def colour_of(method: str, methods: Sequence[str]) -> tuple[str, str]:
    """Colour and marker of a method, the same in every picture of a report; the first, the baseline, is grey."""
    i = list(methods).index(method)
    if i == 0:
        return GREY, MARKERS[0]
    again, colour = divmod(i - 1, len(COLOURS))  # a colour that comes again has another marker
    return COLOURS[colour], MARKERS[(i + again) % len(MARKERS)]


def save(figure: Any, stem: Path) -> Path:
    """Write ``stem.png`` (160 dpi) and ``stem.svg`` (the same bytes for the same data); returns the latter."""
    from matplotlib import rc_context

    svg = stem.with_suffix(".svg")
    with rc_context(STYLE):
        write_png(stem.with_suffix(".png"), figure, 160, facecolor="white", metadata={"Software": None})
        how: dict[str, Any] = {"format": "svg", "facecolor": "white", "metadata": {"Date": None, "Creator": None}}
        write_atomic(svg, lambda file: figure.savefig(file, **how))
    return svg


def dice_over_labels(scores: Scores, rows: pd.DataFrame, setting: str) -> Any | None:
    """Mean Dice of each method over the number of labels (log axis), a band of one deviation over seeds, and each seed as a dot;
    None where there is nothing to draw yet."""
    from matplotlib import rc_context

    own = means(rows[(rows["setting"] == setting) & rows["measured"]])
    own = own[own["labels"].map(lambda n: isinstance(n, int)).astype(bool)]
    counts = sorted(own["labels"].unique())
    if own.empty:
        return None
    methods = scores.methods(setting)
    with rc_context(STYLE):
        figure = new_figure(6.4, 3.9, layout="constrained")
        axis = figure.subplots()
        for i, (method, of) in enumerate(own.groupby("method", sort=False)):
            colour, marker = colour_of(method, methods)
            x, mean, sd = (of[column].to_numpy(dtype=float) for column in ("labels", "dice", "dice_sd"))
            axis.plot(x, mean, color=colour, marker=marker, ms=5.5, lw=1.8, label=method, zorder=3 + (i > 0))
            axis.fill_between(x, mean - np.nan_to_num(sd), mean + np.nan_to_num(sd), color=colour, alpha=0.13, lw=0)
            for n in of["labels"]:
                dots = 100 * seed_means(scores.cells[Key(setting, method, n)]["dice"])
                axis.scatter(
                    np.full(len(dots), n * 1.012 ** (i - len(methods) / 2)), dots, s=9, color=colour, alpha=0.55, lw=0
                )
        axis.set_xscale("log", base=2)
        axis.set_xticks(counts, [str(n) for n in counts])
        axis.minorticks_off()
        if len(counts) == 1:
            axis.set_xlim(counts[0] / 2, counts[0] * 2)
        axis.set_xlabel("labelled cases (log scale)")
        axis.set_ylabel("Dice, %")
        axis.legend(loc="best", ncols=2 if len(methods) > 4 else 1)
    return figure


def training_curves(curves: pd.DataFrame, setting: str, methods: Sequence[str]) -> Any | None:
    """Pseudo Dice over epochs, one panel per number of labels: the mean over runs up to the last epoch that all of them have
    reached, and their range as a band; None without curves."""
    from matplotlib import rc_context
    from matplotlib.ticker import MaxNLocator

    cells = curves.index.to_frame()
    counts = sorted(set(cells["labels"][cells["setting"] == setting]), key=label_order)
    if not counts:
        return None
    with rc_context(STYLE):
        figure = new_figure(max(6.4, 3.2 * min(len(counts), 4)), 3.3, layout="constrained")
        axes = figure.subplots(1, len(counts), squeeze=False)[0]
        for axis, labels in zip(axes, counts):
            for method in methods:
                runs = 100 * curves_of(curves, Key(setting, method, labels))
                mean = mean_curve(runs)
                if not len(mean):
                    continue
                colour, _ = colour_of(method, methods)
                x = np.arange(1, len(mean) + 1)
                axis.plot(x, mean, color=colour, lw=1.6, label=method, zorder=3, marker="o" if len(x) == 1 else None)
                if len(runs) > 1:
                    piece = runs[mean.index]
                    axis.fill_between(x, piece.min(), piece.max(), color=colour, alpha=0.12, lw=0)
            axis.set_title(labels_text(labels))
            axis.set_xlabel("epoch")
            axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes[0].set_ylabel("pseudo Dice, %")
        axes[0].legend(loc="best", fontsize=8.5)
        low, high = min(axis.get_ylim()[0] for axis in axes), max(axis.get_ylim()[1] for axis in axes)
        for axis in axes:
            axis.set_ylim(max(0.0, low), min(100.0, high))
    return figure
