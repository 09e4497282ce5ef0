"""Reconstruction error of hidden voxels, in float32, over voxels that are hidden *and* valid."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nnssl.amp import at_least_float32
from nnssl.distributed import mean_over_ranks
from nnssl.masking.baselines import block_means

BLOCK_EPS = 0.05**2
"""Added to the variance of a block, in z-score units: 1e-6 (SparK, MAE) would blow the noise of air up to SD 1."""


def masked_error(prediction: Tensor, target: Tensor, region: Tensor, *, kind: str = "mse") -> Tensor:
    """``sum_{u in R} |y_u - v_u|^p / |R|`` over voxels and channels; p is 2 for ``"mse"``, 1 for ``"l1"``. In float32.

    R is ``region`` where the target is finite. Its size is averaged over ranks, so that the mean of all ranks' losses is
    the loss of the whole batch. 0, with zero gradients, where R is empty.

    Args:
        prediction: ``(B, C, *size)``, any floating type.
        target: ``(B, C, *size)``; what lies outside of R does not matter.
        region: ``(B, 1 or C, *size)`` bool, hidden and valid voxels.
    """
    if kind not in ("mse", "l1"):
        raise ValueError(f"kind must be 'mse' or 'l1', not '{kind}'")
    with torch.autocast(prediction.device.type, enabled=False):
        prediction, target = at_least_float32(prediction), at_least_float32(target)
        region = region & torch.isfinite(target)
        difference = torch.where(region, prediction - torch.where(region, target, 0.0), 0.0)
        error = difference.square() if kind == "mse" else difference.abs()
        count = mean_over_ranks(region.sum().to(error.dtype))
        return error.sum() / torch.where(count > 0, count, 1.0)


def block_statistics(x: Tensor, region: Tensor, block: Sequence[int], eps: float = BLOCK_EPS) -> tuple[Tensor, Tensor]:
    """Mean and ``sqrt(variance + eps)`` of each block of ``(B, C, *size)`` over ``region``, at its voxels."""
    x = at_least_float32(x)
    mean = block_means(x, region, block)
    return mean, (block_means((x - mean).square(), region, block) + eps).sqrt()
