"""Crops of a window of cells: which cells can be used, where random crops lie, and changes that each crop gets by itself."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from nnssl.intensity import add_noise, bend, gaussian_blur, resample, rescale_intensity, restore_intensity, where_chosen
from nnssl.losses.overlap import base_crops, overlap_labels
from nnssl.pretrain.augment.rng import StepRNG

TRIES = 16
"""Places that are tried for a random crop before it is left out."""

LEAST_INSIDE, LEAST_OVERLAP = 0.25, 0.5
"""Least share of a cell in the image, and of a random crop in cells that are used."""

LEAST_BODY = 0.01
"""A cell with less body is air; two cells of air look alike."""

_COARSE = 3.0  # an axis this much coarser than the finest is neither blurred nor sampled down, as in nnU-Net


def usable_cells(windows: Tensor, inside: Tensor, body: Tensor, grid: Sequence[int]) -> Tensor:
    """Cells ``(B, n)`` bool that show something: a quarter of it in the image, some body, and not constant."""
    base = base_crops(windows, grid).flatten(3)
    low, high = base.aminmax(dim=3)
    spread = (high - low).amax(2)
    # a matrix product adds bytes up as fast as they are read
    masks = torch.cat([inside, body & inside], 1)
    cells = base_crops(masks, grid).flatten(3).to(windows.dtype)
    seen, tissue = (cells @ cells.new_ones(cells.shape[3]) / cells.shape[3]).unbind(2)
    return (seen >= LEAST_INSIDE) & (tissue >= LEAST_BODY) & (spread > 1e-6)


def draw_offsets(
    rng: StepRNG, size: Sequence[int], grid: Sequence[int], n: int, usable: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Place random crops anywhere in the window, both ends included; drawn again where half of one lies in no usable cell.

    Returns:
        Offsets ``(B, n, dim)`` int64; overlaps with usable cells ``(B, n, cells)`` float32, which add up to 1; and ``(B, n)``
        bool, False for a crop for which no place was found.
    """
    room = torch.tensor([(g - 1) * c + 1 for c, g in zip(size, grid)], device=usable.device)
    share = rng.uniform(0, 1, TRIES, n, len(grid))
    places = torch.minimum((share * room).long(), room - 1)  # (B, TRIES, n, dim)
    overlap = overlap_labels(places, size, grid) * usable[:, None, None]
    kept = overlap.sum(-1)
    fits = kept >= LEAST_OVERLAP
    pick = fits.int().argmax(1)  # the first that fits
    sample, crop = torch.arange(len(usable), device=usable.device)[:, None], torch.arange(n, device=usable.device)[None]
    overlap, kept = overlap[sample, pick, crop], kept[sample, pick, crop]
    return places[sample, pick, crop], overlap / kept.clamp_min(1e-6)[..., None], fits.any(1)


def flip_and_turn(
    x: Tensor, rng: StepRNG, spacing: Sequence[float], *, mirror: float, rot90: float, own: bool = False
) -> Tensor:
    """Flip every axis of each crop, and turn it in the last plane of axes whose spacings and sizes are equal (none: no turn).

    Crops are changed by themselves, after they were cut: where one lies stays true.

    Args:
        x: ``(B, K, C, *size)``, K crops of each window.
        mirror: probability of a flip, per axis.
        rot90: probability of a quarter turn (or two or three).
        own: ``x`` may be changed in place.
    """
    k, size, shape = x.shape[1], x.shape[3:], x.shape
    x = x.flatten(0, 1) if own or (mirror <= 0 and rot90 <= 0) else x.flatten(0, 1).clone()
    for axis in range(len(size)):
        x = where_chosen(x, rng.chance(mirror, k).flatten(), partial(_flipped, x, 2 + axis), own=True)
    turned, quarters = rng.chance(rot90, k).flatten(), rng.integers(1, 4, k).flatten()
    planes = [(a, b) for b in range(len(size)) for a in range(b) if size[a] == size[b] and spacing[a] == spacing[b]]
    if planes and rot90 > 0:
        axes = [2 + a for a in planes[-1]]
        for n in (1, 2, 3):  # no crop is chosen twice
            x = where_chosen(x, turned & (quarters == n), partial(_turned, x, n, axes), own=True)
    return x.view(shape)


def _flipped(x: Tensor, axis: int, rows: Tensor | slice) -> Tensor:
    return x[rows].flip(axis)


def _turned(x: Tensor, quarters: int, axes: list[int], rows: Tensor | slice) -> Tensor:
    return x[rows].rot90(quarters, axes)


def augment_intensity(x: Tensor, bounds: Tensor, rng: StepRNG, spacing: Sequence[float], *, p: float) -> Tensor:
    """Gamma, blur, half the resolution and noise of ``(B, K, C, *size)``, each with probability ``p``.

    (Brightness and contrast cancel in InstanceNorm.) Intensities ``bounds`` ``(B, C, 2)`` count as 0 and 1.
    """
    k, size, shape = x.shape[1], x.shape[3:], x.shape
    flat, fine = x.flatten(0, 1), [s < _COARSE * min(spacing) for s in spacing]

    gamma, exponent = rng.chance(p, k), rng.uniform(math.log(0.7), math.log(1.5), k).exp()
    u, exponent = rescale_intensity(flat, bounds.repeat_interleave(k, 0)), exponent.flatten()
    u = where_chosen(u, gamma.flatten(), lambda rows: bend(u[rows], exponent[rows], floor=1e-6), own=True)

    blurred, sigma = rng.chance(p, k), rng.uniform(0.5, 1.0, k).flatten()
    relative = torch.tensor([min(spacing) / s if f else 0.0 for s, f in zip(spacing, fine)], device=x.device)
    sigma = sigma[:, None] * relative
    u = where_chosen(u, blurred.flatten(), lambda rows: gaussian_blur(u[rows], sigma[rows], radius=3), own=True)

    coarse = rng.chance(p, k)
    half = [n // 2 if f and n > 3 else n for n, f in zip(size, fine)]
    if half != list(size):
        u = where_chosen(u, coarse.flatten(), lambda rows: resample(u[rows], half), own=True)

    noisy, sd = rng.chance(p, k), rng.uniform(0.0, 0.05, k)  # of the range, that is up to 0.2 standard deviations
    add = noise_to_chosen if u.device.type == "cpu" else noise_to_all
    u = add(u.view(shape), noisy, sd, rng).flatten(0, 1)
    return restore_intensity(u, bounds.repeat_interleave(k, 0)).view(shape)


def noise_to_chosen(x: Tensor, chosen: Tensor, sd: Tensor, rng: StepRNG) -> Tensor:
    """Add a field to those crops ``(B, K)`` that get noise, in place: on a CPU the others cost nothing."""
    for volume, on, strength, g in zip(x, chosen, sd, rng.generators()):
        for i in torch.nonzero(on)[:, 0].tolist():
            volume[i].add_(torch.randn(x.shape[2:], generator=g), alpha=float(strength[i]))
    return x


def noise_to_all(x: Tensor, chosen: Tensor, sd: Tensor, rng: StepRNG) -> Tensor:
    """As :func:`noise_to_chosen`, with a field for every crop: a GPU would have to wait to know which get one."""
    strength = torch.where(chosen, sd, 0.0).flatten()
    return add_noise(x.flatten(0, 1), strength, rng.noise(*x.shape[1:]).flatten(0, 1)).view(x.shape)
