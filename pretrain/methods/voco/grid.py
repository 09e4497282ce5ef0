"""A window of equal cells for a plan: how many cells per axis, how large, and how large the window that they tile."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from nnssl.errors import NnsslError
from nnssl.pretrain.geometry import cells, choose_crop
from nnssl.words import counted, size_text

FEWEST_CELLS = 4
MOST_PADDING = 0.25
"""Largest share of a window that may exceed the median image, per axis."""

_MOST_PER_AXIS = 3
_ENOUGH = 9  # cells: the published 3 x 3
_SPACIOUS = 8  # voxels of the bottleneck
_THICK = 3.0  # spacing ratio above which nnU-Net calls an axis anisotropic
_SLIGHT = 0.05  # padding that is not worth another grid


@dataclass(frozen=True)
class Grid:
    """Cells of a window.

    Attributes:
        size: voxels per axis of a cell, which is what the network sees.
        grid: cells per axis.
        explanation: one sentence for the user.
    """

    size: tuple[int, ...]
    grid: tuple[int, ...]
    explanation: str

    @property
    def window(self) -> tuple[int, ...]:
        """Voxels per axis of the window."""
        return tuple(c * g for c, g in zip(self.size, self.grid))

    @property
    def cells(self) -> int:
        """Number of cells."""
        return math.prod(self.grid)


def choose_grid(
    patch: Sequence[int],
    median: Sequence[int],
    multiple: Sequence[int],
    spacing: Sequence[float],
    *,
    size: Sequence[int] | None = None,
    grid: Sequence[int] | None = None,
    fit: bool = True,
) -> Grid:
    """Choose cells for a plan, or check the user's ``size`` and ``grid``.

    Cells are multiples of the total stride, at most the patch, about half of it on split axes, with at least two voxels at the
    bottleneck. Nine cells are wanted, four are needed. What comes before what: :meth:`_Space.rank`.

    Args:
        fit: False where cases are resampled to the window: then its size does not depend on theirs.

    Raises:
        NnsslError: no legal choice, naming the axis and the numbers; a crop or grid of the user's that is not legal.
    """
    dim = len(patch)
    if grid is not None and (len(grid) != dim or any(g < 1 for g in grid)):
        raise NnsslError(f"-o grid={_listed(grid)}: {dim} numbers of at least 1 are wanted, one per axis of the plan.")
    if grid is not None and math.prod(grid) < FEWEST_CELLS:
        raise NnsslError(
            f"-o grid={_listed(grid)} has {counted(math.prod(grid), 'cell')}, and {FEWEST_CELLS} are needed: "
            "with one, every overlap would be 1."
        )
    # Also refuses what no grid can mend: one bottleneck voxel, strides that exceed image and patch.
    checked, _ = choose_crop(patch, median, multiple, size=size, compare=False)
    size = None if size is None else checked
    space = _Space(tuple(patch), tuple(median), tuple(multiple), tuple(spacing), fit)
    grids = [tuple(grid)] if grid is not None else itertools.product(range(1, _MOST_PER_AXIS + 1), repeat=dim)
    enough = [g for g in grids if math.prod(g) >= FEWEST_CELLS]
    for share in (2, 1):  # crops as large as the patch only where no smaller ones are legal
        legal = [(c, g) for g in enough for c in space.crops(g, share, size)]
        if legal:
            chosen = max(legal, key=lambda crop_and_grid: space.rank(*crop_and_grid))
            return Grid(*chosen, space.explain(*chosen))
    raise NnsslError(space.refusal(size, grid))


@dataclass(frozen=True)
class _Space:
    """What cells have to fit into; arguments of :func:`choose_grid`."""

    patch: tuple[int, ...]
    median: tuple[int, ...]
    multiple: tuple[int, ...]
    spacing: tuple[float, ...]
    fit: bool

    @property
    def coarsest(self) -> int:
        """The first axis with the largest spacing."""
        return max(range(len(self.patch)), key=lambda a: (self.spacing[a], -a))

    @property
    def thick(self) -> bool:
        """Whether the coarsest axis must not be split."""
        return self.spacing[self.coarsest] > _THICK * min(self.spacing)

    def bottleneck(self, size: Sequence[int]) -> list[int]:
        """Voxels of a crop's bottleneck."""
        return cells(size, self.multiple)

    def padding(self, axis: int, window: int) -> float:
        """Share of a window that lies outside of the median image."""
        return max(0.0, 1.0 - self.median[axis] / window) if self.fit else 0.0

    def crops(self, grid: tuple[int, ...], share: int, size: Sequence[int] | None) -> list[tuple[int, ...]]:
        """Crops worth a try in a grid: of at most ``patch / share`` on split axes, or the user's ``size``."""
        tried: list[list[int]] = []
        for axis, count in enumerate(grid):
            whole = self.thick and axis == self.coarsest and count == 1
            if size is None:
                tried.append(self.sizes(axis, count, 1 if whole else share))
            else:
                tried.append([size[axis]] if self.padding(axis, size[axis] * count) < MOST_PADDING else [])
        return [crop for crop in itertools.product(*tried) if math.prod(self.bottleneck(crop)) >= 2]

    def sizes(self, axis: int, count: int, share: int) -> list[int]:
        """On one axis the largest size within the image, and the largest that exceeds it by less than is allowed.

        They are at most ``patch / share``, to the next multiple above where the axis is not split.
        """
        patch, multiple = self.patch[axis], self.multiple[axis]
        most = patch // share
        target = min(-(-most // multiple), patch // multiple) * multiple if count == 1 else most // multiple * multiple
        legal = range(multiple, max(target, multiple) + 1, multiple)
        inside = [c for c in legal if self.padding(axis, c * count) <= _SLIGHT]
        nearly = [c for c in legal if self.padding(axis, c * count) < MOST_PADDING]
        return sorted({c[-1] for c in (inside, nearly) if c})

    def rank(self, size: tuple[int, ...], grid: tuple[int, ...]) -> tuple[object, ...]:
        """Larger is better: many cells, the thick axis not split, 8 voxels at the bottleneck, two of them on each axis, windows
        within the median image, few cells, large ones."""
        bottleneck, thick = self.bottleneck(size), grid[self.coarsest]
        return (
            min(math.prod(grid), _ENOUGH),
            not (self.thick and thick > 1),
            math.prod(bottleneck) >= _SPACIOUS,
            all(b > 1 for b, m in zip(bottleneck, self.multiple) if m > 1),
            -sum(self.padding(axis, c * g) > _SLIGHT for axis, (c, g) in enumerate(zip(size, grid))),
            -math.prod(grid),
            -thick,
            math.prod(size),
            tuple(-g for g in grid),
        )

    def refusal(self, size: Sequence[int] | None, grid: Sequence[int] | None) -> str:
        """Name the axis that a grid fails on: the user's first one that does not fit, else the one with the fewest cells."""
        unit, median = size or self.multiple, self.median
        for axis, (c, g) in enumerate(zip(unit, grid or ())):
            if 1 - median[axis] / (c * g) >= MOST_PADDING:
                return (
                    f"no legal grid: {g} cells of {c} voxels on axis {axis} make a window of {c * g}, more than a quarter of it "
                    f"outside of the median image with {median[axis]}. Choose fewer cells there (-o grid={_listed(grid or ())}), "
                    f"a smaller --crop (multiples of {size_text(self.multiple)}), or -o window=volume."
                )
        counts = range(1, _MOST_PER_AXIS + 1)
        most = [max((g for g in counts if 1 - m / (c * g) < MOST_PADDING), default=0) for c, m in zip(unit, median)]
        axis = min(range(len(unit)), key=lambda a: most[a])
        return (
            f"no legal grid: {FEWEST_CELLS} cells with at least two voxels at the bottleneck are needed. The smallest crop, "
            f"{size_text(unit)} voxels with {size_text(self.bottleneck(unit))} at the bottleneck, fits {size_text(most)} times "
            f"into the median image {size_text(median)} (patch {size_text(self.patch)}); axis {axis} takes {most[axis]}. Use "
            "-o window=volume, which resamples each case to the window, or another method."
        )

    def explain(self, size: Sequence[int], grid: Sequence[int]) -> str:
        """One sentence for the user."""
        window = [c * g for c, g in zip(size, grid)]
        text = (
            f"Crops of {size_text(size)} voxels (multiples of {size_text(self.multiple)}; {size_text(self.bottleneck(size))} at "
            f"the bottleneck) in a grid of {size_text(grid)}."
        )
        if not self.fit:
            return f"{text} Each case is cut to its foreground and resampled to the window of {size_text(window)}."
        over = [f"axis {a} ({w} of {m})" for a, (w, m) in enumerate(zip(window, self.median)) if w > m]
        if over:
            text += (
                f" The window exceeds the median image on {' and '.join(over)}: cells of mostly padding are left out."
            )
        return text


def _listed(values: Sequence[int]) -> str:
    return ",".join(map(str, values))
