"""A window of equal cells for a plan: how many cells per axis, how large, and how large the window that they tile."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from nnssl.errors import NnsslError
from nnssl.pretrain.geometry import choose_crop, size_text
from nnssl.words import counted

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
    """Choose cells for a plan, or check the user's.

    Cells are multiples of the total stride, at most the patch, about half of it on split axes, with at least two voxels at the
    bottleneck. Nine cells are wanted, four are needed. In that order: many cells, the thick axis not split, 8 voxels at the
    bottleneck, two of them on each axis, windows within the median image, few cells, large ones.

    Args:
        patch: the plan's patch.
        median: median case shape on the same axes.
        multiple: the network's total stride.
        spacing: mm per voxel on the same axes.
        size: the user's crop.
        grid: the user's cells per axis.
        fit: False where cases are resampled to the window: then its size does not depend on theirs.

    Raises:
        NnsslError: no legal choice, naming the axis and the numbers; a crop or grid of the user's that is not legal.
    """
    dim, what = len(patch), "the network"
    if grid is not None and (len(grid) != dim or any(g < 1 for g in grid)):
        raise NnsslError(f"-o grid={_listed(grid)}: {dim} numbers of at least 1 are wanted, one per axis of the plan.")
    if grid is not None and math.prod(grid) < FEWEST_CELLS:
        raise NnsslError(
            f"-o grid={_listed(grid)} has {counted(math.prod(grid), 'cell')}, and {FEWEST_CELLS} are needed: "
            "with one, every overlap would be 1."
        )
    if size is not None:
        size, _ = choose_crop(patch, median, multiple, size=size, what=what)
    else:  # refuses what no grid can mend: one bottleneck voxel, strides that exceed image and patch
        choose_crop(patch, median, multiple, compare=False, what=what)
    room = [float(m) if fit else math.inf for m in median]
    grids = [tuple(grid)] if grid is not None else itertools.product(range(1, _MOST_PER_AXIS + 1), repeat=dim)
    thick = max(range(dim), key=lambda a: (spacing[a], -a))
    must_not_split = spacing[thick] > _THICK * min(spacing)
    best: tuple[tuple, tuple[int, ...], tuple[int, ...]] | None = None
    for share, g in itertools.product((2, 1), list(grids)):
        if share == 1 and best is not None:
            break  # crops as large as the patch only where no smaller ones are legal
        if math.prod(g) < FEWEST_CELLS:
            continue
        sizes = [
            _sizes(patch[a], room[a], multiple[a], g[a], 1 if must_not_split and a == thick and g[a] == 1 else share)
            if size is None
            else ([size[a]] if _padding(size[a] * g[a], room[a]) < MOST_PADDING else [])
            for a in range(dim)
        ]
        for c in itertools.product(*sizes):
            bottleneck = [n // m for n, m in zip(c, multiple)]
            if math.prod(bottleneck) < 2:
                continue
            score = (
                min(math.prod(g), _ENOUGH),
                not (must_not_split and g[thick] > 1),
                math.prod(bottleneck) >= _SPACIOUS,
                all(b > 1 for b, m in zip(bottleneck, multiple) if m > 1),
                -sum(_padding(n * k, r) > _SLIGHT for n, k, r in zip(c, g, room)),
                -math.prod(g),
                -g[thick],
                math.prod(c),
                tuple(-k for k in g),
            )
            if best is None or score > best[0]:
                best = (score, tuple(c), tuple(g))
    if best is None:
        raise NnsslError(_refusal(patch, median, multiple, size, grid))
    return Grid(best[1], best[2], _explain(best[1], best[2], median, multiple, fit))


def _padding(window: float, room: float) -> float:
    """Share of a window that lies outside of the median image."""
    return max(0.0, 1.0 - room / window)


def _sizes(patch: int, room: float, multiple: int, cells: int, share: int) -> list[int]:
    """Sizes worth a try on an axis: the largest within the image, and the largest that exceeds it by less than is allowed.

    They are at most ``patch / share``, to the next multiple above where the axis is not split.
    """
    most = patch // share
    target = min(-(-most // multiple), patch // multiple) * multiple if cells == 1 else most // multiple * multiple
    target = max(target, multiple)
    legal = range(multiple, target + 1, multiple)
    inside = [c for c in legal if _padding(c * cells, room) <= _SLIGHT]
    nearly = [c for c in legal if _padding(c * cells, room) < MOST_PADDING]
    return sorted({c[-1] for c in (inside, nearly) if c})


def _listed(values: Sequence[int]) -> str:
    return ",".join(map(str, values))


def _refusal(
    patch: Sequence[int],
    median: Sequence[int],
    multiple: Sequence[int],
    size: Sequence[int] | None,
    grid: Sequence[int] | None,
) -> str:
    """Name the axis that a grid fails on: the user's first one that does not fit, else the one with the fewest cells."""
    unit = size or multiple
    for axis, (c, g) in enumerate(zip(unit, grid or ())):
        if _padding(c * g, median[axis]) >= MOST_PADDING:
            return (
                f"no legal grid: {g} cells of {c} voxels on axis {axis} make a window of {c * g}, more than a quarter of it "
                f"outside of the median image with {median[axis]}. Choose fewer cells there (-o grid={_listed(grid or ())}), "
                f"a smaller --crop (multiples of {size_text(multiple)}), or -o window=volume."
            )
    most = [max((g for g in (1, 2, 3) if _padding(c * g, m) < MOST_PADDING), default=0) for c, m in zip(unit, median)]
    axis = min(range(len(unit)), key=lambda a: most[a])
    bottleneck = [c // m for c, m in zip(unit, multiple)]
    return (
        f"no legal grid: {FEWEST_CELLS} cells with at least two voxels at the bottleneck are needed. The smallest crop, "
        f"{size_text(unit)} voxels with {size_text(bottleneck)} at the bottleneck, fits {size_text(most)} times into the median "
        f"image {size_text(median)} (patch {size_text(patch)}); axis {axis} takes {most[axis]}. Use -o window=volume, which "
        "resamples each case to the window, or another method."
    )


def _explain(
    size: Sequence[int], grid: Sequence[int], median: Sequence[int], multiple: Sequence[int], fit: bool
) -> str:
    window = [c * g for c, g in zip(size, grid)]
    text = (
        f"Crops of {size_text(size)} voxels (multiples of {size_text(multiple)}; "
        f"{size_text([c // m for c, m in zip(size, multiple)])} at the bottleneck) in a grid of {size_text(grid)}."
    )
    if not fit:
        return f"{text} Each case is cut to its foreground and resampled to the window of {size_text(window)}."
    over = [a for a, (w, m) in enumerate(zip(window, median)) if w > m]
    if over:
        axes = " and ".join(f"axis {a} ({window[a]} of {median[a]})" for a in over)
        text += f" The window exceeds the median image on {axes}: cells of mostly padding are left out."
    return text
