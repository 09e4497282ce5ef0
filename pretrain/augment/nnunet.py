"""nnU-Net's training augmentation for image and label alike, batched, on the training device.

The kinds, probabilities and ranges are those of ``nnUNetTrainer.get_training_transforms`` (2.8.1). nnU-Net's own transforms
run sample by sample in worker processes and draw from global generators; these draw from :class:`StepRNG`, so that a step
is a pure function of (seed, step, sample), and cost little beside the network.

Differs: rotations keep shapes on anisotropic voxels; rotation and scaling come together (with the probability that nnU-Net
applies either); labels are taken from the nearest voxel instead of the most probable of an interpolated one-hot.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nnssl.intensity import (
    add_noise,
    adjust_gamma,
    gaussian_blur,
    limit_contrast,
    low_resolution,
    multiply,
    per_sample,
)
from nnssl.plans import Plan
from nnssl.pretrain.augment.rng import StepRNG
from nnssl.pretrain.augment.spatial import AffineRange, central_crop, sampling_grid, warp
from nnssl.pretrain.geometry import read_size_for
from nnssl.teacher import changes

SCALE = (1 / 1.4, 1 / 0.7)
P_MOVE = 0.36
"""nnU-Net rotates with probability 0.2 and scales with 0.2, independently."""
THICK = 3.0
"""nnU-Net turns in the plane only where the patch is this much longer in the plane than across it."""


@dataclass(frozen=True)
class TrainingAugmentation:
    """Figures for a plan's patch.

    Attributes:
        read_size: voxels per axis to read, so that what is turned seldom shows padding.
        rotation: largest angle about each axis in degrees.
        mirror_axes: axes that are mirrored with probability 0.5 each.
        masked: image channels whose voxels outside of the non-zero mask stay 0 whatever is done to the others.
    """

    size: tuple[int, ...]
    read_size: tuple[int, ...]
    spacing: tuple[float, ...]
    rotation: tuple[float, ...]
    mirror_axes: tuple[int, ...]
    masked: tuple[int, ...] = ()

    @classmethod
    def of(cls, plan: Plan, size: Sequence[int], mirror: bool = True) -> TrainingAugmentation:
        """As nnU-Net's ``configure_rotation_dummyDA_mirroring_and_inital_patch_size``."""
        size = tuple(int(s) for s in size)
        if len(size) == 2:
            rotation: tuple[float, ...] = (15.0 if max(size) / min(size) > 1.5 else 180.0,)
        elif max(size) / size[0] > THICK:
            rotation = (180.0, 0.0, 0.0)
        else:
            rotation = (30.0, 30.0, 30.0)
        read_size = read_size_for(size, plan.spacing, rotation=rotation, min_scale=0.85)
        masked = tuple(i for i, used in enumerate(plan.config.use_mask_for_norm) if used)
        return cls(size, read_size, plan.spacing, rotation, tuple(range(len(size))) if mirror else (), masked)


def draw_grid(rng: StepRNG, how: TrainingAugmentation, window: Sequence[int]) -> Tensor:
    """Draw rotation, scaling and mirroring; where each voxel of the view lies in the window, ``(B, *size, d)``."""
    moves = AffineRange(how.size, how.spacing, how.rotation, SCALE, mirror_axes=how.mirror_axes, p=P_MOVE)
    return sampling_grid(moves.draw(rng), how.size, window)


def move_label(label: Tensor, grid: Tensor, outside: int) -> Tensor:
    """Labels ``(B, 1, *window)`` of at least -1 at the nearest voxel of a :func:`draw_grid`: ``(B, 1, *size)`` int64.

    ``outside`` is the label of what lies outside of the window, and of label -1.
    """
    moved = warp(label.to(grid.dtype) + 1, grid, "nearest").round().long() - 1
    return torch.where(moved < 0, outside, moved)


def middle_label(label: Tensor, size: Sequence[int], outside: int) -> Tensor:
    """The middle of ``(B, 1, *window)`` labels, unchanged but for -1, which becomes ``outside``: ``(B, 1, *size)`` int64."""
    middle = central_crop(label, size).long()
    return torch.where(middle < 0, outside, middle)


def augment_intensity(x: Tensor, rng: StepRNG, masked: Sequence[int] = ()) -> Tensor:
    """Noise, blur, brightness, contrast, lower resolution and both gammas of ``(B, C, *size)``, in nnU-Net's order.

    In the channels ``masked`` voxels that are 0 in all channels stay 0.
    """
    return _masked(x, _augmented(x, rng), masked)


def augment_strongly(x: Tensor, rng: StepRNG, masked: Sequence[int] = (), strength: float = 1.0) -> Tensor:
    """Noise, contrast, brightness and gamma, see :mod:`nnssl.teacher.changes`: what the trainers' mean teacher has too.

    As :func:`augment_intensity`; ``strength`` is a factor on the probability of each and on the noise.
    """
    p, channels = min(1.0, changes.PROBABILITY * strength), x.shape[1]
    on, size = rng.chance(p)[:, None], rng.uniform(0.0, changes.NOISE * strength, channels)
    out = add_noise(x, torch.where(on, size, 0.0), rng.noise(*x.shape[1:]))
    on, factor = rng.chance(p)[:, None], rng.uniform(*changes.FACTOR, channels)
    out = multiply(out, torch.where(on, factor, 1.0))
    on, added = rng.chance(p)[:, None], changes.SHIFT * rng.normal(channels)
    out = out + per_sample(torch.where(on, added, 0.0), x)
    on, exponent = rng.chance(p)[:, None], rng.uniform(*changes.GAMMA, channels)
    return _masked(x, torch.where(per_sample(on, x), adjust_gamma(out, exponent), out), masked)


def _masked(x: Tensor, out: Tensor, masked: Sequence[int]) -> Tensor:
    """``out`` with 0 where ``x`` is 0 in all channels, in the named channels."""
    if not masked:
        return out
    kept = torch.zeros(x.shape[1], dtype=torch.bool, device=x.device)
    kept[list(masked)] = True
    empty = (x == 0).all(1, keepdim=True) & kept.view(1, -1, *[1] * (x.ndim - 2))
    return torch.where(empty, 0.0, out)


def _augmented(x: Tensor, rng: StepRNG) -> Tensor:
    channels = x.shape[1]
    on, variance = rng.chance(0.1), rng.uniform(0.0, 0.1)
    x = add_noise(x, torch.where(on, variance, 0.0), rng.noise(*x.shape[1:]))
    on = rng.chance(0.2)[:, None] & rng.chance(0.5, channels)
    x = torch.where(per_sample(on, x), gaussian_blur(x, rng.uniform(0.5, 1.0, x.ndim - 2), radius=3), x)
    on, factor = rng.chance(0.15)[:, None], _skewed(rng, 0.75, 1.25, channels)
    x = multiply(x, torch.where(on, factor, 1.0))
    on, factor = rng.chance(0.15)[:, None], _skewed(rng, 0.75, 1.25, channels)
    x = torch.where(per_sample(on, x), limit_contrast(x, factor), x)
    on = rng.chance(0.25)[:, None] & rng.chance(0.5, channels)
    x = torch.where(per_sample(on, x), low_resolution(x, rng.uniform(0.5, 1.0)), x)
    on, exponent = rng.chance(0.1)[:, None], _skewed(rng, 0.7, 1.5, channels)
    x = torch.where(per_sample(on, x), -adjust_gamma(-x, exponent), x)
    on, exponent = rng.chance(0.3)[:, None], _skewed(rng, 0.7, 1.5, channels)
    return torch.where(per_sample(on, x), adjust_gamma(x, exponent), x)


def _skewed(rng: StepRNG, low: float, high: float, *shape: int) -> Tensor:
    """Half of the numbers uniform in [low, 1), half in [1, high)."""
    below = rng.chance(0.5, *shape)
    return torch.where(below, rng.uniform(low, 1.0, *shape), rng.uniform(1.0, high, *shape))
