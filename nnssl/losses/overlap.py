"""Where a crop lies in a window of equal cells: the share of it in each, counted in whole voxels.

Volume contrast, Wu et al. 2024 (arXiv:2410.09890; first form arXiv:2402.17300). A window of ``grid * size`` voxels is tiled by
``n = prod(grid)`` base crops of ``size`` voxels; cells are numbered with the last axis fastest.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def base_crops(x: Tensor, grid: Sequence[int]) -> Tensor:
    """Cut windows ``(B, C, *window)`` into their base crops: ``(B, n, C, *size)`` with ``size = window / grid``."""
    for axis, (w, g) in enumerate(zip(x.shape[2:], grid)):
        if w % g:
            raise ValueError(f"axis {axis}: a window of {w} voxels cannot be cut into {g} equal crops")
    dim, split = len(grid), [n for w, g in zip(x.shape[2:], grid) for n in (g, w // g)]
    cut = x.reshape(*x.shape[:2], *split)
    order = [0, *range(2, 2 + 2 * dim, 2), 1, *range(3, 3 + 2 * dim, 2)]
    return cut.permute(order).flatten(1, dim)


def overlap_labels(offset: Tensor, size: Sequence[int], grid: Sequence[int]) -> Tensor:
    """Share of each crop's volume that lies in each cell: ``y_i = |crop and cell i| / |crop|``, ``(..., n)`` float32.

    Of crops that start at ``offset`` ``(..., dim)``. The overlap is separable: the product over axes of ``max(0, min(o, i c)
    + c - max(o, i c)) / c``, counted in integers before the division, so that 0 is exact. Inside the window ``sum_i y_i = 1``.
    """
    counts = torch.ones((*offset.shape[:-1], 1), dtype=torch.long, device=offset.device)
    for axis, (c, g) in enumerate(zip(size, grid)):
        here, cell = offset[..., axis, None].long(), torch.arange(g, device=offset.device) * c
        shared = (torch.minimum(here, cell) + c - torch.maximum(here, cell)).clamp_min(0)
        counts = (counts[..., :, None] * shared[..., None, :]).flatten(-2)
    return (counts.double() / math.prod(size)).float()
