"""Legal pretraining crops, windows, and the alignment of MACL's branches."""

import math
from types import SimpleNamespace

import pytest

from nnssl.errors import NnsslError
from nnssl.plans import Plan
from nnssl.pretrain.geometry import (
    asymmetry,
    cells,
    choose_crop,
    largest_spread,
    read_size_for,
    rotation_degrees,
    size_text,
    whole_patch,
)

ISO = ((1, 1, 1), (2, 2, 2), (2, 2, 2), (2, 2, 2))
THICK = ((1, 1, 1), (1, 2, 2), (2, 2, 2), (2, 2, 2), (1, 2, 2))
ATRIUM = ((1, 1, 1), (2, 2, 2), (2, 2, 2), (2, 2, 2), (1, 2, 2))


@pytest.fixture
def plan(tiny_plans, tiny_dataset_json):
    def make(strides, dim=3, **kwargs):
        plans = tiny_plans(dim, strides=strides, **kwargs)
        return Plan.from_dicts(plans, "3d_fullres" if dim == 3 else "2d", tiny_dataset_json())

    return make


@pytest.mark.parametrize(
    ("patch", "median", "multiple", "expected"),
    [
        ((40, 56, 40), (36, 50, 36), (16, 16, 16), (16, 32, 16)),  # hippocampus
        ((48, 80, 96), (44, 71, 95), (8, 32, 32), (24, 32, 64)),  # left atrium
        ((128, 128, 128), (300, 300, 300), (64, 64, 64), (128, 128, 128)),
        ((16, 192, 192), (16, 256, 256), (4, 32, 32), (8, 160, 160)),  # thick slices
        ((160, 128, 112), (180, 150, 130), (64, 64, 32), (64, 64, 64)),
        ((64, 64, 64), (80, 80, 80), (64, 64, 64), None),  # one bottleneck voxel
        ((64, 128, 64), (80, 140, 80), (64, 64, 64), (64, 128, 64)),  # grows where there is room
    ],
)
def test_crops_that_are_compared(patch, median, multiple, expected):
    if expected is None:
        with pytest.raises(
            NnsslError, match="at least 2 voxels at the bottleneck.*axis 0 would need 128.*patch has 64.*image 80"
        ):
            choose_crop(patch, median, multiple)
        return
    size, why = choose_crop(patch, median, multiple)
    assert size == expected
    assert size_text(size) in why and size_text(multiple) in why and size_text(median) in why
    assert math.prod(cells(size, multiple)) >= 2


@pytest.mark.parametrize(
    ("patch", "median", "multiple", "expected"),
    [
        ((40, 56, 40), (36, 50, 36), (8, 8, 8), (40, 56, 40)),
        ((512, 512), (400, 400), (256, 256), (512, 512)),
        ((256, 256), (240, 240), (128, 128), (256, 256)),
        ((56, 40), (50, 36), (16, 16), (48, 32)),
    ],
)
def test_crops_that_are_not_compared_fill_the_patch(patch, median, multiple, expected):
    assert choose_crop(patch, median, multiple, compare=False)[0] == expected


def test_an_axis_without_a_legal_size_is_named():
    with pytest.raises(NnsslError, match="multiple of 64 voxels on axis 1.*patch has 40.*median image 36"):
        choose_crop((128, 40, 128), (128, 36, 128), (32, 64, 32))


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((16, 30, 16), "multiple of 16 voxels on axis 1, 30 is none. The nearest is 32"),
        ((16, 32), "has 2 axes, the plan's patch has 3"),
        ((16, 16, 16), "1x1x1 voxels, and at least 2"),
        ((0, 16, 16), "axis 0, 0 is none. The nearest is 16"),
    ],
)
def test_the_users_crop_is_checked(size, message):
    with pytest.raises(NnsslError, match=message):
        choose_crop((40, 56, 40), (36, 50, 36), (16, 16, 16), size=size)


def test_a_legal_users_crop_is_kept():
    size, why = choose_crop((40, 56, 40), (36, 50, 36), (16, 16, 16), size=[32, 48, 32])
    assert size == (32, 48, 32) and "as asked for" in why


def test_spread():
    assert largest_spread((16, 32, 16), (36, 50, 36)) == pytest.approx(20 / 36)
    assert largest_spread((40, 56, 40), (36, 50, 36)) == 0


def test_rotation_in_thick_slices():
    assert rotation_degrees((1.0, 1.0, 1.0), 30) == (30, 30, 30)
    assert rotation_degrees((5.0, 1.0, 1.0), 30) == (30, 0, 0)
    assert rotation_degrees((1.0, 1.0, 5.0), 30) == (0, 0, 30)
    assert rotation_degrees((1.0, 1.0), 30) == (30,)


def test_window():
    assert read_size_for((16, 32, 24), (1.0, 1.0, 1.0)) == (16, 32, 24)
    # A square turned by 45 degrees reaches sqrt(2) farther.
    assert read_size_for((20, 20), (1.0, 1.0), rotation=(45.0,)) == (30, 30)
    assert read_size_for((20, 20), (1.0, 1.0), rotation=(90.0,)) == (30, 30)
    assert read_size_for((20, 20), (1.0, 1.0), min_scale=0.8) == (26, 26)
    assert read_size_for((20, 20), (1.0, 1.0), shift=0.1) == (24, 24)
    assert read_size_for((20, 20), (1.0, 1.0), min_scale=0.1) == (40, 40)  # at most twice
    # 10 slices of 4 mm are as long as 40 voxels of 1 mm.
    assert read_size_for((10, 40), (4.0, 1.0), rotation=(45.0,)) == (16, 58)
    assert all(
        (w - n) % 2 == 0 for w, n in zip(read_size_for((7, 9, 11), (1.0, 2.0, 3.0), rotation=(30.0,) * 3), (7, 9, 11))
    )
    # The margin leaves crops two thirds of their places.
    assert read_size_for((16, 32, 16), (1.0,) * 3, rotation=(30.0,) * 3, min_scale=0.8, median=(36, 50, 16)) == (
        22,
        38,
        16,
    )


@pytest.mark.parametrize(
    ("strides", "blocks", "down", "shrink", "aux_stage", "dense", "multiple"),
    [
        (ISO, 1, 1, (2, 2, 2), 3, (8, 8, 8), (16, 16, 16)),
        (ISO, 2, 2, (4, 4, 4), 3, (8, 8, 8), (32, 32, 32)),
        (ISO, 2, 1, (2, 2, 2), 2, (4, 4, 4), (16, 16, 16)),
        (ISO, 0, 0, (1, 1, 1), 3, (8, 8, 8), (8, 8, 8)),
        (THICK, 2, 2, (2, 4, 4), 4, (4, 16, 16), (8, 64, 64)),
        (THICK, 2, 1, (2, 2, 2), 3, (4, 8, 8), (8, 32, 32)),
        (ATRIUM, 1, 1, (1, 2, 2), 4, (8, 16, 16), (8, 32, 32)),
    ],
)
def test_branches_line_up(plan, strides, blocks, down, shrink, aux_stage, dense, multiple):
    p = plan(strides)
    a = asymmetry(p, blocks, down)
    assert (a.shrink, a.aux_stage, a.dense_stride, a.multiple) == (shrink, aux_stage, dense, multiple)
    # The dominant decoder's map, in voxels of the full image, is as coarse as the auxiliary map.
    decoder = p.cumulative_strides[p.n_stages - 1 - blocks]
    assert tuple(d * u for d, u in zip(decoder, a.shrink)) == a.dense_stride


@pytest.mark.parametrize(
    ("blocks", "down", "message"), [(4, 1, "3 decoder stages"), (1, 2, "from 1 to 1"), (2, 0, "from 1 to 2")]
)
def test_branches_that_cannot_line_up(plan, blocks, down, message):
    with pytest.raises(NnsslError, match=message):
        asymmetry(plan(ISO), blocks, down)


@pytest.mark.parametrize(
    ("patch", "median", "multiple", "compare", "expected"),
    [
        ((64, 128), (60, 100), (64, 32), False, (64, 128)),  # one multiple fills an axis exactly
        ((64, 128, 64), (80, 100, 80), (64, 64, 64), True, (64, 128, 64)),  # an axis may grow to all that there is
        ((64, 160, 140), (60, 90, 90), (64, 64, 64), True, (64, 128, 64)),  # the one with most room grows
        ((64, 140, 160), (60, 90, 90), (64, 64, 64), True, (64, 64, 128)),
        ((64, 96), (100, 100), (32, 32), True, (64, 64)),
        ((64, 96), (100, 100), (32, 32), False, (64, 96)),
        ((32, 32), (20, 60), (32, 16), True, (32, 32)),  # never less than one multiple
    ],
)
def test_edges_of_the_choice(patch, median, multiple, compare, expected):
    size, why = choose_crop(patch, median, multiple, compare=compare)
    assert size == expected
    assert ("two thirds" in why) == compare and size_text(patch) in why


def test_more_voxels_at_the_bottleneck_on_request():
    assert choose_crop((64, 64), (64, 64), (16, 16), min_voxels=4)[0] == (32, 32)
    assert choose_crop((64, 64), (64, 64), (32, 32), min_voxels=4)[0] == (64, 64)
    with pytest.raises(NnsslError, match="at least 5 voxels.*axis 0 would need 96.*patch has 64.*image 64"):
        choose_crop((64, 100), (64, 64), (32, 64), min_voxels=5)
    with pytest.raises(NnsslError, match="at least 5"):
        choose_crop((64, 64), (64, 64), (32, 32), size=(64, 64), min_voxels=5)
    assert choose_crop((64, 64), (64, 64), (32, 32), size=(64, 64), min_voxels=4)[0] == (64, 64)


def test_thick_means_more_than_three_times():
    assert rotation_degrees((3.0, 1.0, 1.0), 30) == (30, 30, 30)
    assert rotation_degrees((1.0, 3.01, 1.0), 30) == (0, 30, 0)
    assert rotation_degrees((4.0, 2.0, 2.0), 30, threshold=1.9) == (30, 0, 0)
    assert rotation_degrees((4.0, 2.0, 2.0), 30) == (30, 30, 30) and rotation_degrees((0.5, 0.1, 0.1), 30) == (30, 0, 0)


def test_the_crop_of_a_primus_is_its_patch():
    plan = SimpleNamespace(patch_size=(8, 12, 32), total_stride=(4, 4, 8), network_class="Primus")
    for size in (None, [8, 12, 32]):
        chosen, why = whole_patch(plan, size)
        assert chosen == (8, 12, 32) and "8x12x32 voxels, as 2x3x4 tokens of 4x4x8" in why
    with pytest.raises(NnsslError, match="--crop 8x12x16: a Primus.*patch of 8x12x32"):
        whole_patch(plan, (8, 12, 16))


def test_a_turn_about_an_axis_widens_the_other_two():
    for axis in range(3):
        rotation = tuple(45.0 if a == axis else 0.0 for a in range(3))
        expected = tuple(20 if a == axis else 30 for a in range(3))
        assert read_size_for((20, 20, 20), (1.0, 1.0, 1.0), rotation=rotation) == expected
        assert read_size_for((20, 20, 20), (1.0, 1.0, 1.0), rotation=tuple(-r for r in rotation)) == expected
    # 40 by 10: the far corner of the long side comes nearest to its axis at atan(1/4), and 45 degrees give 25 of 2 sqrt(2).
    assert read_size_for((10, 40), (1.0, 1.0), rotation=(45.0,)) == (20, 42)
    assert read_size_for((10, 40), (1.0, 1.0), rotation=(45.0,), most=4.0) == (36, 42)
    assert read_size_for((20, 20), (1.0, 1.0), rotation=(10.0,)) == (24, 24)  # 20 (cos + sin) 10 degrees = 23.2
    assert read_size_for((20, 20), (1.0, 1.0), min_scale=1.5) == (20, 20)  # larger views need no more
    assert read_size_for((20, 20), (1.0, 1.0), min_scale=0.8, shift=0.1) == (30, 30)
    assert read_size_for((20, 20), (1.0, 1.0), min_scale=0.5, median=(20, 32)) == (20, 24)
    assert read_size_for((20, 20), (1.0, 1.0), min_scale=0.5, median=(10, 500)) == (20, 40)


def test_as_many_blocks_as_there_are_stages(plan):
    p = plan(ISO)
    a = asymmetry(p, 3, 3)
    assert (a.blocks, a.shrink, a.aux_stage, a.dense_stride, a.multiple) == (3, (8, 8, 8), 3, (8, 8, 8), (64, 64, 64))
    assert asymmetry(p, 3, 1).shrink == (2, 2, 2) and asymmetry(p, 3, 1).aux_stage == 1
    for blocks, down in ((-1, 0), (-1, -1), (0, 1)):
        with pytest.raises(NnsslError):
            asymmetry(p, blocks, down)
