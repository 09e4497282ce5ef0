"""From the finest decoder level to an image."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from nnssl.intensity import LINEAR


def restoration_head(channels: int, out: int, *, dim: int, layers: int = 1) -> nn.Module:
    """Features ``(B, channels, *size)`` to images ``(B, out, *size)``, without an activation at the end.

    Args:
        channels: of the features.
        out: channels of the image.
        dim: spatial axes, 2 or 3.
        layers: 1: one 1x1(x1) convolution; 2: norm, ReLU, 3x3(x3) convolution to half the channels, norm, ReLU,
            1x1(x1) convolution, with InstanceNorm, so that no crop depends on another.
    """
    conv, norm = (nn.Conv2d, nn.InstanceNorm2d) if dim == 2 else (nn.Conv3d, nn.InstanceNorm3d)
    if layers == 1:
        return conv(channels, out, 1)
    half = max(1, channels // 2)
    first = [norm(channels, affine=True), nn.ReLU(), conv(channels, half, 3, padding=1)]
    return nn.Sequential(*first, norm(half, affine=True), nn.ReLU(), conv(half, out, 1))


def enlarge(image: Tensor, size: Sequence[int]) -> Tensor:
    """``(B, C, *s)`` enlarged linearly to ``size``, where the finest level of a network has a stride of its own."""
    if tuple(image.shape[2:]) == tuple(size):
        return image
    return F.interpolate(image, size=tuple(size), mode=LINEAR[len(size)])
