"""What hidden blocks look like to somebody who has learnt nothing: baselines for a masked reconstruction error."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from nnssl.intensity import LINEAR
from nnssl.masking.blocks import block_sum, to_voxels

_POOL = {2: F.avg_pool2d, 3: F.avg_pool3d}


def block_means(x: Tensor, region: Tensor, block: Sequence[int]) -> Tensor:
    """Mean of each block over ``region``, at its voxels; 0 for blocks outside of it.

    For hidden blocks this is an oracle: the best that one number per block can do.

    Args:
        x: ``(B, C, *size)``.
        region: ``(B, 1 or C, *size)`` bool.
        block: voxels per axis.

    Returns:
        ``(B, C, *size)``.
    """
    total = block_sum(torch.where(region, x, 0.0), block)
    count = block_sum(region.expand_as(x).to(x.dtype), block)
    return to_voxels(total / count.clamp_min(1), block)


def surrounding_means(x: Tensor, visible: Tensor, block: Sequence[int]) -> Tensor:
    """Mean of the visible voxels in the 3x3(x3) blocks around each block, in more of them where none is visible there.

    Args:
        x: ``(B, C, *size)``.
        visible: ``(B, 1 or C, *size)`` bool.
        block: voxels per axis.

    Returns:
        ``(B, C, *size)``, constant in each block; 0 where nothing is visible in the whole crop.
    """
    total = block_sum(torch.where(visible, x, 0.0), block)
    count = block_sum(visible.expand_as(x).to(x.dtype), block)
    pool, grid = _POOL[len(block)], total.shape[2:]
    out, empty, radius = torch.zeros_like(total), torch.ones_like(total, dtype=torch.bool), 1
    while True:
        reach = [min(radius, n - 1) for n in grid]
        kernel, pad = [2 * r + 1 for r in reach], [r for r in reversed(reach) for _ in range(2)]
        near = pool(F.pad(count, pad), kernel, 1)
        found = empty & (near > 0)
        out = torch.where(found, pool(F.pad(total, pad), kernel, 1) / near.clamp_min(1e-12), out)
        empty = empty & ~found
        if all(r == n - 1 for r, n in zip(reach, grid)) or not bool(empty.any()):
            return to_voxels(out, block)
        radius *= 2


def inpaint(x: Tensor, visible: Tensor, smoothing: int = 32) -> Tensor:
    """Fill what is hidden by linear interpolation from what is visible.

    A pyramid of means of the visible voxels is filled from the top by linear up-sampling (push-pull, Gortler et al. 1996);
    on each level Jacobi steps move it towards the harmonic solution, which has no edges of its own.

    Args:
        x: ``(B, C, *size)``; hidden voxels may hold anything.
        visible: ``(B, 1 or C, *size)`` bool.
        smoothing: Jacobi steps per level.

    Returns:
        ``(B, C, *size)``, equal to ``x`` where visible.
    """
    visible = visible.expand_as(x)
    return _fill(torch.where(visible, x, 0.0), visible, smoothing)


def _fill(value: Tensor, known: Tensor, smoothing: int) -> Tensor:
    size = value.shape[2:]
    if all(n == 1 for n in size):
        return value
    step = [min(2, n) for n in size]
    pool = _POOL[len(size)]
    weight = pool(known.to(value.dtype), step, ceil_mode=True)
    coarse = pool(torch.where(known, value, 0.0), step, ceil_mode=True) / weight.clamp_min(1e-6)
    coarse = _fill(torch.where(weight > 0, coarse, 0.0), weight > 0, smoothing)
    out = torch.where(known, value, F.interpolate(coarse, size=size, mode=LINEAR[len(size)], align_corners=False))
    for _ in range(smoothing):
        out = torch.where(known, value, _neighbours(out))
    return out


def _neighbours(x: Tensor) -> Tensor:
    """Mean over the two neighbours on each axis; at the border the voxel itself stands for the missing one."""
    total = torch.zeros_like(x)
    for axis in range(2, x.ndim):
        n = x.shape[axis]
        first, last = x.narrow(axis, 0, 1), x.narrow(axis, n - 1, 1)
        total += torch.cat([first, x.narrow(axis, 0, n - 1)], axis) + torch.cat([x.narrow(axis, 1, n - 1), last], axis)
    return total / (2 * (x.ndim - 2))
