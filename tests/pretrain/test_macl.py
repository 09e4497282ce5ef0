"""MACL on tiny networks: shapes, gradients, views, labels, degenerate input, presets (spec T1, T13 to T19)."""

import copy

import pytest
import torch

from nnssl import losses
from nnssl.config import make_config
from nnssl.errors import NnsslError
from nnssl.networks import build_network, forward_features, full_state_dict, own_padding
from nnssl.pretrain.augment import StepRNG
from nnssl.pretrain.geometry import cells
from nnssl.pretrain.methods import SourceStats, get_method
from nnssl.pretrain.methods.macl import MACL, MACLConfig

ISO = ((1, 1, 1), (2, 2, 2), (2, 2, 2))


THIN = ((1, 1, 1), (1, 2, 2), (2, 2, 2))  # U is 2 on each axis, the total stride is not


LAST = ((1, 1, 1), (2, 2, 2), (1, 2, 2))  # U is (1, 2, 2)


CASES = [(3, "plain", ISO), (3, "resenc", THIN), (3, "plain", LAST), (2, "plain", ISO), (2, "resenc", ISO)]


def learning(module):
    return [p for p in module.parameters() if p.grad is not None and p.grad.abs().sum() > 0]


@pytest.mark.parametrize(("dim", "arch", "strides"), CASES)
@pytest.mark.parametrize(("blocks", "down", "offset"), [(1, 1, 1), (2, 1, 1), (2, 1, 0), (0, 0, 0)])
def test_maps_line_up(make_macl, dim, arch, strides, blocks, down, offset, macl_batch):  # T1, T18
    method = make_macl(dim, arch, strides, decoder_blocks=blocks, down=down, offset=offset)
    branches, size = method.branches, method.request.size
    batch = macl_batch(method)
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
def test_who_gets_a_gradient(make_macl, dim, arch, strides, image_source, macl_batch):  # T13
    method = make_macl(dim, arch, strides, perturb=True, image_source=image_source)
    batch = macl_batch(method)
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
def test_one_step_changes_what_is_pretrained_and_nothing_else(make_macl, arch, optimiser, blocks, macl_batch):  # T13
    method = make_macl(arch=arch, perturb=True, optimiser=optimiser, weight_decay=0.1, decoder_blocks=blocks, down=1)
    before = copy.deepcopy(method.network.state_dict())
    step = method.optimiser()
    method(macl_batch(method))["total"].backward()
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


def test_nothing_is_pretrained_beyond_what_the_terms_use(make_macl, macl_batch):
    method = make_macl(image_source="encoder", dense_weight=0.0)
    assert method.pretrained_parts() == {"encoder": True, "decoder_stages": []}
    terms = method(macl_batch(method))
    assert "dense" not in terms
    terms["total"].backward()
    assert all((p.grad is not None) == p.requires_grad for p in method.parameters())
    only_dense = make_macl(image_weight=0.0, equivariance_weight=0.0)
    terms = only_dense(macl_batch(only_dense))
    assert torch.equal(terms["total"], 0.5 * terms["dense"])
    assert "image" not in terms and "equivariance" not in terms
    assert only_dense.embed(macl_batch(only_dense)) is None
    learnt, _ = only_dense.verdict({"total": 2.0}, {"total": 1.0})
    assert learnt
    with pytest.raises(NnsslError, match="all 0"):
        make_macl(image_weight=0.0, equivariance_weight=0.0, dense_weight=0.0)


def test_both_branches_train_one_encoder(make_macl, macl_batch):  # T14
    method = make_macl()
    batch = macl_batch(method)
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


def test_labels_are_the_crops_own(make_macl, macl_crops):  # T16
    method = make_macl(rotation=180.0, mirror=True, shift=0.5)
    crops = macl_crops(method)
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


def test_which_samples_are_dense_positives(make_macl, macl_batch):
    batch = macl_batch(make_macl())
    batch["position"] = batch["position"] * torch.tensor([1.0, 1.0, 0.2])
    values = {}
    for mode in ("position_all_axes", "position_axial", "self"):
        torch.manual_seed(0)
        values[mode] = float(make_macl(dense_positives=mode)(batch)["dense"].detach())
    assert values["position_all_axes"] == values["self"] != values["position_axial"]


def test_position_axis_is_an_option(make_macl, macl_batch):
    batch = macl_batch(make_macl())
    batch["position"] = batch["position"] * torch.tensor([1.0, 0.2, 0.2])
    assert make_macl(position_axis="right-left")(batch)["n_positives"] == 1
    assert make_macl(position_axis="inferior-superior")(batch)["n_positives"] > 1


def test_equal_positions_leave_own_views_only(make_macl, macl_batch):
    method = make_macl()
    batch = macl_batch(method)
    batch["position"] = torch.full((4, 3), 0.5, dtype=torch.float64)
    terms = method(batch)
    assert terms["n_positives"] == 1 and terms["n_negatives"] == 6
    request = MACL.crops(method.plan, SourceStats((16, 24, 16), 3), method.config, (16, 24, 16))
    assert "only a crop's own views are positives" in request.explanation
    assert "own views" not in method.request.explanation


def test_one_crop_is_refused(make_macl, macl_batch):
    method = make_macl()
    with pytest.raises(NnsslError, match="at least 2 crops.*batch_size"):
        method(macl_batch(method, b=1))


@pytest.mark.parametrize("pooling", ["grid", "flatten", "gap", "gap+gmp"])
@pytest.mark.parametrize("what", ["zeros", "constant", "one empty", "no body", "nan position"])
def test_degenerate_crops_stay_finite(make_macl, what, pooling, macl_crops):  # T17
    method = make_macl(pooling=pooling)
    crops = macl_crops(method)
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


def test_empty_sites_are_masked(make_macl, macl_crops):
    method = make_macl(offset=0)
    crops = macl_crops(method)
    crops.body[0, :, : crops.body.shape[2] // 2] = False
    batch = method.views(crops, StepRNG(0, 0, 4))
    n = method.request.size[0] // method.branches.dense_stride[0]
    assert not batch["sites"][0, : n // 2].any() and batch["sites"][0, n // 2 :].all() and batch["sites"][1:].all()
    dense = method(batch)["dense"]
    batch["sites"] = torch.ones_like(batch["sites"])
    assert not torch.equal(method(batch)["dense"], dense)


@pytest.mark.parametrize("arch", ["plain", "resenc"])
def test_image_vectors_see_differences_at_the_start(make_macl, arch, macl_batch):
    """Different crops may not all look alike before training; global average pooling after InstanceNorm makes them."""
    batch = macl_batch(make_macl(arch=arch), b=8)
    cosine = {}
    for pooling, standardised in (("gap", False), ("grid", True)):
        torch.manual_seed(0)
        method = make_macl(arch=arch, pooling=pooling, batch_standardise=standardised)
        cosine[pooling] = float(method(batch)["off_diagonal_cos"])
    assert cosine["grid"] < 0.9 < 0.97 < cosine["gap"]
    default = make_macl(arch=arch)
    assert float(default(batch)["off_diagonal_cos"]) < 0.9
    assert default.embed(batch).shape == (8, default.config.proj_dim)


def test_weights_fit_the_stock_network(make_macl, macl_batch):  # T19
    method = make_macl(arch="resenc")
    step = method.optimiser()
    batch = macl_batch(method)
    method(batch)["total"].backward()
    step.step()
    fresh = build_network(method.plan)
    fresh.load_state_dict(full_state_dict(method.network))
    with torch.no_grad(), own_padding(method.network):
        ours, theirs = (forward_features(n, batch["i_aux"], 1) for n in (method.network, fresh))
    assert all(torch.equal(a, b) for a, b in zip(ours.skips + ours.levels, theirs.skips + theirs.levels))


@pytest.mark.parametrize("preset", ["paper", "code"])
@pytest.mark.parametrize("dim", [2, 3])
def test_presets(make_macl, preset, dim, macl_batch):
    config = make_config(MACLConfig, {}, get_method("macl").presets[preset])
    median = (64, 64, 64)
    method = make_macl(dim, size=(32, 32, 16)[-dim:], median=median, **vars(config))
    assert (config.decoder_blocks, config.pooling, config.align_corners, config.optimiser) == (2, "gap", True, "sgd")
    assert method.branches.aux_stage == method.plan.n_stages - 1 and method.branches.shrink == (4,) * dim
    terms = method(macl_batch(method))
    terms["total"].backward()
    assert all(torch.isfinite(torch.as_tensor(v)).all() for v in terms.values())
    assert isinstance(method.optimiser(), torch.optim.SGD)


def test_under_autocast(make_macl, macl_batch):
    method = make_macl()
    batch = macl_batch(method)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        terms = method(batch)
    terms["total"].backward()
    assert terms["total"].dtype == torch.float32 and torch.isfinite(terms["total"])


@pytest.mark.parametrize("align_corners", [True, False])
def test_equivariance_shrinks_as_the_option_says(make_macl, align_corners, macl_batch):
    method = make_macl(align_corners=align_corners, offset=0, sites="crops")
    batch = macl_batch(method)
    with torch.no_grad():
        value = float(method(batch)["equivariance"])
        bottlenecks = method.dense_maps(batch["i_aux"], batch["i_dominant"])[1]
        asked, other = (
            float(losses.equivariance_loss(*bottlenecks, method.branches.shrink, kind))
            for kind in (align_corners, not align_corners)
        )
    assert value == pytest.approx(asked, rel=1e-6) and abs(value - other) > 1e-3 * other
