"""Crops at different offsets on one grid: coordinates meet, bounds hold, draws are those of the sample."""

import pytest
import torch

from nnssl.pretrain.augment import StepRNG
from nnssl.pretrain.augment.box import in_box
from nnssl.pretrain.augment.offsets import OffsetGrid, draw_cells, lay_on
from nnssl.pretrain.augment.pairs import cut

GRID = OffsetGrid(most=(1, 2, 3), stride=(2, 4, 2), step=(1, 2, 2), size=(4, 16, 8))


def test_sizes():
    assert GRID.voxels == (6, 24, 14) and GRID.cells == (3, 6, 8)  # 7 cells of the last axis are rounded up to pairs
    assert GRID.active and not OffsetGrid((0, 0), (2, 2), (2, 2), (8, 8)).active
    assert OffsetGrid((0, 0), (2, 2), (2, 2), (8, 8)).cells == (4, 4)


def test_draws_are_uniform_and_legal():
    full, shrunk = GRID.draw(StepRNG(0, 0, 4000))
    for axis, (most, step) in enumerate(zip(GRID.most, GRID.step)):
        counts = torch.bincount(full[:, axis], minlength=most + 1) / 4000
        assert counts.tolist() == pytest.approx([1 / (most + 1)] * (most + 1), abs=0.04)
        assert set(shrunk[:, axis].tolist()) == set(range(0, most + 1, step))
    part = draw_cells(StepRNG(0, 0, 8, 3, 2), GRID.most)
    assert torch.equal(part, draw_cells(StepRNG(0, 0, 8), GRID.most)[3:5])


@pytest.mark.parametrize("stride", [(2, 4, 2), (2, 8, 4), (1, 2, 1)])
def test_equal_sites_are_equal_voxels(stride):
    """Maps that hold the coordinates of the window meet where they overlap, whatever the resolution."""
    window = torch.stack(torch.meshgrid(*[torch.arange(float(n)) for n in GRID.voxels], indexing="ij"))
    window = window.expand(6, 3, *GRID.voxels)
    a, b = GRID.draw(StepRNG(0, 1, 6))
    a = (
        a
        // torch.tensor([-(-s // p) for s, p in zip(stride, GRID.stride)])
        * torch.tensor([-(-s // p) for s, p in zip(stride, GRID.stride)])
    )  # cells that the stride divides
    assert not torch.equal(a, b)
    laid = []
    for first in (a, b):
        crop = cut(window, first * torch.tensor(GRID.stride), GRID.size)
        features = torch.nn.functional.avg_pool3d(crop, stride)
        laid.append(GRID.map(features, first, stride))
    (x, seen_x), (y, seen_y) = laid
    both = (seen_x & seen_y)[:, None].expand_as(x)
    assert both.flatten(1).any(1).all() and torch.equal(x[both], y[both])
    where = torch.where(seen_x)
    shown = x.movedim(1, -1)[where]
    cells = torch.stack(where[1:], 1) * torch.tensor(stride) + (torch.tensor(stride) - 1) / 2
    assert torch.allclose(shown, cells)
    assert (x[~seen_x[:, None].expand_as(x)] == 0).all()


def test_laying_keeps_gradients_and_full_maps():
    x = torch.randn(2, 3, 4, 5, requires_grad=True)
    first = torch.tensor([[0, 1], [2, 0]])
    laid = lay_on(x, first, (6, 7))
    assert (
        laid.shape == (2, 3, 6, 7) and torch.equal(laid[0, :, :4, 1:6], x[0]) and torch.equal(laid[1, :, 2:, :5], x[1])
    )
    laid.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))
    assert lay_on(x, first, (4, 5)) is x
    assert torch.equal(in_box(first, first + torch.tensor([4, 5]), (6, 7))[:, 0], laid.detach().abs().sum(1) > 0)
