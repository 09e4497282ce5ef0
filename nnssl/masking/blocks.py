"""Block masks: which blocks fit a plan, how many are hidden (exactly), and their voxels."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from nnssl.errors import NnsslError
from nnssl.words import size_text

LEAST_BLOCKS = 64


def choose_block(
    size: Sequence[int],
    strides: Sequence[Sequence[int]],
    *,
    least: int = LEAST_BLOCKS,
    block: Sequence[int] | None = None,
) -> tuple[int, ...]:
    """Block in voxels for crops of a plan: the cumulative stride of the coarsest stage that gives enough blocks.

    The last stage is left out. Anisotropy comes with the strides: 160x160x160 gives 16x16x16, 20x256x224 gives 4x16x16.

    Args:
        size: voxels of the crop.
        strides: cumulative stride per stage and axis, finest stage first (``Plan.cumulative_strides``).
        least: fewest blocks; where no stage has as many, the stage with most is taken.
        block: the user's block, checked instead of chosen.

    Raises:
        NnsslError: the block does not divide the crop, or gives fewer than two blocks; lists what fits.
    """
    stages = [tuple(s) for s in strides[: max(1, len(strides) - 1)]]
    fitting = [s for s in dict.fromkeys(stages) if _count(size, s) >= 2]
    known = ", ".join(size_text(s) for s in fitting) or "none"
    if block is not None:
        if len(block) != len(size) or any(b < 1 or n % b for n, b in zip(size, block)) or _count(size, block) < 2:
            raise NnsslError(
                f"block={','.join(map(str, block))} does not fit crops of {'x'.join(map(str, size))} voxels: one number per "
                f"axis is wanted that divides it, and at least two blocks. Blocks of the plan's strides that fit: {known}."
            )
        return tuple(int(b) for b in block)
    if not fitting:
        raise NnsslError(
            f"no block of the plan's strides divides crops of {'x'.join(map(str, size))} voxels into two or more blocks. "
            "Choose another --crop, or set -o block."
        )
    enough = [s for s in fitting if _count(size, s) >= least]
    return enough[-1] if enough else max(fitting, key=lambda s: _count(size, s))


def _count(size: Sequence[int], block: Sequence[int]) -> int:
    if any(n % b for n, b in zip(size, block)):
        return 0
    return math.prod(n // b for n, b in zip(size, block))


def mask_blocks(scores: Tensor, ratio: float | Tensor, eligible: Tensor | None = None) -> Tensor:
    """Hide exactly ``round(ratio * N)`` of the N eligible blocks of each sample, at least one and at most N - 1.

    Args:
        scores: ``(B, *grid)`` random numbers; the blocks with the smallest ones are hidden.
        ratio: share to hide, one number or ``(B,)``.
        eligible: ``(B, *grid)`` bool, blocks that may be hidden; all by default. Samples with fewer than two keep all.

    Returns:
        ``(B, *grid)`` bool, True where hidden.
    """
    flat = scores.flatten(1)
    allowed = torch.ones_like(flat, dtype=torch.bool) if eligible is None else eligible.flatten(1)
    n = allowed.sum(1)
    exact = torch.float32 if flat.device.type == "mps" else torch.float64  # 0.7 of 5 blocks is 3.5 only in float64
    share = torch.as_tensor(ratio, dtype=exact, device=flat.device).expand(len(flat))
    wanted = (share * n).round().long().clamp(min=1)
    wanted = torch.where(n < 2, 0, torch.minimum(wanted, n - 1))
    order = flat.masked_fill(~allowed, math.inf).argsort(dim=1, stable=True)
    rank = torch.empty_like(order).scatter_(1, order, torch.arange(flat.shape[1], device=flat.device).expand_as(order))
    return (rank < wanted[:, None]).view_as(scores)


def to_voxels(blocks: Tensor, block: Sequence[int]) -> Tensor:
    """Repeat ``(B, C, *grid)`` to voxels ``(B, C, *(grid * block))``."""
    for axis, n in enumerate(block, 2):
        blocks = blocks.repeat_interleave(n, axis)
    return blocks


def block_sum(x: Tensor, block: Sequence[int]) -> Tensor:
    """Sum of ``(B, C, *size)`` over each block: ``(B, C, *grid)``."""
    for axis, n in enumerate(block, 2):
        x = x.unflatten(axis, (-1, n)).sum(axis + 1)
    return x


def mostly(valid: Tensor, block: Sequence[int], share: float = 0.5) -> Tensor:
    """Blocks of which at least ``share`` is valid: ``(B, 1, *size)`` bool -> ``(B, 1, *grid)`` bool."""
    return block_sum(valid.float(), block) >= share * math.prod(block)
