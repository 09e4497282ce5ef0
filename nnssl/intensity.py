"""Intensity transforms of a batch, each once: pure functions of images and of one parameter per sample (or per channel).

Who draws the parameters decides what they are for: views of pretraining (:mod:`nnssl.pretrain.augment`), objectives' own
corruptions, and the altered copies of the robustness trace.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "LINEAR",
    "add_noise",
    "adjust_contrast",
    "adjust_gamma",
    "bend",
    "from_unit",
    "gaussian_blur",
    "limit_contrast",
    "low_resolution",
    "multiply",
    "per_sample",
    "resample",
    "rescale_intensity",
    "restore_intensity",
    "to_unit",
    "where_chosen",
]

LINEAR = {1: "linear", 2: "bilinear", 3: "trilinear"}

BLUR_BLOCK = 16
"""Voxels of an axis that one matrix product of a blur makes on a CPU; a GPU makes all at once."""


def per_sample(value: Tensor, like: Tensor) -> Tensor:
    """``(B,)`` or ``(B, C)`` -> broadcastable to ``(B, C, *spatial)``; numbers in the type of ``like``."""
    value = value.reshape(*value.shape, *[1] * (like.ndim - value.ndim))
    return value if value.dtype is torch.bool else value.to(like.dtype)


def rescale_intensity(x: Tensor, intensity: Tensor) -> Tensor:
    """Map each channel's range, ``intensity`` ``(B, C, 2)``, to [0, 1] without clipping; one without a range is only shifted."""
    low, width = _range(x, intensity)
    return (x - low).div_(width)


def restore_intensity(x: Tensor, intensity: Tensor) -> Tensor:
    """Undo :func:`rescale_intensity`."""
    low, width = _range(x, intensity)
    return (x * width).add_(low)


to_unit, from_unit = rescale_intensity, restore_intensity  # their names before


def _range(x: Tensor, intensity: Tensor) -> tuple[Tensor, Tensor]:
    low, width = intensity[..., 0], intensity[..., 1] - intensity[..., 0]
    return per_sample(low, x), per_sample(torch.where(width > 1e-6, width, 1.0), x)


def multiply(x: Tensor, factor: Tensor) -> Tensor:
    """Brightness: ``factor * x``; ``x`` is ``(B, C, *spatial)``, ``factor`` ``(B,)`` or ``(B, C)``."""
    return x * per_sample(factor, x)


def add_noise(x: Tensor, sd: Tensor, field: Tensor) -> Tensor:
    """Add ``sd * field``; ``x`` and the standard normal ``field`` are ``(B, C, *spatial)``, ``sd`` is ``(B,)`` or ``(B, C)``."""
    return torch.addcmul(x, per_sample(sd, x), field)


def adjust_contrast(x: Tensor, factor: Tensor) -> Tensor:
    """Spread values around each sample's and channel's mean: ``mean + factor * (x - mean)``; shapes as :func:`multiply`."""
    mean = per_sample(x.flatten(2).mean(-1), x)
    return (x - mean).mul_(per_sample(factor, x)).add_(mean)


def limit_contrast(x: Tensor, factor: Tensor) -> Tensor:
    """As :func:`adjust_contrast`, within the range that each channel has."""
    flat = x.flatten(2)
    low, high = per_sample(flat.amin(-1), x), per_sample(flat.amax(-1), x)
    return torch.minimum(torch.maximum(adjust_contrast(x, factor), low), high)


def bend(u: Tensor, exponent: Tensor, *, low: float = 0.0, floor: float = 0.0) -> Tensor:
    """Gamma of an image whose range is [0, 1]: a power within, a shift outside of it.

    Args:
        u: ``(B, C, *spatial)``, see :func:`rescale_intensity`.
        exponent: ``(B,)`` or ``(B, C)``.
        low: where the power begins; above 0, what lies below is shifted down with it.
        floor: least base of the power; what lies below is lifted to it.
    """
    within = u.clamp(low, 1)
    outside, exponent = u - within, per_sample(exponent, u)
    if u.device.type == "cpu":  # a third of the time of a power
        return within.clamp_min_(floor).log_().mul_(exponent).exp_().add_(outside)
    return within.clamp_min(floor) ** exponent + outside


def adjust_gamma(x: Tensor, exponent: Tensor) -> Tensor:
    """Raise each channel, scaled to [0, 1], to a power ``(B, C)`` and give it back its mean and standard deviation."""
    flat = x.flatten(2)
    low, mean, sd = (per_sample(v, x) for v in (flat.amin(-1), flat.mean(-1), flat.std(-1)))
    width = per_sample(flat.amax(-1) - flat.amin(-1), x).clamp_min(1e-7)
    y = ((x - low) / width).clamp(0, 1) ** per_sample(exponent, x) * width + low
    flat = y.flatten(2)
    return (y - per_sample(flat.mean(-1), x)) / per_sample(flat.std(-1), x).clamp_min(1e-7) * sd + mean


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


def resample(x: Tensor, size: Sequence[int]) -> Tensor:
    """Take the nearest voxels of a grid of ``size`` voxels per axis and interpolate linearly between them."""
    small = F.interpolate(x, size=list(size), mode="nearest-exact")
    return F.interpolate(small, size=x.shape[2:], mode=LINEAR[x.ndim - 2], align_corners=False)


def low_resolution(x: Tensor, scale: Tensor) -> Tensor:
    """Take each sample's nearest voxels on a grid that is coarser by ``scale`` ``(B,)`` and interpolate linearly between them.

    Equals :func:`resample` to ``round(n scale)`` voxels, without a loop over samples; takes three times as long.
    """
    for axis in range(2, x.ndim):
        n = x.shape[axis]
        coarse = (scale * n).round().clamp(1, n)[:, None]
        place = (torch.arange(n, device=x.device) + 0.5) * (coarse / n) - 0.5
        place = place.clamp_min(0)
        first = place.floor()
        share = place - first  # behind the last coarse voxel both values are the same
        shape = [1] * x.ndim
        shape[0], shape[axis] = len(x), n
        values = []
        for k in (first, (first + 1).minimum(coarse - 1)):
            voxel = ((k + 0.5) * (n / coarse)).floor().long().clamp(0, n - 1)
            values.append(x.gather(axis, voxel.view(shape).expand_as(x)))
        x = values[0] + share.to(x.dtype).view(shape) * (values[1] - values[0])
    return x


def where_chosen(x: Tensor, chosen: Tensor, change: Callable[[Any], Tensor], *, own: bool = False) -> Tensor:
    """Change some samples of a batch. On a CPU the others cost nothing; a GPU would have to wait to know which they are.

    Args:
        x: ``(B, C, *spatial)``.
        chosen: ``(B,)`` bool.
        change: makes the changed samples of an index of samples, or of a slice of all; shapes as ``x`` indexed by it.
        own: ``x`` may be changed in place.
    """
    if x.device.type != "cpu":
        return torch.where(per_sample(chosen, x), change(slice(None)), x)
    rows = torch.nonzero(chosen)[:, 0]
    if not len(rows):
        return x
    out = x if own else x.clone()
    out[rows] = change(rows)
    return out
