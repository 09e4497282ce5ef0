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


HIPPOCAMPUS = ((40, 56, 40), (35, 50, 35), (8, 8, 8), ISO)


def test_four_cells_are_enough_and_three_along_an_axis_are_the_most():
    assert choose_grid(*HIPPOCAMPUS, grid=(1, 2, 2)).grid == (1, 2, 2)
    with pytest.raises(NnsslError, match="fits 1x1x3 times.*axis 0 takes 1"):  # 4 of them would fit
        choose_grid((16, 16, 256), (20, 20, 500), (16, 16, 16), ISO)


def test_less_than_a_quarter_of_a_window_may_lie_outside():
    patch, _, stride, spacing = HIPPOCAMPUS
    given = {"size": (16, 16, 16), "grid": (2, 2, 1)}  # windows of 32 voxels
    assert choose_grid(patch, (25, 50, 35), stride, spacing, **given).window == (32, 32, 16)
    with pytest.raises(NnsslError, match="2 cells of 16 voxels on axis 0 make a window of 32.*median image with 24"):
        choose_grid(patch, (24, 50, 35), stride, spacing, **given)
    with pytest.raises(NnsslError, match="axis 1 make a window of 32"):
        choose_grid(patch, (32, 24, 35), stride, spacing, **given)
    with pytest.raises(NnsslError, match="fits 1x1x1 times"):
        choose_grid((32, 32, 32), (24, 24, 24), (16, 16, 16), spacing)


def test_a_window_is_said_to_exceed_the_image_where_it_does():
    patch, _, stride, spacing = HIPPOCAMPUS
    given = {"size": (16, 16, 16), "grid": (2, 2, 1)}
    said = choose_grid(patch, (32, 31, 35), stride, spacing, **given).explanation
    assert "exceeds the median image on axis 1 (32 of 31):" in said
    assert "exceeds" not in choose_grid(patch, (32, 32, 16), stride, spacing, **given).explanation


@pytest.mark.parametrize(("thickness", "size"), [(3.0, (16, 128, 128)), (3.1, (28, 128, 128))])
def test_an_axis_is_thick_above_three_times_the_finest_spacing(thickness, size):
    """Then the cell is as thick as the patch; else about half of it, 14 voxels, to the next multiple of 4."""
    for scale in (1, 2, 0.25):
        spacing = (scale * thickness, scale, scale)
        found = choose_grid((28, 256, 256), (30, 512, 512), (4, 64, 64), spacing)
        assert (found.size, found.grid) == (size, (1, 3, 3))


@pytest.mark.parametrize(("width", "grid"), [(45, (3, 1, 3)), (46, (1, 3, 3))])
def test_a_window_that_exceeds_the_image_slightly_does_as_well(width, grid):
    """Windows of 48 voxels in 45 lie by 6 % outside, so that axis 1 is not split; in 46 by 4 %, which is no reason."""
    assert choose_grid((40, 40, 40), (48, width, 48), (8, 8, 8), ISO, size=(16, 16, 16)).grid == grid


def test_two_voxels_at_the_bottleneck_on_each_axis_come_before_padding():
    """On axis 0 cells of 8 lie in the image and have one such voxel; those of 16 exceed it by less than a quarter."""
    found = choose_grid((32, 32, 32), (13, 60, 60), (8, 4, 4), ISO)
    assert (found.size, found.grid) == ((16, 16, 16), (1, 3, 3))
    with pytest.raises(NnsslError, match="fits 0x3x3 times.*axis 0 takes 0"):
        choose_grid((32, 64, 64), (10, 64, 64), (16, 16, 16), ISO)
