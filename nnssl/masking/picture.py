"""Columns that show a person what was hidden and what became of it."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from nnssl.masking.baselines import inpaint

__all__ = ["masked_panel"]

_BLUE = (0.15, 0.3, 0.6)


def masked_panel(target: Tensor, prediction: Tensor, mask: Tensor, valid: Tensor) -> dict[str, np.ndarray]:
    """Middle slices of the first channel: view, view with blue blocks, reconstruction, its error, linear interpolation.

    Args:
        target, prediction: ``(B, C, *size)``.
        mask: ``(B, 1 or C, *size)`` bool, hidden.
        valid: ``(B, 1, *size)`` bool, where the error counts.

    Returns:
        caption -> ``(B, H, W)``, or ``(B, H, W, 3)`` for the blue one, in [0, 1] on each image's own scale.
    """
    guess = inpaint(target, valid & ~mask)
    images = [target, torch.where(mask, prediction, target), torch.where(mask, guess, target)]
    slices = [_slice(x[:, :1].float())[:, 0] for x in images]
    low, high = (slices[0].flatten(1).quantile(q, 1).view(-1, 1, 1) for q in (0.005, 0.995))
    shown = [((x - low) / (high - low).clamp_min(1e-6)).clamp(0, 1) for x in slices]
    hidden, counted = _slice(mask[:, :1])[:, 0], _slice(valid)[:, 0]
    columns = {
        "view": shown[0],
        "masked": torch.where(hidden[..., None], torch.tensor(_BLUE, device=target.device), shown[0][..., None]),
        "reconstruction": shown[1],
        "error": torch.where(hidden & counted, (shown[1] - shown[0]).abs(), 0.0),
        "interpolated": shown[2],
    }
    return {k: v.float().cpu().numpy() for k, v in columns.items()}


def _slice(x: Tensor) -> Tensor:
    return x if x.ndim == 4 else x[:, :, x.shape[2] // 2]
