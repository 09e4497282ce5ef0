"""How far teacher and student agree on images without labels, and how much foreground they give: measured each epoch, drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

COLLAPSE = 0.1
"""Pseudo-labels with less than this share of the labelled patches' foreground are called collapsed."""


def overlap_sums(made: Tensor, own: Tensor, truth: Tensor) -> Tensor:
    """Of one batch, to be added up: overlap and sizes of teacher's and student's foreground, and voxels of both halves.

    ``made`` and ``own`` are the teacher's and the student's labels of the same patches, ``truth`` is the labelled patches'
    foreground (bool); all ``(B, 1, *size)``. Gives ``(6,)`` float64.
    """
    same = ((made == own) & (made > 0)).sum()
    sums = torch.stack([2 * same, (made > 0).sum() + (own > 0).sum(), (made > 0).sum(), truth.sum()]).double()
    sizes = torch.tensor([made.numel(), truth.numel()], dtype=torch.float64, device=sums.device)
    return torch.cat([sums, sizes])


def trace_row(epoch: int, sums: Tensor) -> dict[str, Any]:
    """What the sums of an epoch say: Dice between teacher and student, and both shares of foreground."""
    same, both, made, truth, voxels, labelled = sums.tolist()
    return {
        "epoch": epoch,
        "agreement": same / both if both else 1.0,
        "foreground": made / voxels,
        "labelled_foreground": truth / max(1.0, labelled),
    }


def trace_lines(row: Mapping[str, Any]) -> list[str]:
    """A row in words, with a warning where the pseudo-labels have collapsed."""
    lines = [
        f"teacher and student agree on the pool by Dice {row['agreement']:.3f}; foreground "
        f"{100 * row['foreground']:.2f} % of the pool, {100 * row['labelled_foreground']:.2f} % of the labelled patches"
    ]
    if row["foreground"] < COLLAPSE * row["labelled_foreground"]:
        lines.append(
            "WARNING: the teacher gives almost no foreground: pseudo-labels have collapsed. The first stage may have been too "
            "short, or the pool may show something else than the labelled cases."
        )
    return lines


def draw_trace(trace: Sequence[Mapping[str, Any]], ax: Any) -> None:
    """Draw the rows of :func:`trace_row` into matplotlib's axes."""
    from matplotlib.ticker import MaxNLocator

    epochs = [row["epoch"] for row in trace]
    label = "teacher and student, on images without labels"
    ax.plot(epochs, [row["agreement"] for row in trace], "b", linewidth=4, label=label)
    ax.set_ylim(0, 1)
    ax.set_xlabel("epoch", fontsize=30)
    ax.set_ylabel("Dice between them", fontsize=30)
    right = ax.twinx()
    right.plot(epochs, [100 * r["foreground"] for r in trace], "g", linewidth=4, label="pseudo-labels")
    right.plot(epochs, [100 * r["labelled_foreground"] for r in trace], "g--", linewidth=4, label="labels")
    right.set_ylim(bottom=0)
    right.set_ylabel("foreground [% of voxels]", fontsize=30)
    for axis in (ax, right):
        axis.tick_params(labelsize=28)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    ax.legend(fontsize=26, loc="lower left", bbox_to_anchor=(0, 1))  # above, as nnU-Net's own: no curve is hidden
    right.legend(fontsize=26, loc="lower right", bbox_to_anchor=(1, 1), ncol=2)
