"""Brightness, contrast and blur of a view, drawn per sample; what they do is :mod:`nnssl.intensity`'s."""

from __future__ import annotations

from torch import Tensor

from nnssl.intensity import (
    adjust_contrast,
    gaussian_blur,
    multiply,
    per_sample,
    rescale_intensity,
    restore_intensity,
    where_chosen,
)
from nnssl.pretrain.augment.rng import StepRNG

__all__ = [
    "adjust_contrast",
    "gaussian_blur",
    "jitter_rescaled",
    "multiply",
    "random_jitter",
    "rescale_intensity",
    "restore_intensity",
    "where_chosen",
]


def random_jitter(
    x: Tensor,
    intensity: Tensor,
    rng: StepRNG,
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
        rng: where the random numbers come from.
        brightness, contrast: ranges of the factors.
        sigma: range of the blur in voxels; None for no blur.
        radius: voxels of the blur's kernel on each side.

    Returns:
        A new tensor in the units of ``x``.
    """
    unit = jitter_rescaled(
        rescale_intensity(x, intensity), rng, brightness=brightness, contrast=contrast, sigma=sigma, radius=radius
    )
    return restore_intensity(unit, intensity)


def jitter_rescaled(
    u: Tensor,
    rng: StepRNG,
    *,
    brightness: tuple[float, float] = (1.0, 1.0),
    contrast: tuple[float, float] = (1.0, 1.0),
    sigma: tuple[float, float] | None = None,
    radius: int = 1,
) -> Tensor:
    """As :func:`random_jitter` of ``(B, C, *spatial)`` in units of the case's range."""
    factor, spread = rng.uniform(*brightness), rng.uniform(*contrast)
    mean = per_sample(u.flatten(2).mean(-1), u)  # brightness, then contrast around its mean, in one pass
    u = (u * per_sample(factor * spread, u)).add_(mean * per_sample(factor * (1 - spread), u))
    return u if sigma is None else gaussian_blur(u, rng.uniform(*sigma), radius)
