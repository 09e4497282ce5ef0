"""Where crops lie in a grid of cells (spec 1 and tests 1 to 8)."""

import itertools
import math

import numpy as np
import pytest
import torch

from nnssl.losses.overlap import base_crops, overlap_labels

LISTED = [
    ((0, 0), {(0, 0): 1.0}),
    ((64, 64), {(1, 1): 1.0}),
    ((32, 32), {(0, 0): 0.25, (0, 1): 0.25, (1, 0): 0.25, (1, 1): 0.25}),
    ((16, 48), {(0, 0): 0.1875, (0, 1): 0.5625, (1, 0): 0.0625, (1, 1): 0.1875}),
    ((128, 128), {(2, 2): 1.0}),
    ((100, 5), {(1, 0): 0.403320, (1, 1): 0.034180, (2, 0): 0.518555, (2, 1): 0.043945}),
]


@pytest.mark.parametrize(("offset", "cells"), LISTED)
def test_listed_labels(offset, cells):
    """(1) The hand-checked labels of a 3x3 grid of 64 voxels, and the same with an axis that is not split."""
    expected = torch.zeros(3, 3)
    for cell, share in cells.items():
        expected[cell] = share
    y = overlap_labels(torch.tensor(offset), (64, 64), (3, 3))
    torch.testing.assert_close(y, expected.flatten(), atol=1e-6, rtol=0)
    assert torch.equal(y, overlap_labels(torch.tensor((0, *offset)), (20, 64, 64), (1, 3, 3)))
    assert y.dtype == torch.float32


def random_case(rng):
    dim = int(rng.integers(2, 4))
    grid, size = rng.integers(1, 4, dim).tolist(), rng.integers(1, 9, dim).tolist()
    offset = [int(rng.integers(0, (g - 1) * c + 1)) for g, c in zip(grid, size)]
    return grid, size, offset


@pytest.mark.parametrize("seed", range(40))
def test_counts_of_voxels_equal_the_formula(seed):
    """(2, 3, 6) Voxel ids that a crop and a cell have in common, counted; sums, zeros and the number of non-zeros."""
    grid, size, offset = random_case(np.random.default_rng(seed))
    window = [g * c for g, c in zip(grid, size)]
    ids = torch.arange(math.prod(window)).view(1, 1, *window)
    cells = base_crops(ids, grid)[0].flatten(1)
    crop = ids[(0, 0, *[slice(o, o + c) for o, c in zip(offset, size)])].flatten()
    counted = torch.tensor([np.intersect1d(crop, cell).size for cell in cells]) / math.prod(size)
    y = overlap_labels(torch.tensor(offset), size, grid)
    torch.testing.assert_close(y, counted, atol=1e-7, rtol=0)
    assert torch.equal(y == 0, counted == 0)
    assert abs(y.double().sum() - 1) <= 1e-7
    assert bool((y >= 0).all()) and bool((y <= 1).all())
    assert int((y > 0).sum()) <= 2 ** sum(g > 1 for g in grid)


def test_base_crops_tile_the_window_in_the_order_of_the_labels():
    """(5, 7) They reassemble bit by bit, no voxel twice; cell i is the one whose offset has y_i = 1."""
    grid, size = (2, 3, 1), (4, 2, 5)
    window = torch.randn(2, 3, 8, 6, 5)
    base = base_crops(window, grid)
    offsets = torch.cartesian_prod(*[torch.arange(g) * c for g, c in zip(grid, size)])
    assert base.shape == (2, 6, 3, 4, 2, 5)
    rebuilt, seen = torch.zeros_like(window), torch.zeros(8, 6, 5)
    for i, o in enumerate(offsets.tolist()):
        box = tuple(slice(a, a + c) for a, c in zip(o, size))
        rebuilt[(slice(None), slice(None), *box)] = base[:, i]
        seen[box] += 1
        assert torch.equal(overlap_labels(offsets[i], size, grid), torch.eye(6)[i])
    assert torch.equal(rebuilt, window) and torch.equal(seen, torch.ones_like(seen))
    assert offsets.tolist()[:4] == [[0, 0, 0], [0, 2, 0], [0, 4, 0], [4, 0, 0]]
    with pytest.raises(ValueError, match="axis 1"):
        base_crops(torch.zeros(1, 1, 8, 7, 5), grid)


@pytest.mark.parametrize("seed", range(10))
def test_mirrored_offset_gives_mirrored_labels(seed):
    """(7)"""
    grid, size, offset = random_case(np.random.default_rng(100 + seed))
    y = overlap_labels(torch.tensor(offset), size, grid).view(*grid)
    for axis in range(len(grid)):
        other = list(offset)
        other[axis] = (grid[axis] - 1) * size[axis] - offset[axis]
        assert torch.equal(overlap_labels(torch.tensor(other), size, grid).view(*grid), y.flip(axis))


def test_labels_know_voxels_only():
    """(8) The same share of a cell gives the same labels whatever the size of a voxel."""
    for k, offset in itertools.product((1, 2, 5), [(3, 1, 4), (0, 5, 2)]):
        y = overlap_labels(torch.tensor([k * o for o in offset]), (4 * k, 3 * k, 2 * k), (2, 3, 4))
        assert torch.equal(y, overlap_labels(torch.tensor(offset), (4, 3, 2), (2, 3, 4)))
