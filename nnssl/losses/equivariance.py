"""Equivariance to size: features of the shrunken image against the shrunken features of the image.

L_ER of MACL (Zeng et al. 2023, arXiv:2309.11876, Eq. 11). The paper's code shrinks with corners aligned, which compares
cells up to a third of a cell apart at the border; area pooling, the default here, compares equal places.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from nnssl.amp import at_least_float32
from nnssl.errors import NnsslError
from nnssl.intensity import LINEAR

_POOL = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}


def shrink(x: Tensor, factor: Sequence[int], align_corners: bool = False) -> Tensor:
    """Shrink an image or a feature map by a whole factor per axis.

    Args:
        x: ``(B, C, *spatial)``.
        factor: one number per spatial axis.
        align_corners: linear interpolation between aligned corner voxels, without smoothing, as in the paper's code;
            otherwise the mean over each block of ``factor`` voxels.

    Returns:
        ``(B, C, *(spatial / factor))``; ``x`` itself where every factor is 1.

    Raises:
        NnsslError: where an axis is not a multiple of its factor.
    """
    size = list(x.shape[2:])
    if len(size) != len(factor) or any(n % f for n, f in zip(size, factor)):
        raise NnsslError(f"a map of {tuple(size)} voxels cannot be shrunk by {tuple(factor)}.")
    if all(f == 1 for f in factor):
        return x
    if align_corners:
        new = [n // f for n, f in zip(size, factor)]
        return F.interpolate(x, size=new, mode=LINEAR[len(size)], align_corners=True)
    return _POOL[len(size)](x, tuple(factor))


def equivariance_loss(
    dominant: Tensor,
    aux: Tensor,
    factor: Sequence[int],
    align_corners: bool = False,
    seen: Tensor | None = None,
    both: Tensor | None = None,
) -> Tensor:
    """``mean |Y - shrink(Y~)|`` over all elements; both sides receive the gradient.

    With ``seen`` and ``both`` the mean is over the cells that both branches saw: a cell of ``Y`` is compared with the mean of
    those cells of ``Y~`` in it that were seen, and counts by their share.

    Args:
        dominant: ``Y``, ``(B, C, *s)``, bottleneck of the shrunken image.
        aux: ``Y~``, ``(B, C, *(s * factor))``, bottleneck of the image.
        factor: shrink per axis.
        align_corners: see :func:`shrink`.
        seen: ``(B, *(s * factor))`` bool, cells of ``Y~`` that hold features; elsewhere it is 0.
        both: ``(B, *s)`` bool, cells of ``Y`` that hold features.

    Raises:
        NnsslError: where the shapes do not fit, or masks meet aligned corners.
    """
    if seen is not None and align_corners:
        raise NnsslError("features of shifted crops cannot be shrunk with corners aligned.")
    with torch.autocast(dominant.device.type, enabled=False):
        y, target = (at_least_float32(t) for t in (dominant, aux))
        target = shrink(target, factor, align_corners)
        if y.shape != target.shape:
            raise NnsslError(f"the bottlenecks differ: {tuple(y.shape)} and, shrunk, {tuple(target.shape)}.")
        if seen is None or both is None:
            return (y - target).abs().mean()
        share = shrink(seen[:, None].to(y.dtype), factor)
        weight = share * both[:, None]
        error = (y - target / share.clamp_min(1e-6)).abs().mean(1, keepdim=True)
        each = (weight * error).flatten(1).sum(1) / weight.flatten(1).sum(1).clamp_min(1e-6)
        return each.mean()
