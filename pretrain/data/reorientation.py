"""Brings cases to one orientation, so that left is left in each: whole axes are swapped and flipped, nothing is resampled.

nnU-Net does not reorient images. The orientation that most cases have is taken, so that the network mostly sees what it will see
in fine-tuning.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nnssl.pretrain.data.case import CaseReader
from nnssl.pretrain.data.case_set import CaseRef
from nnssl.pretrain.data.orientation import Geometry

__all__ = ["LOOKED_AT", "Orientation", "AxisTransform", "common_orientation"]

log = logging.getLogger("nnssl")

LOOKED_AT = 32
"""Cases whose orientation is read to find the most frequent one."""

_SAME_SPACING = 0.01
_NAMES = (("right", "left"), ("anterior", "posterior"), ("inferior", "superior"))


@dataclass(frozen=True)
class AxisTransform:
    """Axis i of the reoriented array is axis ``axes[i]`` of the case's, backwards where ``flips[i]``. Axes: 0 to 2."""

    axes: tuple[int, int, int] = (0, 1, 2)
    flips: tuple[bool, bool, bool] = (False, False, False)

    def shape(self, shape: Sequence[int]) -> list[int]:
        """Shape (or any three numbers per axis) of an array once it is reoriented."""
        return [shape[a] for a in self.axes]

    def array_order(self, size: Sequence[int]) -> list[int]:
        """Numbers per axis of the reoriented array, in the order of the case's."""
        return [int(size[self.axes.index(a)]) for a in range(3)]

    def box(
        self, start: Sequence[int] | np.ndarray, size: Sequence[int], shape: Sequence[int]
    ) -> tuple[np.ndarray, list[int]]:
        """Where a box of the reoriented array lies in the case's array of ``shape``: its first voxel and its extent."""
        first, extent = np.zeros(3, dtype=np.int64), [0, 0, 0]
        for i, (axis, flip) in enumerate(zip(self.axes, self.flips)):
            first[axis] = shape[axis] - (start[i] + size[i]) if flip else start[i]
            extent[axis] = int(size[i])
        return first, extent

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """Reorient ``(C, *spatial)``; contiguous, or ``x`` itself where nothing changes."""
        if self == AxisTransform():
            return x
        x = x.transpose(0, *(1 + a for a in self.axes))
        return np.ascontiguousarray(np.flip(x, tuple(1 + i for i, flip in enumerate(self.flips) if flip)))

    def position(self, axis_position: np.ndarray) -> np.ndarray:
        """Reorder ``(3,)`` shares of the image along the case's axes."""
        along = axis_position[list(self.axes)]
        return np.where(self.flips, 1.0 - along, along)


@dataclass(frozen=True)
class Orientation:
    """What cases are reoriented to.

    Attributes:
        axes, flips: see :class:`~nnssl.pretrain.data.orientation.Geometry`.
        spacing: mm per voxel of the array's axes; 0 for the first one of 2d plans, which stays where it is. Axes change
            places only with equal spacings.
    """

    axes: tuple[int, int, int]
    flips: tuple[bool, bool, bool]
    spacing: tuple[float, float, float]

    def transform(self, geometry: Geometry) -> AxisTransform:
        """How a case is reoriented to it; where spacings forbid to swap axes, they are only flipped."""
        source = dict(zip(self.axes, geometry.axes))
        same = all(abs(self.spacing[a] - self.spacing[b]) <= _SAME_SPACING * self.spacing[a] for a, b in source.items())
        flips = {axis: mine != theirs for axis, mine, theirs in zip(geometry.axes, self.flips, geometry.flips)}
        z, y, x = (source[i] if same else i for i in range(3))
        return AxisTransform((z, y, x), (flips[z], flips[y], flips[x]))

    def __str__(self) -> str:
        """``"inferior to superior, anterior to posterior, right to left"``, in the order of the array's axes."""
        ends = {axis: _NAMES[p][::-1] if self.flips[p] else _NAMES[p] for p, axis in enumerate(self.axes)}
        return ", ".join(" to ".join(ends[axis]) for axis in range(3))


def common_orientation(refs: Sequence[CaseRef], reader: CaseReader, spacing: Sequence[float]) -> Orientation:
    """The orientation that most of up to :data:`LOOKED_AT` cases have, spread evenly over the list, which is in a fixed order.

    ``spacing`` is the plan's, two or three numbers.

    Raises:
        NnsslError: a case's geometry is missing or damaged.
    """
    chosen = np.unique(np.linspace(0, len(refs) - 1, min(LOOKED_AT, len(refs))).round().astype(int))
    found = [reader.geometry(refs[i], (1, 1, 1)) for i in chosen.tolist()]
    kinds = Counter((g.axes, g.flips) for g in found)
    (axes, flips), most = kinds.most_common(1)[0]
    z, y, x = (float(mm) for mm in ((0.0, *spacing) if len(spacing) == 2 else spacing))
    common = Orientation(axes, flips, (z, y, x))
    if len(kinds) > 1:
        log.info("%d of %d images run %s; the others are reoriented to that.", most, len(found), common)
    stuck = sum(common.transform(g).axes == (0, 1, 2) and g.axes != axes for g in found)
    if stuck:
        log.warning(
            "%d of %d images have their axes in another order than most. The plan's spacings differ, so they are only flipped.",
            stuck,
            len(found),
        )
    return common
