"""Boxes of any size, shrunk to one by area averaging: wide views of a volume beside narrow ones."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from nnssl.pretrain.augment.draws import Draws
from nnssl.pretrain.augment.pairs import cut, image_bounds

if TYPE_CHECKING:
    from nnssl.pretrain.methods.base import Crops

__all__ = ["copy_box", "filled", "image_lengths", "place_boxes", "zoom"]


def filled(crops: Crops) -> tuple[Tensor, Tensor]:
    """The windows with each case's lowest intensity outside of the image, in place of 0, which is that of mean tissue.

    Returns:
        ``(B, C, *window)`` and which voxels lie in the image, ``(B, 1, *window)`` bool.
    """
    low, high = image_bounds(crops.data, crops.start)
    inside = torch.ones_like(crops.data[:, :1], dtype=torch.bool)
    for axis in range(low.shape[1]):
        shape = [1] * crops.data.ndim
        shape[2 + axis] = -1
        index = torch.arange(crops.data.shape[2 + axis], device=low.device).view(shape)
        first, last = (x[:, axis].view(-1, *[1] * (crops.data.ndim - 1)) for x in (low, high))
        inside = inside & (index >= first) & (index < last)
    lowest = crops.intensity[:, :, 0].to(crops.data.dtype).view(*crops.data.shape[:2], *[1] * low.shape[1])
    return torch.where(inside, crops.data, lowest), inside


def image_lengths(inside: Tensor) -> Tensor:
    """Voxels of the image per axis, ``(B, dim)`` float32; ``inside`` is the box ``(B, 1, *window)`` that :func:`filled` gives."""
    low, high = _bounds(inside)
    return high - low


def place_boxes(
    body: Tensor,
    inside: Tensor,
    extent: Tensor,
    draws: Draws,
    *,
    least: float = 0.25,
    tries: int = 10,
) -> Tensor:
    """Draw where boxes start: anywhere in the image, at the first of some places that shows enough body.

    On an axis that is longer than the image the box has the image in its middle, as far as the window allows.

    Args:
        body: ``(B, 1, *window)`` bool.
        inside: ``(B, 1, *window)`` bool, a box: where the image is.
        extent: ``(B, dim)`` voxels per axis, at most the window's.
        draws: random numbers of this step.
        least: share of body voxels in the box that is enough; where no place has it, the one with most is taken.
        tries: places that are tried.

    Returns:
        ``(B, dim)`` float32, first voxel; whole numbers.
    """
    window = torch.tensor(body.shape[2:], device=body.device)
    low, high = _bounds(inside)
    room = high - low - extent
    first = torch.where(room > 0, low, ((low + high - extent) / 2).floor())
    last = torch.minimum(torch.where(room > 0, (high - extent).floor(), first), (window - extent).floor())
    first = torch.minimum(first.clamp_min(0), last.clamp_min(0))
    share = draws.uniform(0, 1, tries, len(window))
    places = first[:, None] + (share * (last.clamp_min(0) - first + 1)[:, None]).floor()
    places = torch.minimum(places, last.clamp_min(0)[:, None])  # (B, tries, dim)
    size = torch.minimum(extent.round(), window)[:, None]
    found = _box_sums(body[:, 0], places.long(), (places + size).minimum(window).long()) / size.prod(-1)
    best = torch.where((found >= least).any(1), (found >= least).int().argmax(1), found.argmax(1))
    return places[torch.arange(len(places), device=places.device), best]


def _bounds(inside: Tensor) -> tuple[Tensor, Tensor]:
    """First voxel inside and first behind, ``(B, dim)`` float32, of a box ``(B, 1, *window)``."""
    low, high, dim = [], [], inside.ndim - 2
    for axis in range(dim):
        line = inside[:, 0]
        for other in reversed([a for a in range(dim) if a != axis]):
            line = line.any(1 + other)
        index = torch.arange(line.shape[1], device=line.device)
        high.append((line * (index + 1)).amax(1))
        low.append(line.shape[1] - (line * (line.shape[1] - index)).amax(1))
    return torch.stack(low, 1).float(), torch.stack(high, 1).float()


def _box_sums(body: Tensor, start: Tensor, stop: Tensor) -> Tensor:
    """Number of True voxels of ``(B, *window)`` in boxes ``(B, n, dim)``: ``(B, n)``, from an integral image."""
    total = body.to(torch.int32)
    for axis in range(1, body.ndim):
        total = total.cumsum(axis, dtype=torch.int32)
    total = F.pad(total, [1, 0] * (body.ndim - 1))
    sample = torch.arange(len(body), device=body.device)[:, None]
    out = torch.zeros(start.shape[:2], device=body.device)
    for corner in itertools.product((0, 1), repeat=body.ndim - 1):
        index = [stop[..., a] if upper else start[..., a] for a, upper in enumerate(corner)]
        out += (-1) ** (corner.count(0)) * total[(sample, *index)].float()
    return out


def zoom(x: Tensor, start: Tensor, extent: Tensor, size: Sequence[int], mirror: Tensor | None = None) -> Tensor:
    """Shrink a box of each sample by exact area averaging: a voxel of the result is the mean of what it covers.

    Nothing overshoots and nothing aliases; where the box is as large as the result and starts at a whole voxel, it is copied.

    Args:
        x: ``(B, C, *window)`` floating.
        start: ``(B, dim)`` first voxel of each box; may be fractional.
        extent: ``(B, dim)`` voxels per axis, at least ``size``.
        size: voxels per axis of the result.
        mirror: ``(B, dim)`` bool, axes to flip.

    Returns:
        ``(B, C, *size)``.
    """
    for axis, n in enumerate(size):
        step = extent[:, axis] / n
        edge = torch.arange(n + 1, device=x.device) * step[:, None] + start[:, axis, None]  # (B, n + 1)
        voxel = torch.arange(x.shape[2 + axis], device=x.device)
        upper = torch.minimum(edge[:, 1:, None], voxel + 1.0)
        weight = (upper - torch.maximum(edge[:, :-1, None], voxel.float())).clamp_min(0)
        weight = weight / weight.sum(-1, keepdim=True).clamp_min(1e-6)
        if mirror is not None:
            weight = torch.where(mirror[:, axis].view(-1, 1, 1), weight.flip(1), weight)
        x = x.movedim(2 + axis, -1)
        shape = x.shape
        flat = x.reshape(shape[0], -1, shape[-1])
        with torch.autocast(x.device.type, enabled=False):
            x = torch.bmm(flat, weight.transpose(1, 2).to(flat.dtype)).view(*shape[:-1], n).movedim(-1, 2 + axis)
    return x.contiguous()


def copy_box(x: Tensor, start: Tensor, extent: Tensor, size: Sequence[int], mirror: Tensor | None = None) -> Tensor:
    """As :func:`zoom` where the extent is the size and boxes start at whole voxels: a copy, without arithmetic."""
    x = cut(x, start.long(), size)
    if mirror is not None:
        for axis in range(len(size)):
            flip = mirror[:, axis].view(-1, *[1] * (x.ndim - 1))
            x = torch.where(flip, x.flip(2 + axis), x)
    return x
