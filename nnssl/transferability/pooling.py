"""From a feature map to one vector per volume."""

from __future__ import annotations

from torch import Tensor

from nnssl.amp import at_least_float32
from nnssl.errors import NnsslError, did_you_mean
from nnssl.heads import image

POOLINGS = ("gap", "grid", "flat")


def pool(features: Tensor, kind: str = "grid", *, grid: int = 2) -> Tensor:
    """Pool ``(N, C, *spatial)`` over positions, never over channels: ``(N, D)``, float32 at least. ``(N, D)`` passes as it is.

    Under InstanceNorm the mean of a channel over all positions is a learned constant, the same for every image, so
    global average pooling (``gap``) is nearly blind; ``grid`` (mean in ``grid`` cells per axis, fewer where an axis has
    fewer voxels, flattened) keeps where in the crop something is; ``flat`` keeps every voxel.

    Raises:
        NnsslError: for an unknown kind or a grid below 1.
    """
    if kind not in POOLINGS:
        raise NnsslError(f"unknown pooling '{kind}'.{did_you_mean(kind, POOLINGS)} Known: {', '.join(POOLINGS)}.")
    if grid < 1:
        raise NnsslError(f"the pooling grid must have at least one cell per axis, got {grid}.")
    x = at_least_float32(features)
    return x if x.ndim == 2 else image.pool(x, "flatten" if kind == "flat" else kind, grid)
