"""Rotation, scaling, shift and mirroring of a batch of crops in one ``grid_sample``, for 2d and 3d and any spacing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor

from nnssl.pretrain.augment.box import ImageBox, in_box
from nnssl.pretrain.augment.rng import StepRNG
from nnssl.pretrain.geometry import read_size_for, rotation_degrees

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from nnssl.plans import Plan

PLANES_FROM = 16**3
"""Voxels of a view from which on it is sampled plane by plane on a CPU."""


@dataclass
class Affine:
    """Maps voxels of the output to voxels of the window, both counted from their centres: ``window = matrix @ output + shift``.

    Attributes:
        matrix: ``(B, d, d)`` in voxels, axes in array order (z, y, x or y, x).
        shift: ``(B, d)`` in voxels of the window.
    """

    matrix: Tensor
    shift: Tensor

    @property
    def rows(self) -> Tensor:
        """``(B, d, d + 1)``: matrix and shift beside each other."""
        return torch.cat([self.matrix, self.shift[..., None]], -1)

    @classmethod
    def from_rows(cls, rows: Tensor) -> Affine:
        """Undo :attr:`rows`."""
        return cls(rows[..., :-1], rows[..., -1])


@dataclass(frozen=True)
class AffineRange:
    """What transforms are drawn from. Rotations act in mm, so that they keep shapes on anisotropic voxels.

    Attributes:
        size: voxels of the output per axis; decides the unit of ``shift``.
        spacing: mm per voxel and axis.
        rotation: largest angle in degrees: one number in 2d, one per axis to turn about (z, y, x) in 3d (a single number
            stands for all three). Angles are uniform in [-r, r].
        scale: range of the magnification, uniform in its logarithm; 1.25 makes things look 1.25 times larger.
        shift: largest shift per axis, as a share of ``size``; uniform.
        mirror_axes: axes that are flipped with probability 0.5 each.
        p: probability that a sample is transformed at all (mirroring apart).
    """

    size: tuple[int, ...]
    spacing: tuple[float, ...]
    rotation: Sequence[float] = (30.0,)
    scale: tuple[float, float] = (0.8, 1.25)
    shift: float = 0.0
    mirror_axes: Sequence[int] = ()
    p: float = 1.0

    @classmethod
    def of(
        cls,
        plan: Plan,
        size: Sequence[int],
        degrees: float,
        scale: tuple[float, float],
        *,
        mirror: bool = False,
        **more: Any,
    ) -> AffineRange:
        """For views of a plan: turned by at most ``degrees`` where slices are not too thick, flipped on every axis or none."""
        axes = tuple(range(len(size))) if mirror else ()
        rotation = rotation_degrees(plan.spacing, degrees)
        return cls(tuple(size), plan.spacing, rotation, scale, mirror_axes=axes, **more)

    def read_size(self, median: Sequence[int] | None = None) -> tuple[int, ...]:
        """Voxels to read, see :func:`~nnssl.pretrain.geometry.read_size_for`."""
        views = {"min_scale": self.scale[0], "shift": self.shift}
        return read_size_for(self.size, self.spacing, rotation=self.rotation, median=median, **views)

    def draw(self, rng: StepRNG) -> Affine:
        """One transform for each sample, on the device of ``rng``."""
        dim, device = len(self.size), rng.device
        n_angles = 1 if dim == 2 else 3
        degrees = torch.tensor(
            [*self.rotation] * n_angles if len(self.rotation) == 1 else [*self.rotation], device=device
        )
        angles = rng.uniform(-1, 1, n_angles) * degrees[:n_angles] * (math.pi / 180)
        magnify = rng.uniform(math.log(self.scale[0]), math.log(self.scale[1])).exp()
        moved = rng.uniform(-self.shift, self.shift, dim) * torch.tensor([float(s) for s in self.size], device=device)
        flip = rng.chance(0.5, dim) & torch.tensor([a in self.mirror_axes for a in range(dim)], device=device)
        on = rng.chance(self.p)
        angles, magnify = torch.where(on[:, None], angles, 0.0), torch.where(on, magnify, 1.0)
        mm = torch.tensor([float(s) for s in self.spacing], device=device)
        matrix = _rotation(angles) / magnify[:, None, None]
        matrix = matrix * mm[None, None, :] / mm[None, :, None]  # mm of the output -> voxels of the window
        matrix = matrix * torch.where(flip, -1.0, 1.0)[:, None, :]
        return Affine(matrix, torch.where(on[:, None], moved, 0.0))

    def view(self, data: Tensor, rng: StepRNG) -> Tensor:
        """Each window ``(B, C, *window)`` under a transform of its own: ``(B, C, *size)``."""
        return apply_affine(data, self.draw(rng), self.size).data


class Ranges(TypedDict, total=False):
    """The fields of :class:`AffineRange` that :func:`random_affine` takes."""

    rotation: Sequence[float]
    scale: tuple[float, float]
    shift: float
    mirror_axes: Sequence[int]
    p: float


@dataclass
class View:
    """A transformed batch.

    Attributes:
        data: ``(B, C, *size)``; where the source shows nothing, 0 or what a box says.
        body: ``(B, 1, *size)`` bool, the transformed body, or None where none was given; False outside of the window.
        affine: which transform made it; None for a mere cut.
        inside: ``(B, 1, *size)`` bool, which voxels show the image, or None where nobody said where it is.
    """

    data: Tensor
    body: Tensor | None
    affine: Affine | None
    inside: Tensor | None = None

    @property
    def shown(self) -> Tensor:
        """Which voxels count: the body where it was given, else what shows the image."""
        shown = self.inside if self.body is None else self.body
        if shown is None:
            raise ValueError("neither a body nor a box was given")
        return shown


def central_crop(x: Tensor, size: Sequence[int]) -> Tensor:
    """The middle ``size`` voxels of ``(B, C, *window)``; a view of ``x`` that shares its memory."""
    for axis, n in enumerate(size, 2):
        x = x.narrow(axis, (x.shape[axis] - n) // 2, n)
    return x


def _rotation(angles: Tensor) -> Tensor:
    """``(B, 1)`` or ``(B, 3)`` radians -> ``(B, 2, 2)`` or ``(B, 3, 3)``; about z, then y, then x, axes in array order."""
    cos, sin = angles.cos(), angles.sin()
    if angles.shape[1] == 1:
        return torch.stack([cos[:, 0], -sin[:, 0], sin[:, 0], cos[:, 0]], -1).view(-1, 2, 2)
    (a, b, c), (p, q, r) = cos.unbind(1), sin.unbind(1)
    one, zero = torch.ones_like(a), torch.zeros_like(a)
    about_z = (one, zero, zero, zero, a, -p, zero, p, a)
    about_y = (b, zero, -q, zero, one, zero, q, zero, b)
    about_x = (c, -r, zero, r, c, zero, zero, zero, one)
    z, y, x = (torch.stack(turn, 1).view(-1, 3, 3) for turn in (about_z, about_y, about_x))
    return x @ (y @ z)


def is_still(affine: Affine) -> Tensor:
    """``(B,)`` bool, transforms that do nothing but mirror."""
    axes = torch.eye(affine.matrix.shape[1], device=affine.matrix.device)
    return (affine.matrix.abs() == axes).flatten(1).all(1) & (affine.shift == 0).all(1)


def reach(affine: Affine, size: Sequence[int], window: Sequence[int]) -> Tensor:
    """Voxels per axis in the middle of each window that its view of ``size`` looks at: ``(B, d)`` int64, at most the window's.

    As odd or even as the window, so that the middle stays where it is.
    """
    whole, inner = (torch.tensor([int(n) for n in v], device=affine.matrix.device) for v in (window, size))
    half = (affine.matrix.abs() * ((inner - 1) / 2)).sum(2) + (affine.shift - (whole - inner) % 2 / 2).abs()
    # a place between two voxels needs both; a hundredth of a voxel is for rounding
    left = ((whole - 1) / 2 - half - 1.01).floor().long()
    left = torch.where(is_still(affine)[:, None], (whole - inner) // 2, left)
    return whole - 2 * torch.minimum(left.clamp_min(0), (whole - inner) // 2)


def sampling_grid(affine: Affine, size: Sequence[int], window: Sequence[int]) -> Tensor:
    """Where each output voxel lies in the window, as :func:`torch.nn.functional.grid_sample` wants it without aligned corners:
    ``(B, *size, d)`` in units of the half window, last axis first."""
    device, dtype, dim = affine.matrix.device, affine.matrix.dtype, len(size)
    grid = torch.empty(len(affine.matrix), *size, dim, device=device, dtype=dtype)
    for row, (n_out, n_in) in enumerate(zip(size, window)):
        # A central crop starts at a whole voxel: an odd difference puts its centre half a voxel before the window's.
        place = (affine.shift[:, row] - ((n_in - n_out) % 2) / 2).view(-1, *[1] * dim)
        for axis, n in enumerate(size):  # a line for each axis, summed up: far less work than a product for each voxel
            line = (torch.arange(n, device=device, dtype=dtype) - (n - 1) / 2) * affine.matrix[:, row, axis, None]
            place = place + line.view(-1, *[n if a == axis else 1 for a in range(dim)])
        grid[..., dim - 1 - row] = place / (n_in / 2)
    return grid


def warp(x: Tensor, grid: Tensor, mode: str = "bilinear") -> Tensor:
    """Sample ``(B, C, *window)`` at a :func:`sampling_grid`; 0 outside. Linear (``"bilinear"``, also in 3d) or ``"nearest"``.

    Large 3d images are sampled on a CPU by :func:`_warp_planes`, which is faster and as exact as 0.005 voxels.
    """
    large = x.ndim == 5 and grid[0, ..., 0].numel() >= PLANES_FROM and not (x.requires_grad or grid.requires_grad)
    if large and mode == "bilinear" and x.device.type == "cpu" and x.dtype == torch.float32:
        return _warp_planes(x, grid.float())
    return F.grid_sample(x, grid.to(x.dtype), mode=mode, padding_mode="zeros", align_corners=False)


def _warp_planes(x: Tensor, grid: Tensor) -> Tensor:
    """Linear sampling of ``(B, C, D, H, W)`` in 2d, which torch does fast on a CPU.

    All planes are put below each other, a row of zeros around each; a voxel is the mean of two bilinear samples, from the plane
    before it and from the one behind. Places are exact to about ``D H / 2^23`` voxels.
    """
    batch, channels, depth, height, width = x.shape
    size, rows = grid.shape[1:4], (depth + 3) * (height + 2)
    planes = x.new_zeros(batch, channels, depth + 4, height + 2, width)
    planes[:, :, 1 : depth + 1, 1 : height + 1] = x
    z = grid[..., 2].mul(depth / 2).add_((depth - 1) / 2)
    first = z.floor().clamp_(-1, depth)
    share = z.sub_(first).clamp_(0, 1).view(batch, -1, size[2])
    row = grid[..., 1].mul(height / 2).add_((height - 1) / 2).clamp_(-1, height)
    row.add_(first, alpha=height + 2).add_(height + 3.5).mul_(2 / rows).sub_(1)
    place = torch.stack([grid[..., 0], row], -1).view(batch, -1, size[2], 2)
    out = x.new_empty(batch, channels, place.shape[1], size[2])
    for channel in range(channels):
        # Two channels that share their memory: the planes, and the planes from the second one on.
        first_row = planes[:, channel].storage_offset()
        strides = (planes.stride(0), planes.stride(2), width, 1)
        both = planes.as_strided((batch, 2, rows, width), strides, first_row)
        found = F.grid_sample(both, place, mode="bilinear", padding_mode="zeros", align_corners=False)
        torch.lerp(found[:, 0], found[:, 1], share, out=out[:, channel])
    return out.view(batch, channels, *size)


def random_affine(
    data: Tensor,
    rng: StepRNG,
    size: Sequence[int],
    spacing: Sequence[float],
    *,
    body: Tensor | None = None,
    box: ImageBox | None = None,
    **ranges: Unpack[Ranges],
) -> View:
    """Transform each sample of a batch by its own random affine map.

    Args:
        data: ``(B, C, *window)``; a window larger than ``size`` feeds what turns into view.
        rng: where the random numbers come from.
        size, spacing, ranges: ``rotation``, ``scale``, ``shift``, ``mirror_axes`` and ``p``, see :class:`AffineRange`.
        body: ``(B, 1, *window)`` bool, transformed along (half covered voxels count).
        box: where the image is; the view then shows its lowest intensity elsewhere, in place of 0.

    Returns:
        The view; its tensors share no memory with ``data``.
    """
    return apply_affine(data, AffineRange(tuple(size), tuple(spacing), **ranges).draw(rng), size, body=body, box=box)


def apply_affine(
    data: Tensor, affine: Affine, size: Sequence[int], *, body: Tensor | None = None, box: ImageBox | None = None
) -> View:
    """Transform each sample of a batch by its map; arguments and result as of :func:`random_affine`.

    On a CPU samples go one by one, each in as much of its window as it looks at: what is read around that does not matter.
    """
    if data.device.type != "cpu":  # asking which samples turn would hold up the device
        return _resample(data, affine, size, body, box)
    turned = torch.nonzero(~is_still(affine))[:, 0].tolist()
    if len(turned) < len(data):
        view = cut_out(data, size, body=body, box=box, affine=affine)
    else:
        seen = None if body is None else body.new_empty(len(data), 1, *size)
        inside = None if box is None else torch.empty(len(data), 1, *size, dtype=torch.bool)
        view = View(data.new_empty(*data.shape[:2], *size), seen, affine, inside)
    for i, window in zip(turned, reach(affine, size, data.shape[2:])[turned].tolist() if turned else ()):
        some = slice(i, i + 1)
        left = torch.tensor([(n - w) // 2 for n, w in zip(data.shape[2:], window)])
        there = None if box is None else box[some].within(left, torch.tensor(window))
        mask = None if body is None else central_crop(body[some], window)
        own = Affine(affine.matrix[some], affine.shift[some])
        new = _resample(central_crop(data[some], window), own, size, mask, there)
        view.data[some] = new.data
        if view.body is not None and new.body is not None:
            view.body[some] = new.body
        if view.inside is not None and new.inside is not None:
            view.inside[some] = new.inside
    return view


def cut_out(
    data: Tensor,
    size: Sequence[int],
    *,
    body: Tensor | None = None,
    box: ImageBox | None = None,
    affine: Affine | None = None,
) -> View:
    """The middle of each window, flipped where ``affine`` does; equal to resampling by one that does nothing else."""
    flip = None if affine is None else affine.matrix.diagonal(dim1=1, dim2=2) < 0  # (B, dim)
    out = _flipped(central_crop(data, size), flip)
    mask = None if body is None else _flipped(central_crop(body, size), flip)
    if box is None:
        return View(out, mask, affine)
    inner = torch.tensor(size, device=data.device)
    first = (torch.tensor(data.shape[2:], device=data.device) - inner) // 2
    low, high = box.low - first, box.high - first
    if flip is not None:
        low, high = torch.where(flip, inner - high, low), torch.where(flip, inner - low, high)
    if data.device.type == "cpu" and bool(((low <= 0) & (high >= inner)).all()):
        return View(out, mask, affine, torch.ones(len(out), 1, *size, dtype=torch.bool))
    inside = in_box(low, high, size)
    return View(torch.where(inside, out, box.dark), mask, affine, inside)


def _flipped(x: Tensor, flip: Tensor | None) -> Tensor:
    """A copy of ``(B, C, *size)``, flipped where ``(B, dim)`` says so."""
    if flip is None:
        return x.clone(memory_format=torch.contiguous_format)
    axes = [[axis + 1 for axis, yes in enumerate(row) if yes] for row in flip.tolist()]
    return torch.stack([sample.flip(a) for sample, a in zip(x, axes)])


def _resample(data: Tensor, affine: Affine, size: Sequence[int], body: Tensor | None, box: ImageBox | None) -> View:
    """Each sample through linear interpolation."""
    window = data.shape[2:]
    grid = sampling_grid(affine, size, window)
    out = warp(data, grid)
    mask = None if body is None else warp(body.to(data.dtype), grid) >= 0.5
    if box is None:
        return View(out, mask, affine)
    if data.device.type == "cpu" and _looks_inside(affine, size, window, box):
        return View(out, mask, affine, torch.ones(len(out), 1, *size, dtype=torch.bool))
    ends = torch.tensor(window, device=data.device).expand_as(box.high)
    image, whole = _share(grid, window, box.low, box.high), _share(grid, window, torch.zeros_like(ends), ends)
    inside = image >= 0.5
    filled = out + box.dark * (whole - image)  # the window's padding is 0: what it adds is the lowest intensity
    return View(torch.where(inside, filled, box.dark), mask, affine, inside)


def _looks_inside(affine: Affine, size: Sequence[int], window: Sequence[int], box: ImageBox) -> bool:
    """Whether all places of all views lie between voxels of the image, so that nothing else adds to them."""
    whole, inner = torch.tensor(window), torch.tensor(size)
    half = (affine.matrix.abs() * ((inner - 1) / 2)).sum(2) + 0.01
    middle = (whole - 1) / 2 + affine.shift - (whole - inner) % 2 / 2
    return bool(((middle - half >= box.low) & (middle + half <= box.high - 1)).all())


def _share(grid: Tensor, window: Sequence[int], low: Tensor, high: Tensor) -> Tensor:
    """What linear interpolation would make of an image that is 1 in a box from ``low`` to ``high`` ``(B, d)`` and 0 elsewhere,
    a product over the axes: ``(B, 1, *size)`` in [0, 1]."""
    out = torch.ones_like(grid[..., 0])
    for axis, n in enumerate(window):
        half, middle = (
            x.view(-1, *[1] * (grid.ndim - 2)) for x in ((high - low)[:, axis] / 2, (low + high - n)[:, axis] / 2)
        )
        away = (grid[..., -1 - axis] * (n / 2)).sub_(middle).abs_()  # voxels from the middle of the box
        out *= away.neg_().add_(half + 0.5).clamp_(0, 1)
    return out[:, None]
