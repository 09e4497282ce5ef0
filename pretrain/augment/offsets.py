"""Two crops of one window at different offsets, and their feature maps laid on the window's grid so that equal sites meet.

Zero padding tells a convolutional network where in the crop a site lies. Where both branches see one crop, "the same place in the
crop" is then a feature that both have without looking at the image; crops at different offsets take it away.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from nnssl.pretrain.augment.box import in_box
from nnssl.pretrain.augment.rng import StepRNG


def draw_cells(rng: StepRNG, most: Sequence[int], step: Sequence[int] | None = None) -> Tensor:
    """First cell of each sample's crop on the window's grid, ``(B, dim)`` int64, uniform in ``0, step, ..., <= most``."""
    each = torch.tensor([1] * len(most) if step is None else list(step), device=rng.device)
    places = torch.tensor(list(most), device=rng.device) // each + 1
    share = rng.uniform(0, 1, len(most))
    return torch.minimum((share * places).long(), places - 1) * each


def lay_on(x: Tensor, first: Tensor, grid: Sequence[int]) -> Tensor:
    """Lay maps ``(B, C, *s)`` on a larger grid ``(B, C, *grid)``, each from its own cell ``first`` ``(B, dim)``; 0 elsewhere."""
    if tuple(x.shape[2:]) == tuple(grid):
        return x
    laid = []
    for sample, corner in zip(x, first.tolist()):
        sides = [(a, g - a - s) for a, g, s in zip(corner, grid, x.shape[2:])]
        laid.append(F.pad(sample, [n for pair in reversed(sides) for n in pair]))
    return torch.stack(laid)


@dataclass(frozen=True)
class OffsetGrid:
    """The grid of bottleneck cells on which two branches' crops of one window are laid.

    Attributes:
        most: largest offset of a crop, cells per axis; all 0 where both branches see one crop.
        stride: voxels of the image per cell.
        step: the shrunken branch's cells are ``step`` of these, so its crop starts at a multiple.
        size: voxels of a crop.
    """

    most: tuple[int, ...]
    stride: tuple[int, ...]
    step: tuple[int, ...]
    size: tuple[int, ...]

    @property
    def active(self) -> bool:
        """Whether crops are shifted at all."""
        return any(self.most)

    @property
    def voxels(self) -> tuple[int, ...]:
        """What is read of the window: a crop at each offset lies in it."""
        return tuple(n + m * s for n, m, s in zip(self.size, self.most, self.stride))

    @property
    def cells(self) -> tuple[int, ...]:
        """Cells of the grid: a multiple of ``step`` that holds a crop at each offset."""
        held = [n // s + m for n, m, s in zip(self.size, self.most, self.stride)]
        return tuple(-(-h // k) * k for h, k in zip(held, self.step))

    def fill_up(self, x: Tensor) -> Tensor:
        """``(B, C, *voxels)`` with 0 behind it, up to the grid."""
        room = [c * s - v for c, s, v in zip(self.cells, self.stride, self.voxels)]
        return F.pad(x, [n for r in reversed(room) for n in (0, r)])

    def draw(self, rng: StepRNG) -> tuple[Tensor, Tensor]:
        """First cells ``(B, dim)`` of the full and of the shrunken branch's crop."""
        return draw_cells(rng, self.most), draw_cells(rng, self.most, self.step)

    def map(self, x: Tensor, first: Tensor, stride: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Features ``(B, C, *s)`` of crops from cells ``first`` ``(B, dim)`` on, on the grid ``(B, C, *grid)`` at their own
        resolution of ``stride`` voxels per site, and where they lie there, ``(B, *grid)`` bool."""
        per = torch.tensor(self.stride, device=first.device), torch.tensor(list(stride), device=first.device)
        at = first * per[0] // per[1]
        grid = [c * s // k for c, s, k in zip(self.cells, self.stride, stride)]
        covered = in_box(at, at + torch.tensor(x.shape[2:], device=at.device), grid)[:, 0]
        return lay_on(x, at, grid), covered
