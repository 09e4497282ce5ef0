"""From a feature map to one projected vector per crop, without going blind under InstanceNorm.

The spatial mean of an InstanceNorm's output is a learned constant, the same for every image; after LeakyReLU only its asymmetry
tells images apart: six different volumes had a mean cosine of 0.998 after global average pooling, 0.45 when flattened.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nnssl.amp import at_least_float32
from nnssl.distributed import gather_with_grad
from nnssl.errors import NnsslError, did_you_mean
from nnssl.heads.mlp import mlp

POOLINGS = ("gap", "gap+gmp", "grid", "flatten")
_ADAPTIVE: dict[int, Callable[..., Tensor]] = {
    1: F.adaptive_avg_pool1d,
    2: F.adaptive_avg_pool2d,
    3: F.adaptive_avg_pool3d,
}
_GRID = 2


def pooled_width(channels: int, shape: Sequence[int], pooling: str) -> int:
    """Features that :func:`pool` makes of ``(B, channels, *shape)``.

    Raises:
        NnsslError: for an unknown pooling.
    """
    if pooling not in POOLINGS:
        raise NnsslError(f"unknown pooling '{pooling}'.{did_you_mean(pooling, POOLINGS)} Known: {', '.join(POOLINGS)}.")
    cells = {"gap": 1, "gap+gmp": 2, "grid": math.prod(min(_GRID, n) for n in shape), "flatten": math.prod(shape)}
    return channels * cells[pooling]


def pool(x: Tensor, pooling: str, grid: int = _GRID) -> Tensor:
    """Pool ``(B, C, *s)`` to ``(B, D)``.

    ``gap``: mean over all positions. ``gap+gmp``: mean and maximum. ``grid``: mean in ``grid`` cells per axis (fewer
    where an axis has fewer voxels). ``flatten``: every voxel, for one size of crop only.
    """
    if pooling == "gap":
        return x.flatten(2).mean(-1)
    if pooling == "gap+gmp":
        flat = x.flatten(2)
        return torch.cat([flat.mean(-1), flat.amax(-1)], 1)
    if pooling == "grid":
        x = _ADAPTIVE[x.ndim - 2](x, [min(grid, n) for n in x.shape[2:]])
    return x.flatten(1)


def standardise(x: Tensor, eps: float = 1e-5) -> Tensor:
    """Zero mean and unit variance of every feature over the batch of all ranks, in float32; no learned parameters.

    Args:
        x: ``(B, D)``, the same B on each rank, B >= 2 over all ranks.
        eps: added to the variance.
    """
    with torch.autocast(x.device.type, enabled=False):
        x = at_least_float32(x)
        everyone = gather_with_grad(x)
        mean = everyone.mean(0)
        return (x - mean) * (everyone.var(0, unbiased=False) + eps).rsqrt()


class ImageHead(nn.Module):
    """Pool, standardise over the batch if asked to, and project.

    Args:
        channels: channels of the map.
        shape: spatial shape of the map; ``flatten`` takes no other.
        out, hidden, layers: see :func:`nnssl.heads.mlp`.
        pooling: one of :data:`POOLINGS`.
        batch_standardise: standardise each pooled feature over the batch; what all crops share (under InstanceNorm nearly
            everything) is then gone before the projector.

    Raises:
        NnsslError: for an unknown pooling.
    """

    def __init__(
        self,
        channels: int,
        shape: Sequence[int],
        *,
        out: int = 128,
        hidden: int = 128,
        layers: int = 2,
        pooling: str = "grid",
        batch_standardise: bool = False,
    ) -> None:
        super().__init__()
        self.pooling, self.batch_standardise = pooling, batch_standardise
        self.mlp = mlp(pooled_width(channels, shape, pooling), out, hidden=hidden, layers=layers)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C, *shape)`` -> ``(B, out)``, not normalised."""
        pooled = pool(x, self.pooling)
        return self.mlp(standardise(pooled) if self.batch_standardise else pooled)
