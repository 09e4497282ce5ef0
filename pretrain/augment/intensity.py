"""Brightness, contrast and blur of a view, drawn per sample, and what counts as 0 and 1; see :mod:`nnssl.intensity`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nnssl.intensity import gaussian_blur, per_sample, rescale_intensity, restore_intensity
from nnssl.plans import Plan
from nnssl.pretrain.augment.rng import StepRNG


def random_jitter(
    x: Tensor,
    intensity: Tensor | None,
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
        intensity: ``(B, C, 2)`` the case's low and high percentile; None: ``x`` is in units of its range.
        rng: where the random numbers come from.
        brightness, contrast: ranges of the factors.
        sigma: range of the blur in voxels; None for no blur.
        radius: voxels of the blur's kernel on each side.

    Returns:
        A new tensor in the units of ``x``.
    """
    if intensity is not None:
        x = rescale_intensity(x, intensity)
    factor, spread = rng.uniform(*brightness), rng.uniform(*contrast)
    mean = per_sample(x.flatten(2).mean(-1), x)  # brightness, then contrast around its mean, in one pass
    x = (x * per_sample(factor * spread, x)).add_(mean * per_sample(factor * (1 - spread), x))
    if sigma is not None:
        x = gaussian_blur(x, rng.uniform(*sigma), radius)
    return x if intensity is None else restore_intensity(x, intensity)


GRAIN = 0.01
"""SD of the noise in views without content, of z-scored images."""


def with_grain(views: Sequence[Tensor], rng: StepRNG) -> list[Tensor]:
    """Put faint noise, the same in all, into views ``(B, C, *size)`` without content.

    Where convolutions do not pad with zeros, such a view is constant in all layers: InstanceNorm would divide rounding errors by
    the root of its eps in each of them, and gradients explode.
    """
    grain = GRAIN * rng.noise(*views[0].shape[1:])
    flat = [per_sample(view.flatten(1).float().std(1) < GRAIN, view) for view in views]
    return [torch.where(f, view + grain.to(view.dtype), view) for f, view in zip(flat, views)]


def unit_range(plan: Plan, intensity: Tensor) -> Tensor:
    """nnU-Net's clipping limits for CT, else each case's own percentiles, ``(B, C, 2)`` in normalised units.

    Preprocessed CT lies within the limits, so that nothing is lost by clipping to [0, 1]; other modalities lose what
    lies outside of the percentiles, which ``intensity`` holds.
    """
    out = intensity.clone()
    statistics = plan.plans.get("foreground_intensity_properties_per_channel", {})
    for channel, scheme in enumerate(plan.normalization_schemes):
        if scheme == "CTNormalization" and str(channel) in statistics:
            s = statistics[str(channel)]
            for i, key in enumerate(("percentile_00_5", "percentile_99_5")):
                out[:, channel, i] = (s[key] - s["mean"]) / max(s["std"], 1e-8)
    return out
