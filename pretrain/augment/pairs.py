"""Two overlapping crops of one window and the voxels that they share; integer offsets, no resampling.

Sampling as in Kats et al. 2024 (arXiv:2401.06473) and vox2vec: an anchor voxel of the body, two boxes that contain
it, drawn independently, and up to ``n`` body voxels of their overlap. Flips, rotations and scalings are left out on
purpose, as in both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nnssl.pretrain.augment.rng import StepRNG

TRIES = 64

MANY = 8
"""From so many voxels for each that is wanted on, they are drawn one by one."""


@dataclass
class CropPairs:
    """Where both crops of each window lie. View 0 is A, view 1 is B; indices are voxels.

    Attributes:
        anchor: ``(B, dim)`` int64, in the window.
        start: ``(2, B, dim)`` int64, first voxel of each crop in the window.
        voxels: ``(2, B, n, dim)`` int64, the shared voxels in each crop; row i of A and of B are the same voxel.
        valid: ``(B, n)`` bool; rows that are not valid hold the anchor.
    """

    anchor: Tensor
    start: Tensor
    voxels: Tensor
    valid: Tensor


def draw_pairs(
    body: Tensor,
    size: Sequence[int],
    rng: StepRNG,
    *,
    n: int = 1024,
    min_overlap: float = 0.0,
    low: Tensor | None = None,
    high: Tensor | None = None,
) -> CropPairs:
    """Draw an anchor, two boxes around it, and voxels of their overlap.

    The anchor is uniform over the window's body voxels. Per view and axis the box starts uniformly where it contains
    the anchor and lies in the image; where the image is smaller than the box, anywhere in the window where it
    contains the anchor. A window without body gets no valid voxel.

    Args:
        body: ``(B, 1, *window)`` bool.
        size: voxels per axis of a crop, at most the window's.
        n: most voxels per pair, uniformly chosen; all (at least the anchor) where there are fewer.
        min_overlap: least overlap of the boxes per axis as a share of ``size``, in [0, 1].
        low, high: ``(B, dim)`` int64, bounds of the image in the window, see :func:`.image_bounds`; by default the window.
    """
    window = body.shape[2:]
    if any(s > w for s, w in zip(size, window)):
        raise ValueError(f"crops of {tuple(size)} do not fit into windows of {tuple(window)}")
    body = body[:, 0]
    device, count, dim = body.device, len(body), len(window)
    extent, crop = torch.tensor(window, device=device), torch.tensor(tuple(size), device=device)
    low = torch.zeros(count, dim, dtype=torch.long, device=device) if low is None else low
    high = extent.expand(count, dim) if high is None else high
    tries, place = rng.uniform(0, 1, TRIES, dim), rng.uniform(0, 1, 2, dim)
    generators = rng.generators()

    fits = high - low >= crop
    low, high = torch.where(fits, low, 0), torch.where(fits, high, extent)
    room = (high - low)[:, None]
    anchor = _anchors(body, low[:, None] + torch.minimum((tries * room).long(), room - 1), generators)
    first = torch.maximum(low, anchor - crop + 1)
    last = torch.minimum(high - crop, anchor)
    start_a = _between(first, last, place[:, 0])
    reach = crop - (crop * min_overlap - 1e-6).ceil().long().clamp_min(0)
    start_b = _between(torch.maximum(first, start_a - reach), torch.minimum(last, start_a + reach), place[:, 1])
    start = torch.stack([start_a, start_b])

    shared_low, shared_high = start.amax(0), start.amin(0) + crop
    voxels = anchor[:, None].repeat(1, n, 1)
    valid = torch.zeros(count, n, dtype=torch.bool, device=device)
    for i, (a, b) in enumerate(zip(shared_low.tolist(), shared_high.tolist())):
        found = _some_of(body[i][tuple(slice(x, y) for x, y in zip(a, b))], n, generators[i])
        voxels[i, : len(found)] = found + shared_low[i]
        valid[i, : len(found)] = True
    return CropPairs(anchor, start, voxels[None] - start[:, :, None], valid)


def cut(x: Tensor, start: Tensor, size: Sequence[int]) -> Tensor:
    """A box of each of ``(B, C, *window)`` from voxel ``start`` ``(B, dim)`` int64 on: ``(B, C, *size)``, a new tensor."""
    boxes = [(slice(None), *[slice(a, a + s) for a, s in zip(corner, size)]) for corner in start.tolist()]
    return torch.stack([crop[box] for crop, box in zip(x, boxes)])


def _anchors(body: Tensor, tries: Tensor, generators: list[torch.Generator]) -> Tensor:
    """First of the random voxels ``tries`` ``(B, T, dim)`` that lies in the body; where none does, one of all body voxels."""
    sample = torch.arange(len(body), device=body.device)[:, None]
    places = (sample, *tries.unbind(2))
    hit = body[places]  # (B, T)
    anchor = tries[sample[:, 0], hit.int().argmax(1)]
    for i in torch.nonzero(~hit.any(1)).squeeze(1).tolist():
        voxels = torch.nonzero(body[i])
        if len(voxels):
            pick = torch.randint(len(voxels), (1,), generator=generators[i], device=body.device)
            anchor[i] = voxels[pick[0]]
    return anchor


def _some_of(box: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """``n`` different True voxels of ``box``, uniformly, or all where there are fewer: ``(<= n, dim)``.

    On a CPU voxels are drawn until there are enough different ones: the first n of a random order of all, without that order.
    """
    if box.device.type == "cpu" and box.numel() > MANY * n:
        tries = torch.randint(box.numel(), (MANY * n // 2,), generator=generator).numpy()
        places = np.unravel_index(tries, box.shape)
        tries = tries[box.numpy()[places]]
        first = np.sort(np.unique(tries, return_index=True)[1])[:n]
        if len(first) == n:
            return torch.from_numpy(np.stack(np.unravel_index(tries[first], box.shape), 1))
    found = torch.nonzero(box)
    if len(found) > n:
        found = found[torch.randperm(len(found), generator=generator, device=box.device)[:n]]
    return found


def _between(first: Tensor, last: Tensor, share: Tensor) -> Tensor:
    """Integer in [first, last] (inclusive) for ``share`` uniform in [0, 1)."""
    room = (last - first + 1).clamp_min(1)
    return first + torch.minimum((share * room).long(), room - 1)
