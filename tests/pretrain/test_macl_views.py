"""MACL's views: the still pair, its offsets and padding, and the pair that is turned and scaled."""

import pytest
import torch

from nnssl import losses
from nnssl.errors import NnsslError
from nnssl.plans import Plan
from nnssl.pretrain.augment import StepRNG
from nnssl.pretrain.methods import SourceStats
from nnssl.pretrain.methods.macl import MACL, MACLConfig


@pytest.mark.parametrize("dim", [2, 3])
@pytest.mark.parametrize("align_corners", [False, True])
def test_still_views_are_the_crop_itself(make_macl, dim, align_corners, macl_crops):  # T15
    method = make_macl(dim, mirror=True, align_corners=align_corners, rotation=90.0, offset=0)
    window, size = method.request.read_size, method.request.size
    axes = torch.meshgrid(*[torch.arange(float(n)) for n in window], indexing="ij")
    data = sum(100**i * a for i, a in enumerate(axes)).expand(4, 1, *window).clone()
    crops = macl_crops(method, data=data)
    before = crops.data.clone()
    batch = method.views(crops, StepRNG(0, 0, 4))
    start = [(w - n) // 2 for w, n in zip(window, size)]
    inner = data[(..., *[slice(s, s + n) for s, n in zip(start, size)])]
    assert torch.equal(crops.data, before)
    assert torch.equal(batch["i_aux"], inner)
    assert torch.equal(batch["i_dominant"], losses.shrink(inner, method.branches.shrink, align_corners))
    memory = {crops.data.untyped_storage().data_ptr(), batch["i_aux"].untyped_storage().data_ptr()}
    assert batch["v_aux"].untyped_storage().data_ptr() not in memory
    assert batch["v_dominant"].untyped_storage().data_ptr() not in memory
    shrunk = losses.shrink(batch["v_aux"], method.branches.shrink, align_corners)
    assert all(not torch.allclose(a, b) for a, b in zip(shrunk, batch["v_dominant"]))
    assert all(not torch.allclose(a, b) for a, b in zip(batch["v_aux"], inner))


@pytest.mark.parametrize("dim", [2, 3])
def test_still_views_lie_where_their_cells_say(make_macl, dim, macl_crops):
    """Each branch's crop is the window's own voxels at its offset, so that their maps meet on the grid."""
    method = make_macl(dim, median=(60, 72, 64), offset=1)
    grid, size = method.offsets, method.request.size
    assert grid.most == (1,) * dim and all(w >= v for w, v in zip(method.request.read_size, grid.voxels))
    window = method.request.read_size
    axes = torch.meshgrid(*[torch.arange(float(n)) for n in window], indexing="ij")
    data = sum(100**i * a for i, a in enumerate(axes)).expand(8, 1, *window).clone()
    batch = method.views(macl_crops(method, b=8, data=data), StepRNG(0, 0, 8))
    edge = [(w - v) // 2 for w, v in zip(window, grid.voxels)]
    for i in range(8):
        for key, first in (("i_aux", "aux_cell"), ("i_dominant", "dominant_cell")):
            start = [e + int(c) * s for e, c, s in zip(edge, batch[first][i], grid.stride)]
            crop = data[(i, slice(None), *[slice(a, a + n) for a, n in zip(start, size)])]
            assert torch.equal(batch[key][i], crop if key == "i_aux" else losses.shrink(crop[None], (2,) * dim)[0])
    assert len({tuple(c) for c in (batch["aux_cell"] - batch["dominant_cell"]).tolist()}) > 2
    assert method(batch)["dense"] > 0


def test_offsets_are_legal_and_can_be_switched_off(make_macl, macl_batch):
    for options in ({}, {"offset": 1, "dense_weight": 0.0, "equivariance_weight": 0.0}):
        method = make_macl(median=(60, 72, 64), **options)
        assert not method.offsets.active and "aux_cell" not in macl_batch(method)
    assert make_macl(median=(60, 72, 64), offset=5).offsets.most == (3, 5, 3), "crops share a cell on each axis"
    assert make_macl(size=(16, 32, 16), median=(18, 36, 60), offset=1).offsets.most == (0, 1, 1), (
        "within the median image"
    )
    still = {"rotation": 0.0, "min_scale": 1.0, "shift": 0.0}
    request = make_macl(median=(60, 72, 64), offset=1, **still).request
    assert [w - n for w, n in zip(request.read_size, request.size)] == [4, 4, 4], "a cell of four voxels, and no more"
    assert make_macl(median=(60, 72, 64), **still).request.read_size == request.size
    with pytest.raises(NnsslError, match="offset=0"):
        make_macl(align_corners=True, offset=1)
    for preset in MACL.presets.values():
        assert preset["offset"] == 0 and preset["sites"] == "crops" and preset["padding"] == "zeros", "as published"


@pytest.mark.parametrize("padding", ["replicate", "circular", "zeros"])
def test_what_the_convolutions_see_beyond_the_border(make_macl, padding, macl_batch):
    """Also where a bottleneck is one cell wide, at which reflection is impossible; the projectors see no border."""
    method = make_macl(padding=padding, size=(16, 32, 16))
    modes = {m.padding_mode for m in method.network.modules() if isinstance(m, torch.nn.Conv3d)}
    assert modes == {padding}
    method(macl_batch(method))["total"].backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in method.network.parameters())
    assert make_macl().config.padding == "replicate"


def test_dense_contrast_of_shifted_crops_looks_at_equal_voxels(make_macl, macl_crops):
    """Maps that are the image itself: the loss is least where they are laid by their own cells."""
    method = make_macl(median=(60, 72, 64), dense_positives="self", offset=1, sites="both")
    data = torch.randn(4, 1, *method.request.read_size)
    batch = method.views(macl_crops(method, data=data), StepRNG(0, 0, 4))
    stride, scale = method.branches.dense_stride, 2
    maps = [losses.shrink(batch["i_aux"], stride), losses.shrink(batch["i_dominant"], [s // scale for s in stride])]
    maps = [torch.cat([m, torch.ones_like(m), m.sign()], 1) for m in maps]
    own, kernel = torch.eye(4, dtype=torch.bool), {"temperature": 0.1, "base_temperature": 0.07, "contrast": "all"}
    right = method._dense(maps, batch, own, kernel)["dense"]
    wrong = method._dense(maps, {**batch, "aux_cell": 1 - batch["aux_cell"]}, own, kernel)["dense"]
    assert right < 0.7 * wrong
    bottlenecks = [losses.shrink(batch["i_dominant"], method.plan.total_stride)]
    bottlenecks.append(losses.shrink(batch["i_aux"], method.plan.total_stride))
    whole = method._equivariance(tuple(bottlenecks), batch)
    assert whole < 0.5 * method._equivariance(tuple(bottlenecks), {**batch, "aux_cell": 1 - batch["aux_cell"]})


@pytest.mark.parametrize("mirror", [False, True])
def test_variance_views_are_mirrored_only_where_it_is_asked_for(make_macl, mirror, macl_batch):
    """Neither turned nor scaled nor moved, each view is the crop or one of its mirror images."""
    method = make_macl(mirror=mirror, rotation=0.0, min_scale=1.0, max_scale=1.0, shift=0.0, offset=0)
    batch, flipped = macl_batch(method, b=8), set()
    for view in ("v_aux", "v_dominant"):
        for crop, seen in zip(batch["i" + view[1:]], batch[view]):
            axes = [[a + 1 for a in range(3) if k >> a & 1] for k in range(8)]
            same = [tuple(a) for a in axes if torch.allclose(crop.flip(a), seen, atol=1e-5)]
            assert len(same) == 1
            flipped |= set(same)
    assert {a for axes in flipped for a in axes} == ({1, 2, 3} if mirror else set())


def test_views_depend_on_the_draws_only(make_macl, macl_crops):
    method = make_macl(jitter=True)
    crops = macl_crops(method)
    one, same, other = (method.views(crops, StepRNG(0, s, 4)) for s in (1, 1, 2))
    assert all(torch.equal(one[k], same[k]) for k in one)
    assert not torch.equal(one["v_aux"], other["v_aux"])
    assert not torch.equal(one["i_aux"], other["i_aux"])  # jittered
    half = method.views(macl_crops(method, b=2, data=crops.data[2:]), StepRNG(0, 1, 4, 2, 2))
    assert torch.allclose(half["v_aux"], one["v_aux"][2:])


def test_the_crop_of_the_examples_in_the_design(tiny_plans, tiny_dataset_json):
    def choose(strides, patch, median, **options):
        plans = tiny_plans(3, strides=strides, patch=patch, median_shape=median)
        plan = Plan.from_dicts(plans, "3d_fullres", tiny_dataset_json())
        return MACL.crops(plan, SourceStats(median, 9), MACLConfig(**options))

    hippocampus = ((1, 1, 1), (2, 2, 2), (2, 2, 2), (2, 2, 2)), (40, 56, 40), (36, 50, 36)
    request = choose(*hippocampus)
    assert request.size == (16, 32, 16) and request.batch_size >= 8
    assert "16x32x16" in request.explanation and "36x50x36" in request.explanation
    assert all(w >= n and (w - n) % 2 == 0 for w, n in zip(request.read_size, request.size))
    atrium = ((1, 1, 1), (2, 2, 2), (2, 2, 2), (2, 2, 2), (1, 2, 2)), (40, 80, 96), (44, 71, 95)
    assert choose(*atrium).size == (24, 32, 64)
    assert choose(*hippocampus, decoder_blocks=2, down=1).size == (16, 32, 16)
    with pytest.raises(NnsslError, match="multiples of 32x32x32.*at least 2 voxels at the bottleneck"):
        choose(*hippocampus, decoder_blocks=2)


def test_jitter_darkens_each_view_by_a_factor_of_its_own(make_macl, macl_crops):
    """Of a constant image only brightness is seen: 0.2 to 1 of its height above the case's low percentile, -2."""
    method = make_macl(jitter=True, size=(16, 16, 16), rotation=0.0, padding="zeros")
    crops = macl_crops(method, b=64, data=torch.full((64, 1, *method.request.read_size), 2.0))
    batch = method.views(crops, StepRNG(0, 0, 64))
    factors = [(batch[k].flatten(1) + 2) / 4 for k in ("i_aux", "i_dominant")]
    for factor in factors:
        assert torch.allclose(factor, factor[:, :1].expand_as(factor), atol=1e-4)
        assert 0.2 <= factor.min() < 0.3 and 0.9 < factor.max() <= 1.0001
    assert not torch.allclose(factors[0][:, 0], factors[1][:, 0], atol=0.1)
