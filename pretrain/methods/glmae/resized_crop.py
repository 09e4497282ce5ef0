"""Boxes of any size, shrunk to one by area averaging: wide views of a volume beside narrow ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nnssl.pretrain.augment.box import ImageBox, outer
from nnssl.pretrain.augment.pairs import cut
from nnssl.pretrain.augment.rng import StepRNG


def sample_boxes(
    body: Tensor,
    box: ImageBox,
    extent: Tensor,
    rng: StepRNG,
    *,
    least: float = 0.25,
    tries: int = 10,
) -> Tensor:
    """Draw where boxes of ``extent`` ``(B, dim)`` voxels start: anywhere in the image, at the first place with enough body.

    Where no place has ``least`` of it, that with most is taken. On an axis that is longer than the image the box has the image in
    its middle, as far as the window allows.

    Args:
        body: ``(B, 1, *window)`` floating zeros and ones.

    Returns:
        ``(B, dim)`` float32, first voxel; whole numbers.
    """
    window = torch.tensor(body.shape[2:], device=body.device)
    low, high = box.low.float(), box.high.float()
    room = high - low - extent
    first = torch.where(room > 0, low, ((low + high - extent) / 2).floor())
    last = torch.minimum(torch.where(room > 0, (high - extent).floor(), first), (window - extent).floor())
    first = torch.minimum(first.clamp_min(0), last.clamp_min(0))
    share = rng.uniform(0, 1, tries, len(window))
    places = first[:, None] + (share * (last.clamp_min(0) - first + 1)[:, None]).floor()
    places = torch.minimum(places, last.clamp_min(0)[:, None])  # (B, tries, dim)
    size = torch.minimum(extent.round(), window)[:, None]
    start, stop = places.long(), (places + size).minimum(window).long()
    first_enough = _first_enough if body.device.type == "cpu" else _first_enough_at_once
    best = first_enough(body[:, 0], start, stop, size.prod(-1)[:, 0], least)
    return places[torch.arange(len(places), device=places.device), best]


def _first_enough(body: Tensor, start: Tensor, stop: Tensor, volume: Tensor, least: float) -> Tensor:
    """The first of each sample's boxes in which the share of body is enough, else the one with most: ``(B,)`` int64.

    Boxes are ``(B, n, dim)``, their ``volume`` ``(B,)``. None is looked at once one is enough, which the first mostly is.
    """
    best = []
    for image, whole, lows, highs in zip(body, volume, start.tolist(), stop.tolist()):
        shares: list[Tensor] = []
        for low, high in zip(lows, highs):
            shares.append(image[tuple(slice(a, b) for a, b in zip(low, high))].sum() / whole)
            if shares[-1] >= least:
                break
        best.append(int(torch.stack(shares).argmax()))  # what is enough is more than all before it
    return torch.tensor(best)


def _first_enough_at_once(body: Tensor, start: Tensor, stop: Tensor, volume: Tensor, least: float) -> Tensor:
    """As :func:`_first_enough`, of all boxes: asking a device after each of them would hold it up."""
    share = _box_sums(body, start, stop) / volume[:, None]
    enough = share >= least
    return torch.where(enough.any(1), enough.int().argmax(1), share.argmax(1))


def _box_sums(body: Tensor, start: Tensor, stop: Tensor) -> Tensor:
    """Sum of ``(B, *window)`` over boxes ``(B, n, dim)``: ``(B, n)``, axis by axis. Of zeros and ones exact up to 2^24."""
    lines = []
    for axis, n in enumerate(body.shape[1:]):
        voxel = torch.arange(n, device=body.device)
        lines.append((voxel >= start[..., axis, None]) & (voxel < stop[..., axis, None]))  # (B, n, voxels of the axis)
    # The last axis of the whole window is the large one, and goes through a matrix product; what is left is small.
    with torch.autocast(body.device.type, enabled=False):
        total = torch.bmm(body.flatten(1, -2), lines[-1].to(body.dtype).transpose(1, 2))
    for line in reversed(lines[:-1]):
        total = (total.unflatten(1, (-1, line.shape[2])) * line.transpose(1, 2)[:, None]).sum(2)
    return total[:, 0]


def _edges(start: Tensor, extent: Tensor, n: int, mirror: Tensor | None) -> tuple[Tensor, Tensor]:
    """Where each of the ``n`` voxels of the result begins and ends in the window, on one axis: ``(B, n)`` both."""
    index = torch.arange(n, device=start.device).expand(len(start), n)
    if mirror is not None:
        index = torch.where(mirror[:, None], n - 1 - index, index)
    step = (extent / n)[:, None]
    return index * step + start[:, None], (index + 1) * step + start[:, None]


def box_share(
    box: ImageBox, start: Tensor, extent: Tensor, size: Sequence[int], mirror: Tensor | None = None
) -> Tensor:
    """How much of what each voxel of :func:`resized_crop` covers is image: ``(B, 1, *size)`` in [0, 1], exactly 1 where all
    is."""
    lines = []
    for axis, n in enumerate(size):
        lower, upper = _edges(start[:, axis], extent[:, axis], n, None if mirror is None else mirror[:, axis])
        low, high = box.low[:, axis, None], box.high[:, axis, None]
        lines.append((torch.minimum(upper, high) - torch.maximum(lower, low)).clamp_min(0) / (upper - lower))
    return outer(lines)


def resized_crop(x: Tensor, start: Tensor, extent: Tensor, size: Sequence[int], mirror: Tensor | None = None) -> Tensor:
    """Shrink a box of each sample by exact area averaging: a voxel of the result is the mean of what it covers.

    Nothing overshoots and nothing aliases; where the box is as large as the result and starts at a whole voxel, it is copied.

    Args:
        x: ``(B, C, *window)`` floating.
        start: ``(B, dim)`` first voxel of each box; may be fractional.
        extent: ``(B, dim)`` voxels per axis, at least ``size``.
        mirror: ``(B, dim)`` bool, axes to flip.
    """
    for axis in reversed(range(len(size))):  # the last axis lies in memory as the matrix product wants it
        lower, upper = _edges(start[:, axis], extent[:, axis], size[axis], None if mirror is None else mirror[:, axis])
        voxel = torch.arange(x.shape[2 + axis], device=x.device)
        weight = torch.minimum(upper[..., None], voxel + 1.0) - torch.maximum(lower[..., None], voxel.float())
        weight = weight.clamp_min(0)
        weight = (weight / weight.sum(-1, keepdim=True).clamp_min(1e-6)).to(x.dtype)  # (B, n, voxels of the axis)
        with torch.autocast(x.device.type, enabled=False):
            if axis == len(size) - 1:
                done = torch.bmm(x.flatten(1, -2), weight.transpose(1, 2))
                x = done.view(*x.shape[:-1], size[axis])
            else:
                rest = x.flatten(3 + axis).flatten(1, 1 + axis)  # (B, all before, voxels, all behind)
                x = (weight[:, None] @ rest).view(*x.shape[: 2 + axis], size[axis], *size[axis + 1 :])
    return x


def copy_box(x: Tensor, start: Tensor, extent: Tensor, size: Sequence[int], mirror: Tensor | None = None) -> Tensor:
    """As :func:`resized_crop` where the extent is the size and boxes start at whole voxels: a copy, without arithmetic."""
    x = cut(x, start.long(), size)
    if mirror is not None:
        for axis in range(len(size)):
            flip = mirror[:, axis].view(-1, *[1] * (x.ndim - 1))
            x = torch.where(flip, x.flip(2 + axis), x)
    return x
