"""Brightness, contrast and blur of a view, drawn per sample; what they do is :mod:`nnssl.intensity`'s."""

from __future__ import annotations

from torch import Tensor

from nnssl.intensity import adjust_contrast, from_unit, gaussian_blur, multiply, to_unit, where_chosen
from nnssl.pretrain.augment.draws import Draws

__all__ = ["adjust_contrast", "from_unit", "gaussian_blur", "multiply", "random_jitter", "to_unit", "where_chosen"]


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
