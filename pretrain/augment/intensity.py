"""Intensity transforms of a batch, each with one parameter per sample."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nnssl.pretrain.augment.draws import Draws

__all__ = ["adjust_contrast", "from_unit", "gaussian_blur", "multiply", "random_jitter", "to_unit"]

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


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
    batch, channels, dim = x.shape[0], x.shape[1], x.ndim - 2
    sigma = sigma[:, None].expand(-1, dim) if sigma.ndim == 1 else sigma
    if radius is None:
        radius = max(1, int(3 * float(sigma.max()) + 0.5))
    offset = torch.arange(-radius, radius + 1, device=x.device, dtype=torch.float32)
    kernel = torch.exp(-0.5 * (offset / sigma.to(x.device).float().clamp(min=0.1)[..., None]) ** 2)
    kernel = (kernel / kernel.sum(-1, keepdim=True)).to(x.dtype)  # (B, d, 2 radius + 1)
    shape = x.shape
    x = x.reshape(1, batch * channels, *shape[2:])
    for axis in range(dim):
        size = [1] * dim
        size[axis] = 2 * radius + 1
        weight = kernel[:, axis].repeat_interleave(channels, 0).view(batch * channels, 1, *size)
        pad = [0] * (2 * dim)
        pad[2 * (dim - 1 - axis)] = pad[2 * (dim - 1 - axis) + 1] = radius
        x = _CONV[dim](F.pad(x, pad, mode="replicate"), weight, groups=batch * channels)
    return x.view(shape)


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
