"""Intensity transforms of a batch, each with one parameter per sample."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nnssl.pretrain.augment.draws import Draws

__all__ = ["adjust_contrast", "from_unit", "gaussian_blur", "multiply", "random_jitter", "to_unit", "where_chosen"]

BLUR_BLOCK = 16
"""Voxels of an axis that one matrix product of a blur makes on a CPU; a GPU makes all at once."""


def _per_sample(value: Tensor, like: Tensor) -> Tensor:
    """``(B,)`` or ``(B, C)`` -> broadcastable to ``(B, C, *spatial)``."""
    return value.reshape(*value.shape, *([1] * (like.ndim - value.ndim))).to(like.dtype)


def to_unit(x: Tensor, intensity: Tensor) -> Tensor:
    """Map each channel's own range to [0, 1] without clipping; a channel without a range is only shifted.

    Args:
        x: ``(B, C, *spatial)``.
        intensity: ``(B, C, 2)`` low and high value of each sample and channel.
    """
    low, width = _range(x, intensity)
    return (x - low) / width


def from_unit(x: Tensor, intensity: Tensor) -> Tensor:
    """Undo :func:`to_unit`."""
    low, width = _range(x, intensity)
    return low + x * width


def _range(x: Tensor, intensity: Tensor) -> tuple[Tensor, Tensor]:
    low, width = intensity[..., 0], intensity[..., 1] - intensity[..., 0]
    return _per_sample(low, x), _per_sample(torch.where(width > 1e-6, width, 1.0), x)


def multiply(x: Tensor, factor: Tensor) -> Tensor:
    """Brightness of an image in [0, 1]: ``factor * x``; ``x`` is ``(B, C, *spatial)``, ``factor`` ``(B,)`` or ``(B, C)``."""
    return x * _per_sample(factor, x)


def adjust_contrast(x: Tensor, factor: Tensor) -> Tensor:
    """Spread values around each sample's and channel's mean: ``mean + factor * (x - mean)``; shapes as :func:`multiply`."""
    mean = x.flatten(2).mean(-1)
    mean = _per_sample(mean, x)
    return mean + (x - mean) * _per_sample(factor, x)


def gaussian_blur(x: Tensor, sigma: Tensor, radius: int | None = None) -> Tensor:
    """Blur each sample by its own Gaussian, axis by axis, edges repeated.

    Args:
        x: ``(B, C, *spatial)``.
        sigma: ``(B,)`` or ``(B, d)`` standard deviation in voxels, > 0; smaller values than 0.1 leave an axis as it is.
        radius: voxels of the kernel on each side; 3 sigma by default (reads the largest sigma from the device).
    """
    batch, dim = x.shape[0], x.ndim - 2
    sigma = sigma[:, None].expand(-1, dim) if sigma.ndim == 1 else sigma
    if radius is None:
        radius = max(1, int(3 * float(sigma.max()) + 0.5))
    offset = torch.arange(-radius, radius + 1, device=x.device)
    kernel = torch.exp(-0.5 * (offset / sigma.to(x.device).float().clamp(min=0.1)[..., None]) ** 2)
    kernel = (kernel / kernel.sum(-1, keepdim=True)).to(x.dtype)  # (B, d, 2 radius + 1)
    with torch.autocast(x.device.type, enabled=False):
        for axis, n in enumerate(x.shape[2:]):
            # A matrix product for each axis: convolutions of a kernel for each sample are an order of magnitude slower.
            block = BLUR_BLOCK if x.device.type == "cpu" and n > 2 * BLUR_BLOCK else n
            lines = (
                x.reshape(batch, -1, n) if axis == dim - 1 else x.reshape(batch, -1, n, math.prod(x.shape[3 + axis :]))
            )
            parts = []
            for low in range(0, n, block):
                high = min(n, low + block)
                first, end = max(0, low - radius), min(n, high + radius)
                voxel = (torch.arange(low, high, device=x.device)[:, None] + offset).clamp(
                    0, n - 1
                ) - first  # what is read
                matrix = x.new_zeros(batch, high - low, end - first).scatter_add_(
                    2, voxel.expand(batch, -1, -1), kernel[:, axis, None].expand(-1, high - low, -1)
                )
                read = lines[:, :, first:end]
                parts.append(read @ matrix.mT if axis == dim - 1 else matrix[:, None] @ read)
            x = (parts[0] if len(parts) == 1 else torch.cat(parts, 2)).view(x.shape)
    return x


def where_chosen(x: Tensor, chosen: Tensor, change: Callable[[Any], Tensor]) -> Tensor:
    """Change some samples of a batch. On a CPU the others cost nothing; a GPU would have to wait to know which they are.

    Args:
        x: ``(B, C, *spatial)``.
        chosen: ``(B,)`` bool.
        change: makes the changed samples of an index of samples, or of a slice of all; shapes as ``x`` indexed by it.
    """
    if x.device.type != "cpu":
        return torch.where(_per_sample(chosen.float(), x) > 0, change(slice(None)), x)
    rows = torch.nonzero(chosen)[:, 0]
    if not len(rows):
        return x
    out = x.clone()
    out[rows] = change(rows)
    return out


def random_jitter(
    x: Tensor,
    intensity: Tensor,
    draws: Draws,
    *,
    brightness: tuple[float, float] = (1.0, 1.0),
    contrast: tuple[float, float] = (1.0, 1.0),
    sigma: tuple[float, float] | None = None,
    radius: int = 1,
) -> Tensor:
    """Brightness, contrast and blur, drawn per sample, in units of the case's own intensity range.

    Args:
        x: ``(B, C, *spatial)`` normalised as nnU-Net does.
        intensity: ``(B, C, 2)`` the case's low and high percentile.
        draws: where the random numbers come from.
        brightness, contrast: ranges of the factors.
        sigma: range of the blur in voxels; None for no blur.
        radius: voxels of the blur's kernel on each side.

    Returns:
        A new tensor in the units of ``x``.
    """
    unit = multiply(to_unit(x, intensity), draws.uniform(*brightness))
    unit = adjust_contrast(unit, draws.uniform(*contrast))
    if sigma is not None:
        unit = gaussian_blur(unit, draws.uniform(*sigma), radius)
    return from_unit(unit, intensity)
