"""From a feature map to one vector per volume."""

from __future__ import annotations

from torch import Tensor

from nnssl.errors import NnsslError, did_you_mean
from nnssl.heads import image

POOLINGS = ("gap", "grid", "flat")


def pool(features: Tensor, kind: str = "grid", *, grid: int = 2, channels_last: bool = False) -> Tensor:
    """Pool a feature map over positions, never over channels.

    Under InstanceNorm the mean of a channel over all positions is a learned constant, the same for every image, so
    global average pooling (``gap``) is nearly blind; ``grid`` keeps where in the crop something is.

    Args:
        features: ``(N, C, *spatial)``, or tokens ``(N, *positions, C)`` with ``channels_last``. ``(N, D)`` passes as it is.
        kind: ``gap`` (global average), ``grid`` (average in ``grid`` cells per axis, fewer where an axis has fewer
            voxels, then flattened), ``flat`` (every voxel).
        grid: cells per axis.
        channels_last: whether the channels are the last axis.

    Returns:
        ``(N, D)`` float32 (float64 stays), D = C for ``gap``, C times the cells for ``grid``.

    Raises:
        NnsslError: for an unknown kind or a grid below 1.
    """
    if kind not in POOLINGS:
        raise NnsslError(f"unknown pooling '{kind}'.{did_you_mean(kind, POOLINGS)} Known: {', '.join(POOLINGS)}.")
    if grid < 1:
        raise NnsslError(f"the pooling grid must have at least one cell per axis, got {grid}.")
    x = features if features.is_floating_point() and features.element_size() >= 4 else features.float()
    if x.ndim == 2:
        return x
    if channels_last:
        x = x.movedim(-1, 1)
    return image.pool(x, "flatten" if kind == "flat" else kind, grid)
