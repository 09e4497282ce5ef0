"""Voxel representations from a pyramid: gathering, one narrow projection per level, and the projector.

Kats et al. 2024, arXiv:2401.06473 (section 2.3, hierarchical balancing). In vox2vec a voxel's representation is the
concatenation of raw level features, so that the coarsest level holds half of it; here each level is first mapped to
the same width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def gather_pyramid(levels: Sequence[Tensor], voxels: Tensor, strides: Sequence[Sequence[int]]) -> list[Tensor]:
    """Features of single voxels in each level: the feature at ``voxel // stride``, as after nearest up-sampling.

    Args:
        levels: feature maps ``(B, C_i, *size_i)``.
        voxels: ``(B, n, dim)`` int64, indices in the network's input.
        strides: per level, cumulative stride per axis.

    Returns:
        per level ``(B, n, C_i)``, dtype as the level.
    """
    if len(levels) != len(strides):
        raise ValueError(f"{len(levels)} levels but {len(strides)} strides")
    out = []
    for level, stride in zip(levels, strides):
        cell = voxels // torch.as_tensor(stride, device=voxels.device)
        flat = cell[..., 0]
        for axis in range(1, cell.shape[-1]):
            flat = flat * level.shape[2 + axis] + cell[..., axis]
        index = flat[:, None].expand(-1, level.shape[1], -1)
        out.append(level.flatten(2).gather(2, index).transpose(1, 2))
    return out


class ScaleProjections(nn.Module):
    """One linear map (a 1x1x1 convolution on gathered voxels) per level to a common width: each level gets the same share.

    Level ``i`` (0 the finest) fills exactly the slots ``[i * dim, (i + 1) * dim)``. With torch's default init the
    variance of each slot group is a third of its level's, so the levels start balanced. ``trainable=False`` freezes the random
    maps, as the authors' released code did by accident; they are saved all the same.
    """

    def __init__(self, *, channels: Sequence[int], dim: int = 32, trainable: bool = True) -> None:
        super().__init__()
        self.maps = nn.ModuleList(nn.Linear(c, dim, bias=i == 0) for i, c in enumerate(channels))
        self.width = dim * len(self.maps)
        self.requires_grad_(trainable)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Map features ``(..., C_i)``, finest first, and concatenate: ``(..., n_levels * dim)``."""
        return torch.cat([m(f) for m, f in zip(self.maps, features, strict=True)], -1)


def voxel_projector(width: int, out: int = 128, layers: int = 3) -> nn.Sequential:
    """MLP on ``(N, width)``: ``layers - 1`` times Linear, BatchNorm, ReLU of the same width, then Linear to ``out``.

    Its output is not normalised. BatchNorm needs N >= 2 in training; the views are passed one after the other, as in
    the authors' code, so that each has its own statistics.
    """
    hidden: list[nn.Module] = []
    for _ in range(layers - 1):
        hidden += [nn.Linear(width, width), nn.BatchNorm1d(width), nn.ReLU(inplace=True)]
    return nn.Sequential(*hidden, nn.Linear(width, out))
