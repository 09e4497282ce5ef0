"""Rotation, scaling, shift and mirroring of a batch of crops in one ``grid_sample``, for 2d and 3d and any spacing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from nnssl.pretrain.augment.draws import Draws

__all__ = ["Affine", "View", "central_crop", "draw_affine", "random_affine", "sampling_grid", "warp"]


@dataclass
class Affine:
    """Maps voxels of the output to voxels of the window, both counted from their centres: ``window = matrix @ output + shift``.

    Attributes:
        matrix: ``(B, d, d)`` in voxels, axes in array order (z, y, x or y, x).
        shift: ``(B, d)`` in voxels of the window.
    """

    matrix: Tensor
    shift: Tensor


@dataclass
class View:
    """A transformed batch.

    Attributes:
        data: ``(B, C, *size)``; 0 where the source shows nothing.
        body: ``(B, 1, *size)`` bool, the transformed body, or None where none was given; False outside of the window.
        affine: which transform made it.
    """

    data: Tensor
    body: Tensor | None
    affine: Affine


def central_crop(x: Tensor, size: Sequence[int]) -> Tensor:
    """The middle ``size`` voxels of ``(B, C, *window)``; a view of ``x`` that shares its memory."""
    for axis, n in enumerate(size, 2):
        x = x.narrow(axis, (x.shape[axis] - n) // 2, n)
    return x


def draw_affine(
    draws: Draws,
    size: Sequence[int],
    spacing: Sequence[float],
    *,
    rotation: Sequence[float] = (30.0,),
    scale: tuple[float, float] = (0.8, 1.25),
    shift: float = 0.0,
    mirror_axes: Sequence[int] = (),
    p: float = 1.0,
) -> Affine:
    """Draw one transform per sample. Rotations act in mm, so that they keep shapes on anisotropic voxels.

    Args:
        draws: where the random numbers come from.
        size: voxels of the output per axis; decides the unit of ``shift``.
        spacing: mm per voxel and axis.
        rotation: largest angle in degrees: one number in 2d, one per axis to turn about (z, y, x) in 3d (a single number
            stands for all three). Angles are uniform in [-r, r].
        scale: range of the magnification, uniform in its logarithm; 1.25 makes things look 1.25 times larger.
        shift: largest shift per axis, as a share of ``size``; uniform.
        mirror_axes: axes that are flipped with probability 0.5 each.
        p: probability that a sample is transformed at all (mirroring apart).

    Returns:
        The transforms on the draws' device.
    """
    dim = len(size)
    n_angles = 1 if dim == 2 else 3
    degrees = torch.tensor(list(rotation) * n_angles if len(rotation) == 1 else list(rotation), device=draws.device)
    angles = draws.uniform(-1, 1, n_angles) * degrees[:n_angles] * (math.pi / 180)
    magnify = draws.uniform(math.log(scale[0]), math.log(scale[1])).exp()
    moved = draws.uniform(-shift, shift, dim) * torch.tensor([float(s) for s in size], device=draws.device)
    flip = draws.chance(0.5, dim) & torch.tensor([a in mirror_axes for a in range(dim)], device=draws.device)
    on = draws.chance(p)
    angles, magnify = torch.where(on[:, None], angles, 0.0), torch.where(on, magnify, 1.0)
    mm = torch.tensor([float(s) for s in spacing], device=draws.device)
    matrix = _rotation(angles) / magnify[:, None, None]
    matrix = matrix * mm[None, None, :] / mm[None, :, None]  # mm of the output -> voxels of the window
    matrix = matrix * torch.where(flip, -1.0, 1.0)[:, None, :]
    return Affine(matrix, torch.where(on[:, None], moved, 0.0))


def _rotation(angles: Tensor) -> Tensor:
    """``(B, 1)`` or ``(B, 3)`` radians -> ``(B, 2, 2)`` or ``(B, 3, 3)``; about z, then y, then x, axes in array order."""
    cos, sin = angles.cos(), angles.sin()
    if angles.shape[1] == 1:
        return torch.stack([cos[:, 0], -sin[:, 0], sin[:, 0], cos[:, 0]], -1).view(-1, 2, 2)
    out = torch.eye(3, device=angles.device).expand(len(angles), 3, 3)
    for axis, (a, b) in enumerate(((1, 2), (0, 2), (0, 1))):
        turn = torch.eye(3, device=angles.device).repeat(len(angles), 1, 1)
        turn[:, a, a] = turn[:, b, b] = cos[:, axis]
        turn[:, a, b], turn[:, b, a] = -sin[:, axis], sin[:, axis]
        out = turn @ out
    return out


def sampling_grid(affine: Affine, size: Sequence[int], window: Sequence[int]) -> Tensor:
    """Where each output voxel lies in the window, as :func:`torch.nn.functional.grid_sample` wants it.

    Args:
        affine: ``B`` transforms.
        size: voxels of the output.
        window: voxels of the source.

    Returns:
        ``(B, *size, d)`` in units of the half window, last axis first, for ``align_corners=False``.
    """
    device, dtype = affine.matrix.device, affine.matrix.dtype
    axes = [torch.arange(n, device=device, dtype=dtype) - (n - 1) / 2 for n in size]
    output = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).view(1, -1, len(size))
    # A central crop starts at a whole voxel: an odd difference puts its centre half a voxel before the window's.
    odd = torch.tensor([((w - n) % 2) / 2 for n, w in zip(size, window)], device=device, dtype=dtype)
    place = output @ affine.matrix.transpose(1, 2) + (affine.shift - odd)[:, None]
    half = torch.tensor([w / 2 for w in window], device=device, dtype=dtype)
    return (place / half).flip(-1).view(-1, *size, len(size))


def warp(x: Tensor, grid: Tensor, mode: str = "bilinear") -> Tensor:
    """Sample ``(B, C, *window)`` at a :func:`sampling_grid`; 0 outside. Linear (``"bilinear"``, also in 3d) or ``"nearest"``."""
    return F.grid_sample(x, grid.to(x.dtype), mode=mode, padding_mode="zeros", align_corners=False)


def random_affine(
    data: Tensor,
    draws: Draws,
    size: Sequence[int],
    spacing: Sequence[float],
    *,
    body: Tensor | None = None,
    rotation: Sequence[float] = (30.0,),
    scale: tuple[float, float] = (0.8, 1.25),
    shift: float = 0.0,
    mirror_axes: Sequence[int] = (),
    p: float = 1.0,
) -> View:
    """Transform each sample of a batch by its own random affine map.

    Args:
        data: ``(B, C, *window)``; a window larger than ``size`` feeds what turns into view.
        draws: where the random numbers come from.
        size, spacing, rotation, scale, shift, mirror_axes, p: see :func:`draw_affine`.
        body: ``(B, 1, *window)`` bool, transformed along (half covered voxels count).

    Returns:
        The view; its tensors share no memory with ``data``.
    """
    affine = draw_affine(
        draws, size, spacing, rotation=rotation, scale=scale, shift=shift, mirror_axes=mirror_axes, p=p
    )
    if data.device.type == "cpu":  # where it saves time; elsewhere asking which samples turn would hold up the device
        source = data if body is None else torch.cat([data, body.to(data.dtype)], 1)
        out = _warp_turned(source, affine, size)
        c = data.shape[1]
        return View(out[:, :c], None if body is None else out[:, c:] >= 0.5, affine)
    grid = sampling_grid(affine, size, data.shape[2:])
    mask = None if body is None else warp(body.to(data.dtype), grid) >= 0.5
    return View(warp(data, grid), mask, affine)


def _warp_turned(x: Tensor, affine: Affine, size: Sequence[int]) -> Tensor:
    """Resample the samples of ``(B, C, *window)`` that are turned, scaled or shifted; cut out and flip the others.

    Returns:
        ``(B, C, *size)``, equal to :func:`warp` of all up to rounding.
    """
    same = (affine.matrix.abs() == torch.eye(len(size))).flatten(1).all(1) & (affine.shift == 0).all(1)
    out = x.new_empty(*x.shape[:2], *size)
    for i in torch.nonzero(same)[:, 0].tolist():
        flipped = [axis + 1 for axis in range(len(size)) if affine.matrix[i, axis, axis] < 0]
        out[i] = central_crop(x[i : i + 1], size)[0].flip(flipped)
    turned = torch.nonzero(~same)[:, 0]
    if len(turned):
        some = Affine(affine.matrix[turned], affine.shift[turned])
        out[turned] = warp(x[turned], sampling_grid(some, size, x.shape[2:]))
    return out
