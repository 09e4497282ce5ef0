"""Two altered copies of a volume for the robustness trace: seeded, per volume, independent of any training's views.

The published measure jitters brightness and contrast of a whole batch. Behind InstanceNorm such an affine change cancels and
the positive distance is zero whatever the network; here each volume gets its own draws of changes that are *not* affine:

- ``gamma``: exponent in [0.8, 1.25] on the volume's own range (not for CT);
- ``bias``: a smooth multiplicative field, log amplitude 0.2 on a 3-knot grid per axis (not for CT);
- ``window``: the range clipped by up to 15 % at each end (for CT, the window; for other modalities, saturation);
- ``blur``: Gaussian, sigma 0.5 to 1 voxel of the finest axis;
- ``lowres``: sampled at 0.5 to 1 of the resolution and interpolated back, axes that are coarse already left alone;
- ``noise``: Gaussian, sd up to 0.1 of a normalised unit.

No geometric change: position in the crop stays comparable. A run that trains with some of these leaves them out here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

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
    """The changes for a modality, without those that a run trains with.

    Args:
        modality: ``"ct"`` or anything else.
        exclude: families that the training views use.

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
    """Alter each volume by its own draw of every family.

    A pure function of (seed, view, index of the sample, its voxels): adding samples does not change the others, and no
    global random state is read or written.

    Args:
        x: ``(N, C, *size)`` float32 on the CPU, normalised as nnU-Net does.
        seed: of the trace.
        view: 0 or 1.
        families: which changes, of :data:`FAMILIES`.
        intensity: ``(N, C, 2)`` low and high value of each sample's channels; from the crops themselves by default.
        spacing: mm per axis, to leave coarse axes alone; isotropic by default.

    Returns:
        A new tensor of the same shape.
    """
    intensity = intensity_range(x) if intensity is None else intensity
    spacing = [1.0] * (x.ndim - 2) if spacing is None else [float(s) for s in spacing]
    fine = [s < _COARSE * min(spacing) for s in spacing]
    relative = [min(spacing) / s if f else 0.0 for s, f in zip(spacing, fine)]
    out = []
    for i, volume in enumerate(x.split(1)):
        rng = np.random.default_rng(np.random.SeedSequence([seed, view, i, 0xB0B]))
        order = [f for f in FAMILIES if f in families]
        for name in order:
            volume = _CHANGES[name](volume, intensity[i, None], relative, rng)
        out.append(volume)
    return torch.cat(out).to(x.dtype)


def _gamma(x: Tensor, intensity: Tensor, relative: Sequence[float], rng: np.random.Generator) -> Tensor:
    exponent = torch.tensor([np.exp(rng.uniform(np.log(0.8), np.log(1.25)))])
    return restore_intensity(bend(rescale_intensity(x, intensity), exponent), intensity)


def _bias(x: Tensor, intensity: Tensor, relative: Sequence[float], rng: np.random.Generator) -> Tensor:
    knots = torch.from_numpy(rng.normal(0, 0.2, [3] * (x.ndim - 2)).astype(np.float32))
    field = F.interpolate(knots[None, None], size=x.shape[2:], mode=LINEAR[x.ndim - 2], align_corners=True)
    return restore_intensity(rescale_intensity(x, intensity) * field.exp(), intensity)


def _window(x: Tensor, intensity: Tensor, relative: Sequence[float], rng: np.random.Generator) -> Tensor:
    cut = rng.uniform(0, 0.15, 2)
    return restore_intensity(rescale_intensity(x, intensity).clamp(float(cut[0]), float(1 - cut[1])), intensity)


def _blur(x: Tensor, intensity: Tensor, relative: Sequence[float], rng: np.random.Generator) -> Tensor:
    sigma = rng.uniform(0.5, 1.0)
    return gaussian_blur(x, torch.tensor([[sigma * r for r in relative]]), radius=4)


def _lowres(x: Tensor, intensity: Tensor, relative: Sequence[float], rng: np.random.Generator) -> Tensor:
    scale = rng.uniform(0.5, 1.0)
    return resample(x, [max(1, round(n * scale)) if r else n for n, r in zip(x.shape[2:], relative)])


def _noise(x: Tensor, intensity: Tensor, relative: Sequence[float], rng: np.random.Generator) -> Tensor:
    sd = torch.tensor([rng.uniform(0.02, 0.1)])
    return add_noise(x, sd, torch.from_numpy(rng.standard_normal(tuple(x.shape), dtype=np.float32)))


_CHANGES: dict[str, Callable[[Tensor, Tensor, Sequence[float], np.random.Generator], Tensor]] = {
    "gamma": _gamma,
    "bias": _bias,
    "window": _window,
    "blur": _blur,
    "lowres": _lowres,
    "noise": _noise,
}
