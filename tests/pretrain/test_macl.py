"""MACL on tiny networks: shapes, gradients, views, labels, degenerate input, presets (spec T1, T13 to T19)."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from nnssl import losses
from nnssl.config import describe_options, make_config
from nnssl.errors import NnsslError
from nnssl.networks import build_network, forward_features, full_state_dict, own_padding
from nnssl.plans import Plan
from nnssl.pretrain.augment import StepRNG
from nnssl.pretrain.geometry import cells
from nnssl.pretrain.methods import Crops, SourceStats, get_method
from nnssl.pretrain.methods.macl import MACL, MACLConfig
from nnssl.pretrain.methods.macl.picture import ALIKE, COARSE, COARSE_COLOURS, COLOURS, FINE, TURNED, TURNED_COARSE

ISO = ((1, 1, 1), (2, 2, 2), (2, 2, 2))
THIN = ((1, 1, 1), (1, 2, 2), (2, 2, 2))  # U is 2 on each axis, the total stride is not
LAST = ((1, 1, 1), (2, 2, 2), (1, 2, 2))  # U is (1, 2, 2)
CASES = [(3, "plain", ISO), (3, "resenc", THIN), (3, "plain", LAST), (2, "plain", ISO), (2, "resenc", ISO)]


@pytest.fixture
def make(tiny_plans, tiny_dataset_json):
    """``make(dim, arch, strides, size=None, median=..., perturb=False, **options) -> MACL``."""

    def build(
        dim=3, arch="plain", strides=ISO, *, size=None, median=(28, 36, 26), perturb=False, channels=1, **options
    ):
        features = tuple(4 + 2 * i for i in range(len(strides)))
        plans = tiny_plans(
            dim, arch, channels, strides=strides, features=features, patch=(16, 32, 16), median_shape=median
        )
        plan = Plan.from_dicts(plans, "3d_fullres" if dim == 3 else "2d", tiny_dataset_json(channels))
        config = MACLConfig(**options)
        request = MACL.crops(plan, SourceStats(median, 9), config, size)
        network = build_network(plan)
        if perturb:  # the last norm of a residual branch starts at 0
            for m in network.modules():
                if isinstance(m, nn.modules.instancenorm._InstanceNorm):
                    nn.init.uniform_(m.weight, 0.5, 1.5)
        return MACL(network, plan, request, config)

    return build


def crops_for(method, b=4, channels=1, data=None):
    window = method.request.read_size
    data = torch.randn(b, channels, *window) if data is None else data
    along = torch.linspace(0.1, 0.9, b, dtype=torch.float64)
    position = torch.stack([along.flip(0), torch.full_like(along, 0.5), along], 1)
    body = torch.ones(b, 1, *window, dtype=torch.bool)
    intensity = torch.tensor([-2.0, 2.0]).expand(b, channels, 2)
    return Crops(
        data, body, position, position, intensity, torch.zeros(b, 3, dtype=torch.long), [f"case{i}" for i in range(b)]
    )


def batch_for(method, **kwargs):
    crops = crops_for(method, **kwargs)
    with torch.no_grad():
        return method.views(crops, StepRNG(0, 0, len(crops)))


def learning(module):
    return [p for p in module.parameters() if p.grad is not None and p.grad.abs().sum() > 0]


@pytest.mark.parametrize(("dim", "arch", "strides"), CASES)
@pytest.mark.parametrize(("blocks", "down", "offset"), [(1, 1, 1), (2, 1, 1), (2, 1, 0), (0, 0, 0)])
def test_maps_line_up(make, dim, arch, strides, blocks, down, offset):  # T1, T18
    method = make(dim, arch, strides, decoder_blocks=blocks, down=down, offset=offset)
    branches, size = method.branches, method.request.size
    batch = batch_for(method)
    assert list(batch["i_aux"].shape[2:]) == list(batch["v_aux"].shape[2:]) == list(size)
    for key in ("i_dominant", "v_dominant"):
        assert list(batch[key].shape[2:]) == cells(size, branches.shrink)
    (aux, dominant), (y, target) = method.dense_maps(batch["i_aux"], batch["i_dominant"])
    assert aux.shape == dominant.shape and list(aux.shape[2:]) == cells(size, branches.dense_stride)
    grid = zip(method.offsets.cells, method.plan.total_stride, branches.dense_stride)
    assert list(batch["sites"].shape[1:]) == [c * s // k for c, s, k in grid]
    assert offset or list(batch["sites"].shape[1:]) == list(aux.shape[2:])
    assert y.shape == losses.shrink(target, branches.shrink).shape
    terms = method(batch)
    assert all(torch.isfinite(torch.as_tensor(v)) for v in terms.values())
    weighted = terms["image"] + 0.5 * terms["dense"] + terms["equivariance"]
    assert torch.allclose(terms["total"], weighted)
    if blocks == 0:  # one network, one image: nothing to make equivariant
        assert terms["equivariance"] == 0


@pytest.mark.parametrize(("dim", "arch", "strides"), CASES)
@pytest.mark.parametrize("image_source", ["decoder", "encoder"])
def test_who_gets_a_gradient(make, dim, arch, strides, image_source):  # T13
    method = make(dim, arch, strides, perturb=True, image_source=image_source)
    batch = batch_for(method)
    heads = [method.image_aux, method.image_dominant]
    decoder = method.network.decoder
    for term in ("image", "dense", "equivariance"):
        method.zero_grad(set_to_none=True)
        method(batch)[term].backward()
        assert all(learning(stage) for stage in method.network.encoder.stages), term
        through = term == "dense" or (term == "image" and image_source == "decoder")
        for part in (decoder.transpconvs[0], decoder.stages[0]):
            assert bool(learning(part)) == through, term
        assert all(bool(learning(h)) == (term == "image") for h in heads)
        assert bool(learning(method.pixel_aux)) == (term == "dense")
        for part in (decoder.transpconvs[1:], decoder.stages[1:], decoder.seg_layers):
            assert all(p.grad is None and not p.requires_grad for p in part.parameters())
    method.zero_grad(set_to_none=True)
    method(batch)["total"].backward()
    for name, p in method.named_parameters():
        assert (p.grad is not None) == p.requires_grad, name
        assert p.grad is None or torch.isfinite(p.grad).all(), name


@pytest.mark.parametrize("arch", ["plain", "resenc"])
@pytest.mark.parametrize("optimiser", ["adamw", "sgd"])
@pytest.mark.parametrize("blocks", [1, 2])
def test_one_step_changes_what_is_pretrained_and_nothing_else(make, arch, optimiser, blocks):  # T13
    method = make(arch=arch, perturb=True, optimiser=optimiser, weight_decay=0.1, decoder_blocks=blocks, down=1)
    before = copy.deepcopy(method.network.state_dict())
    step = method.optimiser()
    method(batch_for(method))["total"].backward()
    step.step()
    assert method.pretrained_parts() == {"encoder": True, "decoder_stages": list(range(blocks))}
    trained = ["encoder.", "decoder.encoder."]
    trained += [f"decoder.{part}.{i}." for part in ("transpconvs", "stages") for i in range(blocks)]
    for name, tensor in method.network.state_dict().items():
        if not name.startswith(tuple(trained)):
            assert torch.equal(tensor, before[name]), name
        elif not (name.endswith("bias") and ("conv.bias" in name or "all_modules.0" in name or "transpconvs" in name)):
            # A convolution's bias before InstanceNorm has no gradient.
            assert not torch.equal(tensor, before[name]), name


def test_nothing_is_pretrained_beyond_what_the_terms_use(make):
    method = make(image_source="encoder", dense_weight=0.0)
    assert method.pretrained_parts() == {"encoder": True, "decoder_stages": []}
    terms = method(batch_for(method))
    assert "dense" not in terms
    terms["total"].backward()
    assert all((p.grad is not None) == p.requires_grad for p in method.parameters())
    only_dense = make(image_weight=0.0, equivariance_weight=0.0)
    terms = only_dense(batch_for(only_dense))
    assert torch.equal(terms["total"], 0.5 * terms["dense"])
    assert "image" not in terms and "equivariance" not in terms
    assert only_dense.embed(batch_for(only_dense)) is None
    learnt, _ = only_dense.verdict({"total": 2.0}, {"total": 1.0})
    assert learnt
    with pytest.raises(NnsslError, match="all 0"):
        make(image_weight=0.0, equivariance_weight=0.0, dense_weight=0.0)


def test_both_branches_train_one_encoder(make):  # T14
    method = make()
    batch = batch_for(method)
    positives = torch.eye(4, dtype=torch.bool)
    weight = next(method.network.encoder.parameters())

    def gradient(stop):
        z = list(method.image_vectors(batch["v_aux"], batch["v_dominant"]))
        if stop is not None:
            z[stop] = z[stop].detach()
        return torch.autograd.grad(losses.supcon(*z, positives), weight)[0]

    both, aux, dominant = gradient(None), gradient(1), gradient(0)
    assert not torch.allclose(both, aux) and not torch.allclose(both, dominant)
    assert torch.allclose(both, aux + dominant, atol=1e-5)
    assert method.network.decoder.encoder is method.network.encoder
    assert not list(method.buffers())
    roots = {name.split(".")[0] for name in method.state_dict()}
    assert roots == {"network", "image_aux", "image_dominant", "pixel_aux"}


@pytest.mark.parametrize("dim", [2, 3])
@pytest.mark.parametrize("align_corners", [False, True])
def test_still_views_are_the_crop_itself(make, dim, align_corners):  # T15
    method = make(dim, mirror=True, align_corners=align_corners, rotation=90.0, offset=0)
    window, size = method.request.read_size, method.request.size
    axes = torch.meshgrid(*[torch.arange(float(n)) for n in window], indexing="ij")
    data = sum(100**i * a for i, a in enumerate(axes)).expand(4, 1, *window).clone()
    crops = crops_for(method, data=data)
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
def test_still_views_lie_where_their_cells_say(make, dim):
    """Each branch's crop is the window's own voxels at its offset, so that their maps meet on the grid."""
    method = make(dim, median=(60, 72, 64), offset=1)
    grid, size = method.offsets, method.request.size
    assert grid.most == (1,) * dim and all(w >= v for w, v in zip(method.request.read_size, grid.voxels))
    window = method.request.read_size
    axes = torch.meshgrid(*[torch.arange(float(n)) for n in window], indexing="ij")
    data = sum(100**i * a for i, a in enumerate(axes)).expand(8, 1, *window).clone()
    batch = method.views(crops_for(method, b=8, data=data), StepRNG(0, 0, 8))
    edge = [(w - v) // 2 for w, v in zip(window, grid.voxels)]
    for i in range(8):
        for key, first in (("i_aux", "aux_cell"), ("i_dominant", "dominant_cell")):
            start = [e + int(c) * s for e, c, s in zip(edge, batch[first][i], grid.stride)]
            crop = data[(i, slice(None), *[slice(a, a + n) for a, n in zip(start, size)])]
            assert torch.equal(batch[key][i], crop if key == "i_aux" else losses.shrink(crop[None], (2,) * dim)[0])
    assert len({tuple(c) for c in (batch["aux_cell"] - batch["dominant_cell"]).tolist()}) > 2
    assert method(batch)["dense"] > 0


def test_offsets_are_legal_and_can_be_switched_off(make):
    for options in ({}, {"offset": 1, "dense_weight": 0.0, "equivariance_weight": 0.0}):
        method = make(median=(60, 72, 64), **options)
        assert not method.offsets.active and "aux_cell" not in batch_for(method)
    assert make(median=(60, 72, 64), offset=5).offsets.most == (3, 5, 3), "crops share a cell on each axis"
    assert make(size=(16, 32, 16), median=(18, 36, 60), offset=1).offsets.most == (0, 1, 1), "within the median image"
    still = {"rotation": 0.0, "min_scale": 1.0, "shift": 0.0}
    request = make(median=(60, 72, 64), offset=1, **still).request
    assert [w - n for w, n in zip(request.read_size, request.size)] == [4, 4, 4], "a cell of four voxels, and no more"
    assert make(median=(60, 72, 64), **still).request.read_size == request.size
    with pytest.raises(NnsslError, match="offset=0"):
        make(align_corners=True, offset=1)
    for preset in MACL.presets.values():
        assert preset["offset"] == 0 and preset["sites"] == "crops" and preset["padding"] == "zeros", "as published"


@pytest.mark.parametrize("padding", ["replicate", "circular", "zeros"])
def test_what_the_convolutions_see_beyond_the_border(make, padding):
    """Also where a bottleneck is one cell wide, at which reflection is impossible; the projectors see no border."""
    method = make(padding=padding, size=(16, 32, 16))
    modes = {m.padding_mode for m in method.network.modules() if isinstance(m, torch.nn.Conv3d)}
    assert modes == {padding}
    method(batch_for(method))["total"].backward()
    assert learning(method.network)
    assert make().config.padding == "replicate"


def test_dense_contrast_of_shifted_crops_looks_at_equal_voxels(make):
    """Maps that are the image itself: the loss is least where they are laid by their own cells."""
    method = make(median=(60, 72, 64), dense_positives="self", offset=1, sites="both")
    data = torch.randn(4, 1, *method.request.read_size)
    batch = method.views(crops_for(method, data=data), StepRNG(0, 0, 4))
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
def test_variance_views_are_mirrored_only_where_it_is_asked_for(make, mirror):
    """Neither turned nor scaled nor moved, each view is the crop or one of its mirror images."""
    method = make(mirror=mirror, rotation=0.0, min_scale=1.0, max_scale=1.0, shift=0.0, offset=0)
    batch, flipped = batch_for(method, b=8), set()
    for view in ("v_aux", "v_dominant"):
        for crop, seen in zip(batch["i" + view[1:]], batch[view]):
            axes = [[a + 1 for a in range(3) if k >> a & 1] for k in range(8)]
            same = [tuple(a) for a in axes if torch.allclose(crop.flip(a), seen, atol=1e-5)]
            assert len(same) == 1
            flipped |= set(same)
    assert {a for axes in flipped for a in axes} == ({1, 2, 3} if mirror else set())


def test_views_depend_on_the_draws_only(make):
    method = make(jitter=True)
    crops = crops_for(method)
    one, same, other = (method.views(crops, StepRNG(0, s, 4)) for s in (1, 1, 2))
    assert all(torch.equal(one[k], same[k]) for k in one)
    assert not torch.equal(one["v_aux"], other["v_aux"])
    assert not torch.equal(one["i_aux"], other["i_aux"])  # jittered
    half = method.views(crops_for(method, b=2, data=crops.data[2:]), StepRNG(0, 1, 4, 2, 2))
    assert torch.allclose(half["v_aux"], one["v_aux"][2:])


def test_labels_are_the_crops_own(make):  # T16
    method = make(rotation=180.0, mirror=True, shift=0.5)
    crops = crops_for(method)
    batch = method.views(crops, StepRNG(0, 0, 4))
    assert torch.equal(batch["position"], crops.position) and batch["position"].dtype == torch.float64
    terms = method(batch)
    assert terms["n_positives"] == 1 and terms["n_negatives"] == 6
    near = {**batch, "position": batch["position"] * torch.tensor([1.0, 1.0, 0.2])}
    changed = method(near)
    # Near along the body's axis only: positive for the image, not for a place in it.
    assert changed["n_positives"] > 1 and not torch.equal(changed["image"], terms["image"])
    assert torch.equal(changed["dense"], terms["dense"])
    sideways = {**batch, "position": batch["position"] * torch.tensor([0.2, 1.0, 1.0])}
    assert torch.equal(method(sideways)["image"], terms["image"])


def test_which_samples_are_dense_positives(make):
    batch = batch_for(make())
    batch["position"] = batch["position"] * torch.tensor([1.0, 1.0, 0.2])
    values = {}
    for mode in ("position_all_axes", "position_axial", "self"):
        torch.manual_seed(0)
        values[mode] = float(make(dense_positives=mode)(batch)["dense"].detach())
    assert values["position_all_axes"] == values["self"] != values["position_axial"]


def test_position_axis_is_an_option(make):
    batch = batch_for(make())
    batch["position"] = batch["position"] * torch.tensor([1.0, 0.2, 0.2])
    assert make(position_axis="right-left")(batch)["n_positives"] == 1
    assert make(position_axis="inferior-superior")(batch)["n_positives"] > 1


def test_equal_positions_leave_own_views_only(make):
    method = make()
    batch = batch_for(method)
    batch["position"] = torch.full((4, 3), 0.5, dtype=torch.float64)
    terms = method(batch)
    assert terms["n_positives"] == 1 and terms["n_negatives"] == 6
    request = MACL.crops(method.plan, SourceStats((16, 24, 16), 3), method.config, (16, 24, 16))
    assert "only a crop's own views are positives" in request.explanation
    assert "own views" not in method.request.explanation


def test_one_crop_is_refused(make):
    method = make()
    with pytest.raises(NnsslError, match="at least 2 crops.*batch_size"):
        method(batch_for(method, b=1))


@pytest.mark.parametrize("pooling", ["grid", "flatten", "gap", "gap+gmp"])
@pytest.mark.parametrize("what", ["zeros", "constant", "one empty", "no body", "nan position"])
def test_degenerate_crops_stay_finite(make, what, pooling):  # T17
    method = make(pooling=pooling)
    crops = crops_for(method)
    if what == "zeros":
        crops.data.zero_()
    elif what == "constant":
        crops.data.fill_(3.0)
    elif what == "one empty":
        crops.data[1], crops.body[1] = 0.0, False
    elif what == "no body":
        crops.body[:] = False
    elif what == "nan position":
        crops.position[1] = float("nan")
    terms = method(method.views(crops, StepRNG(0, 0, 4)))
    terms["total"].backward()
    assert all(torch.isfinite(torch.as_tensor(v)).all() for v in terms.values()), terms
    largest = torch.stack([p.grad.abs().max() for p in method.parameters() if p.grad is not None])
    assert torch.isfinite(largest).all() and largest.max() < 1e4
    if what == "no body":
        assert terms["image"] == 0 and terms["dense"] == 0


def test_empty_sites_are_masked(make):
    method = make(offset=0)
    crops = crops_for(method)
    crops.body[0, :, : crops.body.shape[2] // 2] = False
    batch = method.views(crops, StepRNG(0, 0, 4))
    n = method.request.size[0] // method.branches.dense_stride[0]
    assert not batch["sites"][0, : n // 2].any() and batch["sites"][0, n // 2 :].all() and batch["sites"][1:].all()
    dense = method(batch)["dense"]
    batch["sites"] = torch.ones_like(batch["sites"])
    assert not torch.equal(method(batch)["dense"], dense)


@pytest.mark.parametrize("arch", ["plain", "resenc"])
def test_image_vectors_see_differences_at_the_start(make, arch):
    """Different crops may not all look alike before training; global average pooling after InstanceNorm makes them."""
    batch = batch_for(make(arch=arch), b=8)
    cosine = {}
    for pooling, standardised in (("gap", False), ("grid", True)):
        torch.manual_seed(0)
        method = make(arch=arch, pooling=pooling, batch_standardise=standardised)
        cosine[pooling] = float(method(batch)["off_diagonal_cos"])
    assert cosine["grid"] < 0.9 < 0.97 < cosine["gap"]
    default = make(arch=arch)
    assert float(default(batch)["off_diagonal_cos"]) < 0.9
    assert default.embed(batch).shape == (8, default.config.proj_dim)


def test_weights_fit_the_stock_network(make):  # T19
    method = make(arch="resenc")
    step = method.optimiser()
    batch = batch_for(method)
    method(batch)["total"].backward()
    step.step()
    fresh = build_network(method.plan)
    fresh.load_state_dict(full_state_dict(method.network))
    with torch.no_grad(), own_padding(method.network):
        ours, theirs = (forward_features(n, batch["i_aux"], 1) for n in (method.network, fresh))
    assert all(torch.equal(a, b) for a, b in zip(ours.skips + ours.levels, theirs.skips + theirs.levels))


@pytest.mark.parametrize("preset", ["paper", "code"])
@pytest.mark.parametrize("dim", [2, 3])
def test_presets(make, preset, dim):
    config = make_config(MACLConfig, {}, get_method("macl").presets[preset])
    median = (64, 64, 64)
    method = make(dim, size=(32, 32, 16)[-dim:], median=median, **vars(config))
    assert (config.decoder_blocks, config.pooling, config.align_corners, config.optimiser) == (2, "gap", True, "sgd")
    assert method.branches.aux_stage == method.plan.n_stages - 1 and method.branches.shrink == (4,) * dim
    terms = method(batch_for(method))
    terms["total"].backward()
    assert all(torch.isfinite(torch.as_tensor(v)).all() for v in terms.values())
    assert isinstance(method.optimiser(), torch.optim.SGD)


def test_options_explain_themselves():
    rows = describe_options(MACLConfig)
    assert all(meaning for *_, meaning in rows)
    assert MACL.name == "macl" and MACL.title and MACL.citation
    for preset in MACL.presets.values():
        make_config(MACLConfig, {}, preset)


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


@pytest.mark.parametrize("dim", [2, 3])
def test_pictures(make, dim):
    method = make(dim, channels=2)
    batch = batch_for(method, b=6, channels=2)
    with torch.no_grad():
        picture = method.pictures(batch)
    height, width = method.request.size[-2:]
    assert list(picture.columns) == [FINE, COARSE, ALIKE, COLOURS, COARSE_COLOURS, TURNED, TURNED_COARSE]
    for caption, images in picture.columns.items():
        assert images.shape == (4, height, width, 3) if "colours" in caption else (4, height, width), caption
        assert np.isfinite(images).all()


@pytest.mark.parametrize("dim", [2, 3])
def test_cross_and_frame_show_one_place_in_both_views(make, dim):
    method = make(dim, jitter=False, offset=1)
    crops = crops_for(method, b=6)
    window = crops.data.shape[2:]
    ramp = sum(100.0**-i * torch.arange(n).view([n if a == i else 1 for a in range(dim)]) for i, n in enumerate(window))
    crops.data[:] = ramp
    with torch.no_grad():
        batch = method.views(crops, StepRNG(3, 0, len(crops)))
        picture = method.pictures(batch)
    assert (batch["aux_cell"] != batch["dominant_cell"]).any()
    assert picture.boxes and "yellow frame" in picture.note
    still = make(dim, jitter=False)
    plain = still.pictures(batch_for(still))
    assert not plain.boxes and plain.points and "frame" not in plain.note, "both views show the same crop"
    for row in range(4):
        (y, x), (v, u) = picture.points[FINE][row], picture.points[COARSE][row]
        fine, coarse = (picture.columns[c][row] for c in (FINE, COARSE))
        step = max(abs(fine[1, 0] - fine[0, 0]), abs(fine[0, 1] - fine[0, 0]))
        assert abs(fine[y, x] - coarse[v, u]) <= 2 * step + (1 if dim == 3 else 0)
        for caption, image in ((FINE, fine), (COARSE, coarse)):
            top, left, tall, wide = picture.boxes[caption][row]
            assert top >= 0 and top + tall <= image.shape[0] and left >= 0 and left + wide <= image.shape[1]
    assert np.array_equal(picture.boxes[FINE][:, 2:], picture.boxes[COARSE][:, 2:])


def test_verdict(make):
    method = make()
    good = {"total": 1.0, "image": 2.0, "image_collapse": 3.9, "image_pos_cos": 0.8, "image_neg_cos": 0.1}
    learnt, sentence = method.verdict(good, good)
    assert learnt and "learnt" in sentence and "0.80" in sentence and "3.9" in sentence
    for change in ({"image": 4.0}, {"image": 3.88}, {"image_pos_cos": 0.05}, {"image_neg_cos": 0.8}):
        learnt, sentence = method.verdict(good, {**good, **change})
        assert not learnt and "did not learn" in sentence


def test_learnt_begins_one_per_cent_below_collapse_and_one_hundredth_apart(make):
    method = make()
    terms = {"total": 1.0, "image": 3.95, "image_collapse": 4.0, "image_pos_cos": 0.5, "image_neg_cos": 0.489}
    assert method.verdict(terms, terms)[0]
    assert not method.verdict(terms, {**terms, "image": 3.97})[0]
    assert not method.verdict(terms, {**terms, "image_neg_cos": 0.491})[0]


def test_jitter_darkens_each_view_by_a_factor_of_its_own(make):
    """Of a constant image only brightness is seen: 0.2 to 1 of its height above the case's low percentile, -2."""
    method = make(jitter=True, size=(16, 16, 16), rotation=0.0, padding="zeros")
    crops = crops_for(method, b=64, data=torch.full((64, 1, *method.request.read_size), 2.0))
    batch = method.views(crops, StepRNG(0, 0, 64))
    factors = [(batch[k].flatten(1) + 2) / 4 for k in ("i_aux", "i_dominant")]
    for factor in factors:
        assert torch.allclose(factor, factor[:, :1].expand_as(factor), atol=1e-4)
        assert 0.2 <= factor.min() < 0.3 and 0.9 < factor.max() <= 1.0001
    assert not torch.allclose(factors[0][:, 0], factors[1][:, 0], atol=0.1)


def test_numbers_beside_the_loss(make):
    """By hand: of four crops two are near each other; 2 x 2 vectors are positives of those, 2 of the others, itself apart."""
    method = make()
    batch = batch_for(method)
    batch["position"] = torch.tensor([[0.5] * 2 + [p] for p in (0.1, 0.15, 0.5, 0.9)], dtype=torch.float64)
    terms = method(batch)
    assert float(terms["n_positives"]) == (3 + 3 + 1 + 1) / 4 and float(terms["n_negatives"]) == (4 + 4 + 6 + 6) / 4
    aux, dominant = method.image_vectors(batch["v_aux"], batch["v_dominant"])
    norms = torch.cat([aux, dominant]).norm(dim=1)
    assert float(terms["shortest_norm"]) == pytest.approx(float(norms.detach().min()), rel=1e-5)
    cosine = [torch.nn.functional.normalize(z.detach(), dim=1) for z in (aux, dominant)]
    mean = sum(float((z @ z.T).sum() - 4) / 12 for z in cosine) / 2
    assert float(terms["off_diagonal_cos"]) == pytest.approx(mean, abs=1e-4)
    assert float(terms["image_collapse"]) == pytest.approx(math.log(7) / 0.7, rel=1e-5)  # eight vectors
    batch["valid"] = torch.tensor([True, True, True, False])
    assert float(method(batch)["image_collapse"]) == pytest.approx(math.log(5) / 0.7, rel=1e-5)


def test_under_autocast(make):
    method = make()
    batch = batch_for(method)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        terms = method(batch)
    terms["total"].backward()
    assert terms["total"].dtype == torch.float32 and torch.isfinite(terms["total"])


@pytest.mark.parametrize("align_corners", [True, False])
def test_equivariance_shrinks_as_the_option_says(make, align_corners):
    method = make(align_corners=align_corners, offset=0, sites="crops")
    batch = batch_for(method)
    with torch.no_grad():
        value = float(method(batch)["equivariance"])
        bottlenecks = method.dense_maps(batch["i_aux"], batch["i_dominant"])[1]
        asked, other = (
            float(losses.equivariance_loss(*bottlenecks, method.branches.shrink, kind))
            for kind in (align_corners, not align_corners)
        )
    assert value == pytest.approx(asked, rel=1e-6) and abs(value - other) > 1e-3 * other


@pytest.mark.parametrize(
    ("options", "lines"),
    [
        ({}, [{"image"}, {"image_pos_cos", "image_neg_cos"}, {"dense"}, {"equivariance"}]),
        ({"image_weight": 0.0}, [{"dense"}, {"equivariance"}]),
        ({"dense_weight": 0.0}, [{"image"}, {"image_pos_cos", "image_neg_cos"}, {"equivariance"}]),
        ({"equivariance_weight": 0.0}, [{"image"}, {"image_pos_cos", "image_neg_cos"}, {"dense"}]),
    ],
)
def test_panels_are_of_the_terms_that_are_learnt_from(make, options, lines):
    curves = make(**options).curves()
    assert [set(c.lines) for c in curves] == lines
    units = {name: c.unit for c in curves for name in c.lines}
    assert "nats" in units.get("image", "nats") and "nats" in units.get("dense", "nats")
    assert "cosine" in units.get("image_pos_cos", "cosine")
    assert "difference" in units.get("equivariance", "difference")  # |Y - Y~|, which has no upper bound
