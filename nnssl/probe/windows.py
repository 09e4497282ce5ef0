"""How a case is cut into pieces that the network takes: each voxel is computed by the one piece whose middle is nearest."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from nnunetv2.inference.sliding_window_prediction import compute_steps_for_sliding_window

from nnssl.plans import Plan

SLICES = 16
"""Slices that a 2d network computes at once."""


@dataclass(frozen=True)
class Window:
    """One piece of a case; three axes, voxels.

    Attributes:
        start: first voxel, negative where the case is smaller than the piece.
        size: of the piece.
        own: ``(first, end)`` per axis: the voxels that this piece answers for. Those of all pieces tile the case.
    """

    start: tuple[int, ...]
    size: tuple[int, ...]
    own: tuple[tuple[int, int], ...]

    @property
    def box(self) -> tuple[slice, ...]:
        """The own voxels in the case."""
        return tuple(slice(a, b) for a, b in self.own)

    @property
    def inner(self) -> tuple[slice, ...]:
        """The own voxels in the piece."""
        return tuple(slice(a - s, b - s) for s, (a, b) in zip(self.start, self.own))


def window_size(plan: Plan, shape: Sequence[int]) -> tuple[int, ...]:
    """Size of the pieces of a case, three axes: the plan's patch; where the case is smaller just what the strides ask for.

    A Primus takes its patch only. Pieces of 2d plans are a few slices, which are computed one by one.
    """
    patch, stride, inside = plan.patch_size, plan.total_stride, tuple(shape)[-plan.dim :]
    if not plan.is_primus:
        fitted = [min(p, math.ceil(n / s) * s) for p, n, s in zip(patch, inside, stride)]
        # InstanceNorm refuses a single voxel at the bottleneck
        several = math.prod(f // s for f, s in zip(fitted, stride)) > 1
        patch = tuple(fitted) if several else patch
    return patch if plan.dim == 3 else (min(SLICES, shape[0]), *patch)


def _along(n: int, size: int, step: float, slices: bool) -> list[tuple[int, int, int, int]]:
    """``(start, size, first, end)`` of the pieces along one axis of ``n`` voxels."""
    if slices:
        return [(a, min(size, n - a), a, min(a + size, n)) for a in range(0, n, size)]
    if n <= size:
        return [(-((size - n) // 2), size, 0, n)]
    starts = compute_steps_for_sliding_window((n,), (size,), step)[0]
    cuts = [0, *((a + b + size) // 2 for a, b in itertools.pairwise(starts)), n]
    return [(s, size, a, b) for s, a, b in zip(starts, cuts, cuts[1:])]


def tile(plan: Plan, shape: Sequence[int], step: float = 0.75) -> list[Window]:
    """Cut a case of ``shape`` into pieces at most ``step`` of their size apart, evenly spread."""
    size = window_size(plan, shape)
    axes = [_along(n, w, step, plan.dim == 2 and i == 0) for i, (n, w) in enumerate(zip(shape, size))]
    return [
        Window(tuple(a[0] for a in found), tuple(a[1] for a in found), tuple((a[2], a[3]) for a in found))
        for found in itertools.product(*axes)
    ]
