"""Columns of ``views_epoch_*.png``: patches with labels beside pseudo-labels."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

LABELS, PSEUDO = "a labelled held-out case: the expert's labels", "the same case: labels that the network makes"

_COLOURS = np.array(
    [
        [0.90, 0.35, 0.25],
        [0.25, 0.60, 0.90],
        [0.35, 0.75, 0.35],
        [0.95, 0.75, 0.20],
        [0.65, 0.40, 0.80],
        [0.30, 0.75, 0.75],
    ]
)


def omni_columns(data: Tensor, label: Tensor, made: Tensor, rows: int = 4) -> dict[str, np.ndarray]:
    """Slices ``(rows, H, W, 3)`` with most labelled voxels: the labels, and the pseudo-labels, over the image."""
    label, made, data = label[:rows], made[:rows], data[:rows, 0].float()
    if data.ndim == 4:
        best = (label[:, 0] > 0).flatten(2).sum(2).argmax(1)
        at = torch.arange(len(data), device=data.device), best
        image, labels, pseudo = data[at], label[:, 0][at], made[:, 0][at]
    else:
        image, labels, pseudo = data, label[:, 0], made[:, 0]
    grey = image.cpu().numpy()
    low, high = np.percentile(grey, (0.5, 99.5))
    grey = np.clip((grey - low) / max(high - low, 1e-6), 0, 1)
    return {LABELS: _over(grey, labels.cpu().numpy()), PSEUDO: _over(grey, pseudo.cpu().numpy())}


def dice_tags(label: Tensor, made: Tensor, rows: int = 4) -> list[str]:
    """Dice of all labels taken as one, over the whole patch: ``(B, 1, *size)`` integers -> a text for each row."""
    a, b = (x[:rows].flatten(1) > 0 for x in (label, made))
    both, all_ = (a & b).sum(1).tolist(), (a.sum(1) + b.sum(1)).tolist()
    return [f"Dice {2 * n / m:.2f}" if m else "nothing labelled" for n, m in zip(both, all_)]


def _over(grey: np.ndarray, label: np.ndarray) -> np.ndarray:
    rgb = np.repeat(grey[..., None], 3, -1)
    colour = _COLOURS[(label - 1) % len(_COLOURS)]
    return np.where(label[..., None] > 0, 0.55 * rgb + 0.45 * colour, rgb)
