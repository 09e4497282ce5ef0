"""Local corruption for restoration: pixel shuffling, non-linear intensities, in-painting; batched, on the device.

Kats et al. 2024, arXiv:2401.06473, section 2.2, with the numbers of the authors' code; a re-parameterised Models
Genesis (Zhou et al. 2021). Each sample draws its own corruption. Images are in [0, 1]; nothing is written in place,
so that the clean image stays clean.

Differs from the authors' code: block sizes never vanish on short axes (theirs does nothing where an axis has fewer
than 20 voxels); block starts reach the last voxel; each block has its own permutation unless asked otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nnssl.pretrain.augment.rng import StepRNG

if TYPE_CHECKING:
    from nnssl.pretrain.methods.hdense.method import HDenseConfig

SHUFFLE_SHARE = 5000 * 36 / (128 * 128 * 32)
"""Voxels of all shuffled blocks over voxels of the crop, in the authors' code on its 128x128x32 crops: 0.34."""
SAMPLES = 2048
LOOKED_UP = 1 << 15
"""Voxels whose intensities are mapped at once on a CPU: what is made of them stays in its caches."""


def genesis_transforms(u: Tensor, rng: StepRNG, config: HDenseConfig) -> Tensor:
    """Shuffle, then change intensities, then paint blocks of noise; ``(B, C, *size)`` in [0, 1], a new tensor."""
    c = config
    out = pixel_shuffle(u, rng, p=c.shuffle_p, blocks=c.shuffle_blocks, independent=c.independent_permutations)
    out = monotone_intensity(out, rng, p=c.nonlinear_p)
    return inpaint(out, rng, most=c.inpaint_max, again=c.inpaint_p)


def shuffle_block(size: Sequence[int]) -> tuple[int, ...]:
    """Voxels per axis of a shuffled block: a twentieth of the crop, at least 1.

    Where that is 1 on every axis, nothing would be shuffled: it is 2 on each axis with at least 8 voxels, or on all.
    """
    block = tuple(max(1, s // 20) for s in size)
    if max(block) > 1:
        return block
    block = tuple(2 if s >= 8 else 1 for s in size)
    return block if max(block) > 1 else tuple(min(2, s) for s in size)


def pixel_shuffle(u: Tensor, rng: StepRNG, *, p: float = 0.8, blocks: int = 0, independent: bool = True) -> Tensor:
    """Permute the voxels inside many small blocks, of a sample with probability ``p``; all channels alike.

    Sources are read from the image as it came in, and where blocks overlap the later one counts, so that every output
    value is an input value from less than a block away.

    Args:
        blocks: blocks per sample; 0: as many as give the same share of the crop as 5000 do of 128x128x32.
        independent: a permutation per block; False: one for all blocks of a sample, as in the released code.
    """
    size = u.shape[2:]
    block = shuffle_block(size)
    inside = math.prod(block)
    n = blocks or max(1, round(SHUFFLE_SHARE * math.prod(size) / inside))
    chosen = rng.chance(p)
    starts, orders = [], []
    for g in rng.generators():
        where = torch.rand(n, len(size), generator=g, device=g.device)
        keys = torch.rand(n if independent else 1, inside, generator=g, device=g.device)
        starts.append(where)
        orders.append(_order(keys).expand(n, -1))
    room = torch.tensor([s - b + 1 for s, b in zip(size, block)], device=u.device)
    start = torch.minimum((torch.stack(starts) * room).long(), room - 1)  # (B, n, dim)
    order = torch.stack(orders)  # (B, n, inside)
    weight = torch.tensor([math.prod(size[i + 1 :]) for i in range(len(size))], device=u.device)
    grid = torch.cartesian_prod(*[torch.arange(b, device=u.device) for b in block]).reshape(inside, len(size))
    offset = (grid * weight).sum(1)  # flat distance of each voxel of a block from its start
    first = (start * weight).sum(2)  # (B, n)
    target = (first[:, :, None] + offset).flatten(1)
    source = (first[:, :, None] + offset[order]).flatten(1)
    move = _write_in_order if u.device.type == "cpu" else _read_at_once
    return move(u, target, source, chosen)


def _order(keys: Tensor) -> Tensor:
    """What sorts each row of ``(n, inside)`` keys in [0, 1); NumPy sorts whole numbers five times as fast as torch argsorts."""
    if keys.device.type != "cpu":
        return keys.argsort()
    places, bits = torch.arange(keys.shape[1]), keys.shape[1].bit_length()
    packed = ((keys * 2**24).long() << bits) | places  # torch draws multiples of 2^-24
    packed.numpy().sort(axis=1)
    return packed & (2**bits - 1)


def _sources(target: Tensor, source: Tensor, chosen: Tensor, voxels: int) -> Tensor:
    """Where each voxel of ``(B, voxels)`` is read from when ``source`` is written to ``target``, both ``(B, n)``, in order."""
    rank = torch.arange(target.shape[1], device=target.device).expand_as(target)
    own = torch.arange(voxels, device=target.device).expand(len(target), -1)
    winner = torch.full_like(own, -1).scatter_reduce(1, target, rank, "amax")
    moved = (winner >= 0) & chosen[:, None]
    return torch.where(moved, source.gather(1, winner.clamp_min(0)), own)


def _read_at_once(u: Tensor, target: Tensor, source: Tensor, chosen: Tensor) -> Tensor:
    """As :func:`_write_in_order`, without a loop that a device would wait in."""
    index = _sources(target, source, chosen, math.prod(u.shape[2:]))
    return u.flatten(2).gather(2, index[:, None].expand(-1, u.shape[1], -1)).view_as(u)


def _write_in_order(u: Tensor, target: Tensor, source: Tensor, chosen: Tensor) -> Tensor:
    """Write voxels ``source`` of each chosen image to ``target``, both ``(B, n)``; in NumPy's order: the last one wins."""
    out = u.clone(memory_format=torch.contiguous_format)
    for i in torch.nonzero(chosen)[:, 0].tolist():
        to, where = target[i].numpy(), source[i].numpy()
        for written, read in zip(out[i].flatten(1).numpy(), u[i].flatten(1).numpy()):
            written[to] = read[where]
    return out


def monotone_intensity(u: Tensor, rng: StepRNG, *, p: float = 0.9) -> Tensor:
    """Map each channel's intensities, with probability ``p``, by a random non-decreasing curve from (0, 0) to (1, 1).

    The curve is a cubic Bezier with both control points uniform in the unit square; values outside [0, 1] saturate.
    """
    control = rng.uniform(0, 1, u.shape[1], 2, 2)  # (B, C, point, xy)
    chosen = rng.chance(p, u.shape[1])
    t = torch.linspace(0, 1, SAMPLES, device=u.device)
    basis = torch.stack([3 * (1 - t) ** 2 * t, 3 * (1 - t) * t**2])  # (point, T)
    curve = torch.einsum("bcpk,pt->bckt", control, basis) + t**3
    # Rounding must not make it fall.
    x, y = curve.cummax(3).values.clamp(0, 1).unbind(2)
    look_up = _look_up_chosen if u.device.type == "cpu" else _look_up_at_once
    return look_up(u, _on_grid(x, y), chosen)


def _look_up_chosen(u: Tensor, table: Tensor, chosen: Tensor) -> Tensor:
    """Map the chosen channels ``(B, C)`` of ``(B, C, *size)`` by tables ``(B, C, SAMPLES)``, see :func:`_look_up`."""
    out = u.clone(memory_format=torch.contiguous_format)
    for i, c in torch.nonzero(chosen).tolist():
        _look_up(out[i, c].view(-1), table[i, c])
    return out


def _look_up_at_once(u: Tensor, table: Tensor, chosen: Tensor) -> Tensor:
    """As :func:`_look_up_chosen`, without a loop that a device would wait in."""
    place = u.flatten(2).clamp(0, 1) * (SAMPLES - 1)
    i = place.long().clamp_max(SAMPLES - 2)
    below, above = table.gather(2, i), table[..., 1:].gather(2, i)
    mapped = torch.minimum(below + (place - i) * (above - below), above).view_as(u)
    return torch.where(chosen.view(*chosen.shape, *[1] * (u.ndim - 2)), mapped, u)


def _look_up(u: Tensor, table: Tensor) -> None:
    """Map ``(N,)`` in place by values at evenly spaced places of [0, 1], linearly between them."""
    for part in u.split(LOOKED_UP):
        place = part.clamp(0, 1).mul_(SAMPLES - 1)
        i = place.int().clamp_max_(SAMPLES - 2)
        below, above = table.index_select(0, i), table[1:].index_select(0, i)
        torch.minimum(place.sub_(i).mul_(above - below).add_(below), above, out=part)


def _on_grid(x: Tensor, y: Tensor) -> Tensor:
    """Curves ``y(x)``, ``(B, C, T)`` each and rising from 0 to 1, at T evenly spaced places of x."""
    grid = torch.linspace(0, 1, x.shape[-1], device=x.device).expand_as(x).contiguous()
    i = (torch.searchsorted(x.contiguous(), grid, right=True) - 1).clamp(0, x.shape[-1] - 2)
    x0, x1, y0, y1 = x.gather(2, i), x.gather(2, i + 1), y.gather(2, i), y.gather(2, i + 1)
    share = ((grid - x0) / (x1 - x0).clamp_min(1e-12)).clamp(0, 1)
    return torch.minimum(y0 + share * (y1 - y0), y1).cummax(2).values


def inpaint_size_range(size: int) -> tuple[int, int]:
    """Smallest and largest extent of a painted block along an axis of ``size`` voxels: a tenth to (excluded) a fifth of it."""
    low = max(1, size // 10)
    return low, max(low + 1, size // 5) - 1


def inpaint(u: Tensor, rng: StepRNG, *, most: int = 30, again: float = 0.95) -> Tensor:
    """Fill blocks with noise that is uniform in [0, 1), at least 3 voxels from the border where they fit.

    After each block (and before the first) another follows with probability ``again``, up to ``most``: 14.9 on average.
    """
    size = u.shape[2:]
    painted = (rng.uniform(0, 1, most) < again).cumprod(1).bool()  # (B, most)
    extent, place = rng.uniform(0, 1, most, len(size)), rng.uniform(0, 1, most, len(size))
    paint = _paint_blocks if u.device.type == "cpu" else _paint_at_once
    return paint(u, painted, extent, place, rng.generators())


def _paint_at_once(
    u: Tensor, painted: Tensor, extent: Tensor, place: Tensor, generators: Sequence[torch.Generator]
) -> Tensor:
    """All blocks of all crops, without a loop that a device would wait in; arguments as of :func:`_paint_blocks`."""
    size = u.shape[2:]
    cover = painted[:, :, None].float()  # (B, most, voxels so far)
    for axis, s in enumerate(size):
        start, length = _block(s, extent[..., axis], place[..., axis])
        i = torch.arange(s, device=u.device)
        inside = ((i >= start[..., None]) & (i < (start + length)[..., None])).float()  # (B, most, s)
        if axis < len(size) - 1:
            cover = (cover[:, :, :, None] * inside[:, :, None]).flatten(2)
        else:
            covered = torch.einsum("bnv,bns->bvs", cover, inside) > 0
    noise = torch.stack([torch.rand(u.shape[1:], generator=g, device=u.device) for g in generators])
    return torch.where(covered.view(-1, 1, *size), noise.to(u.dtype), u)


def _block(size: int, extent: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
    """First voxel and length of blocks on an axis of ``size`` voxels, from numbers in [0, 1)."""
    low, high = inpaint_size_range(size)
    length = low + (extent * (high - low + 1)).long().clamp_max(high - low)
    margin = ((size - length) // 2).clamp_max(3)
    room = size - length - 2 * margin + 1
    return margin + torch.minimum((place * room).long(), room - 1), length


def _paint_blocks(
    u: Tensor, painted: Tensor, extent: Tensor, place: Tensor, generators: Sequence[torch.Generator]
) -> Tensor:
    """Block after block, and noise for these alone: a twentieth of the crop on average.

    ``painted`` ``(B, most)`` is True for the blocks that there are, which come first; the others as of :func:`_block`.
    """
    out = u.clone(memory_format=torch.contiguous_format)
    axes = [_block(s, extent[..., a], place[..., a]) for a, s in enumerate(u.shape[2:])]
    starts, lengths = (torch.stack(v, -1).tolist() for v in zip(*axes))
    for image, n, first, size, g in zip(out, painted.sum(1).tolist(), starts, lengths, generators):
        for low, voxels in zip(first[:n], size[:n]):
            box = (slice(None), *[slice(a, a + k) for a, k in zip(low, voxels)])
            image[box] = torch.rand(len(image), *voxels, generator=g, dtype=u.dtype)
    return out
