"""Two altered copies of a volume for the robustness trace: seeded, per volume, independent of any training's views.

The published measure jitters brightness and contrast of a whole batch. Behind InstanceNorm such an affine change cancels and
the positive distance is zero whatever the network; here each volume gets its own draws of changes that are *not* affine
(:func:`_changed`; ``gamma`` and ``bias`` not for CT). None is geometric: position in the crop stays comparable. A run that
trains with some of these leaves them out here.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nnssl.errors import NnsslError, did_you_mean
from nnssl.intensity import LINEAR, add_noise, bend, gaussian_blur, resample, rescale_intensity, restore_intensity

FAMILIES = ("gamma", "bias", "window", "blur", "lowres", "noise")
MR_FAMILIES = ("gamma", "bias", "blur", "lowres", "noise")
CT_FAMILIES = ("window", "blur", "lowres", "noise")
_COARSE = 3.0  # an axis this much coarser than the finest is neither blurred nor sampled down, as in nnU-Net


def choose_families(modality: str, exclude: Sequence[str] = ()) -> tuple[str, ...]:
    """The changes for a modality (``"ct"`` or anything else), without those that a run trains with.

    Raises:
        NnsslError: for an unknown family, or where none is left.
    """
    for name in exclude:
        if name not in FAMILIES:
            raise NnsslError(
                f"unknown family of views '{name}'.{did_you_mean(name, FAMILIES)} Known: {', '.join(FAMILIES)}."
            )
    base = CT_FAMILIES if modality == "ct" else MR_FAMILIES
    left = tuple(f for f in base if f not in exclude)
    left = left or tuple(f for f in FAMILIES if f not in exclude and (modality != "ct" or f not in ("gamma", "bias")))
    if not left:
        raise NnsslError("the training views use every kind of change, so that none is left for the robustness trace.")
    return left


def intensity_range(x: Tensor) -> Tensor:
    """0.5th and 99.5th percentile of each sample and channel: ``(N, C, *size)`` -> ``(N, C, 2)``."""
    flat = x.flatten(2).double().numpy()
    return torch.from_numpy(np.stack(list(np.percentile(flat, (0.5, 99.5), axis=2)), axis=-1)).to(x.dtype)


def photometric_view(
    x: Tensor,
    seed: int,
    view: int,
    *,
    families: Sequence[str] = MR_FAMILIES,
    intensity: Tensor | None = None,
    spacing: Sequence[float] | None = None,
) -> Tensor:
    """Alter each volume by its own draw of every family; a new tensor of the same shape.

    A pure function of (seed, view, index of the sample, its voxels): adding samples does not change the others, and no
    global random state is read or written.

    Args:
        x: ``(N, C, *size)`` float32 on the CPU, normalised as nnU-Net does.
        seed, view: of the trace; 0 or 1.
        families: which changes, of :data:`FAMILIES`.
        intensity: ``(N, C, 2)`` low and high value of each sample's channels; from the crops themselves by default.
        spacing: mm per axis, to leave coarse axes alone; isotropic by default.
    """
    intensity = intensity_range(x) if intensity is None else intensity
    spacing = [1.0] * (x.ndim - 2) if spacing is None else [float(s) for s in spacing]
    finest = min(spacing)
    relative = [finest / s if s < _COARSE * finest else 0.0 for s in spacing]
    out = []
    for i, volume in enumerate(x.split(1)):
        rng = np.random.default_rng(np.random.SeedSequence([seed, view, i, 0xB0B]))
        for family in FAMILIES:
            if family in families:
                volume = _changed(volume, family, intensity[i, None], relative, rng)
        out.append(volume)
    return torch.cat(out).to(x.dtype)


def _changed(x: Tensor, family: str, intensity: Tensor, relative: Sequence[float], rng: np.random.Generator) -> Tensor:
    """One volume, changed; ``relative`` is the finest spacing over each axis' own, 0 for an axis that is left alone."""
    if family == "blur":  # sigma in voxels of the finest axis
        sigma = rng.uniform(0.5, 1.0)
        return gaussian_blur(x, torch.tensor([[sigma * r for r in relative]]), radius=4)
    if family == "lowres":
        scale = rng.uniform(0.5, 1.0)
        return resample(x, [max(1, round(n * scale)) if r else n for n, r in zip(x.shape[2:], relative)])
    if family == "noise":  # in normalised units
        sd = torch.tensor([rng.uniform(0.02, 0.1)])
        return add_noise(x, sd, torch.from_numpy(rng.standard_normal(tuple(x.shape), dtype=np.float32)))
    u = rescale_intensity(x, intensity)
    if family == "gamma":
        u = bend(u, torch.tensor([np.exp(rng.uniform(np.log(0.8), np.log(1.25)))]))
    elif family == "bias":  # a smooth field: log amplitude on three knots per axis
        knots = torch.from_numpy(rng.normal(0, 0.2, [3] * (x.ndim - 2)).astype(np.float32))
        u = u * F.interpolate(knots[None, None], size=x.shape[2:], mode=LINEAR[x.ndim - 2], align_corners=True).exp()
    else:  # CT's window; saturation elsewhere
        low, high = rng.uniform(0, 0.15, 2)
        u = u.clamp(float(low), float(1 - high))
    return restore_intensity(u, intensity)
