"""Columns that show a person what was hidden and what became of it."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from nnssl.masking.baselines import inpaint
from nnssl.words import per_cent

SHOWN = "what the network is shown (blue: hidden)"
PAINTED = "what it paints into the blue blocks"
REAL = "what was really there"
FILLED = "for comparison: smooth filling-in, nothing learnt"
ERROR = "where it errs: painted against real"

_BLUE = (0.15, 0.3, 0.6)


class MaskedPanel(NamedTuple):
    """What :func:`masked_panel` makes.

    Attributes:
        columns: caption -> ``(B, H, W)``, or ``(B, H, W, 3)`` for :data:`SHOWN`, in [0, 1] on each image's own scale.
        tags: for :data:`PAINTED` and :data:`FILLED` the mean error of each slice in words.
    """

    columns: dict[str, np.ndarray]
    tags: dict[str, list[str]]


def masked_panel(target: Tensor, prediction: Tensor, mask: Tensor, valid: Tensor) -> MaskedPanel:
    """Middle slices of the first channel: with blue blocks, reconstruction, the image, linear interpolation, the error."""
    guess = inpaint(target, valid & ~mask)
    images = [target, torch.where(mask, prediction, target), torch.where(mask, guess, target)]
    slices = [_slice(x)[:, 0].float() for x in images]
    low, high = (slices[0].flatten(1).quantile(q, 1).view(-1, 1, 1) for q in (0.005, 0.995))
    shown = [((x - low) / (high - low).clamp_min(1e-6)).clamp(0, 1) for x in slices]
    hidden, counted = _slice(mask)[:, 0], _slice(valid)[:, 0]
    region = hidden & counted
    errors = [torch.where(region, (x - shown[0]).abs(), 0.0) for x in shown[1:]]
    columns = {
        SHOWN: torch.where(hidden[..., None], torch.tensor(_BLUE, device=target.device), shown[0][..., None]),
        PAINTED: shown[1],
        REAL: shown[0],
        FILLED: shown[2],
        ERROR: errors[0],
    }
    means = [(e.flatten(1).sum(1) / region.flatten(1).sum(1).clamp_min(1)).tolist() for e in errors]
    tags = {c: [f"mean error {per_cent(m)} of the range" for m in mean] for c, mean in zip((PAINTED, FILLED), means)}
    return MaskedPanel({k: v.float().cpu().numpy() for k, v in columns.items()}, tags)


def _slice(x: Tensor) -> Tensor:
    return x if x.ndim == 4 else x[:, :, x.shape[2] // 2]
