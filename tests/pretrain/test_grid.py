"""Grids of cells for plans (spec 1.1)."""

import math

import pytest

from nnssl.errors import NnsslError
from nnssl.pretrain.methods.voco.grid import choose_grid

ISO = (1.0, 1.0, 1.0)
CHOSEN = {  # patch, median, total stride, spacing -> crop, grid
    "isotropic": ((128, 128, 128), (250, 400, 400), (32, 32, 32), ISO, (64, 64, 64), (1, 3, 3)),
    "slightly thick": ((80, 160, 160), (120, 260, 260), (16, 32, 32), (2.5, 1, 1), (48, 64, 64), (1, 3, 3)),
    "thick": ((28, 256, 256), (30, 512, 512), (4, 64, 64), (5, 0.7, 0.7), (28, 128, 128), (1, 3, 3)),
    "thick, small slices": ((28, 256, 256), (30, 256, 256), (4, 64, 64), (5, 0.7, 0.7), (28, 64, 64), (1, 3, 3)),
    "prostate": ((20, 256, 224), (20, 256, 216), (4, 32, 32), (6, 0.6, 0.6), (20, 64, 64), (1, 3, 3)),
    "brain": ((128, 128, 128), (140, 170, 140), (32, 32, 32), ISO, (64, 64, 64), (2, 3, 2)),
    "hippocampus": ((40, 56, 40), (35, 50, 35), (8, 8, 8), ISO, (16, 16, 16), (2, 3, 2)),
    "slices": ((320, 256), (320, 250), (64, 64), (1, 1), (128, 64), (3, 3)),
}


@pytest.mark.parametrize("name", CHOSEN)
def test_chosen(name):
    patch, median, stride, spacing, size, grid = CHOSEN[name]
    found = choose_grid(patch, median, stride, spacing)
    assert (found.size, found.grid) == (size, grid)
    assert found.window == tuple(c * g for c, g in zip(size, grid)) and found.cells == math.prod(grid)
    assert all(c % t == 0 and c <= p for c, t, p in zip(size, stride, patch))
    assert math.prod(c // t for c, t in zip(size, stride)) >= 2
    assert all(w <= m / 0.75 for w, m in zip(found.window, median))


def test_user_choice():
    hippocampus = CHOSEN["hippocampus"][:4]
    found = choose_grid(*hippocampus, grid=(3, 3, 2))
    assert (found.size, found.grid) == ((8, 16, 16), (3, 3, 2))
    found = choose_grid(*hippocampus, size=(8, 16, 16))
    assert (found.size, found.grid) == ((8, 16, 16), (3, 3, 1))
    found = choose_grid(*hippocampus, size=(8, 16, 16), grid=(4, 2, 1))
    assert found.window == (32, 32, 16)
    found = choose_grid(*hippocampus, fit=False)
    assert found.cells == 9 and "resampled" in found.explanation
    assert "exceeds the median image on axis 1 (192 of 170)" in choose_grid(*CHOSEN["brain"][:4]).explanation


REFUSED = [
    ({"grid": (3, 3, 3), "size": (16, 16, 16)}, "3 cells of 16 voxels on axis 0"),
    ({"grid": (2, 2, 4)}, "4 cells of 8 voxels on axis 2|no legal grid"),
    ({"grid": (1, 1, 3)}, "has 3 cell"),
    ({"grid": (3, 3)}, "3 numbers"),
    ({"size": (16, 20, 16)}, "axis 1, 20 is none"),
    ({"size": (8, 8, 8)}, "at least 2 are needed"),
    ({"size": (32, 48, 32)}, "no legal grid"),
]


@pytest.mark.parametrize(("given", "message"), REFUSED)
def test_refused(given, message):
    patch, _, stride, spacing = CHOSEN["hippocampus"][:4]
    with pytest.raises(NnsslError, match=message):
        choose_grid(patch, (35, 50, 22 if given.get("grid") == (2, 2, 4) else 35), stride, spacing, **given)


@pytest.mark.parametrize(
    ("patch", "median", "stride", "axis"),
    [
        ((32, 32, 32), (32, 32, 32), (32, 32, 32), "axis 0"),  # one voxel at the bottleneck
        ((16, 64, 64), (12, 64, 64), (32, 8, 8), "axis 0"),  # stride exceeds patch and image
        ((64, 64, 64), (60, 40, 40), (32, 32, 32), "axis 1 takes 1"),  # only two cells fit
        ((64, 64, 32), (70, 60, 20), (32, 32, 16), "axis 2 takes 1"),
    ],
)
def test_nothing_legal(patch, median, stride, axis):
    with pytest.raises(NnsslError, match=axis):
        choose_grid(patch, median, stride, ISO)


def test_whole_patch_where_half_of_it_is_not_legal():
    """Half the patch would have one voxel at the bottleneck."""
    found = choose_grid((64, 64, 64), (60, 60, 60), (32, 32, 32), ISO)
    assert (found.size, found.grid) == ((64, 32, 32), (1, 2, 2))
