"""Properties of hdense (and of vox2vec, which is made of the same pieces) on tiny networks of both classes."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from nnssl.heads.balanced import ScaleProjections
from nnssl.heads.restoration import restoration_head
from nnssl.pretrain.augment.rng import StepRNG
from nnssl.pretrain.methods import get_method
from nnssl.pretrain.methods.hdense.method import ALIKE, COLOURS, OTHER, OTHER_COLOURS, REAL, RESTORED, SEEN

CASES = [("iso", "plain"), ("aniso", "resenc"), ("aniso", "plain"), ("strided", "plain"), ("iso", "resenc")]


# ---------------------------------------------------------------------------------------------- network and loss


@pytest.mark.parametrize(("geometry", "arch"), CASES)
def test_levels_are_the_decoder(make_hdense, geometry, arch):
    """Segmentation heads on the walked levels give the network's own outputs, with and without deep supervision."""
    method = make_hdense(geometry=geometry, arch=arch)
    x = torch.randn(2, 1, *method.request.size)
    levels = method.pyramid(x)
    assert len(levels) == 3
    heads = method.network.decoder.seg_layers
    for deep in (True, False):
        method.network.decoder.deep_supervision = deep
        expected = method.network(x)
        for i, y in enumerate(expected if deep else [expected]):
            torch.testing.assert_close(heads[-(i + 1)](levels[i]), y)
    for level, stride in zip(levels, method.strides):
        assert level.shape[2:] == tuple(s // t for s, t in zip(method.request.size, stride))


def test_widths_and_levels(make_hdense):
    assert isinstance(make_hdense().scale_proj, ScaleProjections) and make_hdense().projector[0].in_features == 3 * 4
    assert make_hdense(levels=2).projector[0].in_features == 2 * 4 and len(make_hdense(levels=2).strides) == 2
    assert make_hdense(levels=9).projector[0].in_features == 3 * 4
    raw = make_hdense("vox2vec")
    assert raw.projector[0].in_features == 4 + 8 + 16 and not hasattr(raw, "scale_proj")
    assert not hasattr(raw, "restore") and not hasattr(make_hdense(contrast_weight=0.0), "projector")


def test_a_batch_norm_network_sees_one_view_at_a_time(make_hdense):
    method = make_hdense()
    x = torch.randn(4, 1, *method.request.size)
    together = method.pyramid(x)
    method.norm_sees_batch = True
    for a, b in zip(together, method.pyramid(x)):
        torch.testing.assert_close(a, b)


def test_total_is_the_weighted_sum(make_hdense, hdense_batch):
    method = make_hdense()
    terms = method(hdense_batch(method))
    torch.testing.assert_close(terms["total"], terms["contrast"] + 10 * terms["restoration"])
    assert terms["chance"].item() == pytest.approx(math.log(2 * hdense_batch(method)["valid"].sum().item() - 1))
    assert set(make_hdense(restoration_weight=0.0)(hdense_batch(method))) == set(terms) - {"restoration"}
    assert set(make_hdense(contrast_weight=0.0)(hdense_batch(method))) == {"total", "restoration"}
    method.eval()
    held = method(hdense_batch(method))
    assert 0 <= held["nearest"] <= 1 and held["nearest_chance"] < 0.05


def test_restoration_error(make_hdense, hdense_batch):
    method = make_hdense(contrast_weight=0.0)
    batch = hdense_batch(method)
    method.restored = lambda finest, size: batch["target"].clone()
    assert method(batch)["restoration"] == 0
    wrong = batch["target"] + torch.tensor([0.0, 0.0, 0.3, 0.3]).view(4, 1, 1, 1, 1)  # only view B is wrong
    method.restored = lambda finest, size: wrong
    half = method(batch)["restoration"].item()
    assert half == pytest.approx(0.045, abs=1e-6)
    method.restored = lambda finest, size: batch["target"] - 0.3
    assert method(batch)["restoration"].item() == pytest.approx(2 * half, abs=1e-6)


def test_a_strided_first_stage_restores_the_whole_crop(make_hdense):
    method = make_hdense(geometry="strided")
    levels = method.pyramid(torch.randn(2, 1, *method.request.size))
    assert method.restored(levels[0], method.request.size).shape == (2, 1, *method.request.size)


def test_restoration_heads():
    for dim, size in ((2, (6, 8)), (3, (4, 6, 8))):
        x = torch.randn(2, 8, *size)
        for layers in (1, 2):
            assert restoration_head(8, 3, dim=dim, layers=layers)(x).shape == (2, 3, *size)
    assert sum(p.numel() for p in restoration_head(32, 1, dim=3).parameters()) == 33


def _perturb_norms(network):
    """Residual blocks start with a zero in front; without it nothing behind it has a gradient."""
    for module in network.modules():
        if isinstance(module, torch.nn.modules.batchnorm._NormBase) and module.affine:
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)


def _reached(network):
    parts = {}
    for name, p in network.named_parameters():
        if name.endswith("weight"):
            parts[name] = p.grad is not None and bool(p.grad.abs().max() > 0)
    return parts


@pytest.mark.parametrize("which", ["contrast", "restoration"])
@pytest.mark.parametrize(("geometry", "arch"), CASES)
def test_each_term_reaches_encoder_and_decoder(make_hdense, geometry, arch, which, hdense_batch):
    method = make_hdense(geometry=geometry, arch=arch)
    _perturb_norms(method.network)
    method(hdense_batch(method))[which].backward()
    for name, reached in _reached(method.network).items():
        assert reached != ("seg_layers" in name), name
    assert not any(p.requires_grad for p in method.network.decoder.seg_layers.parameters())
    assert all(torch.isfinite(p.grad).all() for p in method.parameters() if p.grad is not None)


@pytest.mark.parametrize(("geometry", "arch"), CASES[:2])
@pytest.mark.parametrize("level", [0, 1, 2])
def test_a_level_reaches_the_stages_below_it(make_hdense, geometry, arch, level):
    method = make_hdense(geometry=geometry, arch=arch)
    _perturb_norms(method.network)
    method.pyramid(torch.randn(2, 1, *method.request.size))[level].square().mean().backward()
    stages = {int(n.split(".")[2]) for n, r in _reached(method.network).items() if r and n.startswith("decoder.stages")}
    assert stages == set(range(3 - 1 - level))


@pytest.mark.parametrize("train", [True, False])
def test_projections_are_trained_unless_frozen(make_hdense, train, hdense_batch):
    method = make_hdense(train_scale_proj=train)
    optimiser = method.optimiser()
    optimised = {id(p) for g in optimiser.param_groups for p in g["params"]}
    before = {k: v.clone() for k, v in method.state_dict().items()}
    assert {k for k in before if k.startswith("scale_proj")} == {
        *(f"scale_proj.maps.{i}.weight" for i in range(3)),
        "scale_proj.maps.0.bias",
    }
    assert all((id(p) in optimised) == train for p in method.scale_proj.parameters())
    method(hdense_batch(method))["total"].backward()
    optimiser.step()
    for key, value in method.state_dict().items():
        if key.startswith("scale_proj") and key.endswith("weight"):
            assert torch.equal(value, before[key]) != train
    assert optimiser.param_groups[0]["lr"] == 3e-4 and isinstance(optimiser, torch.optim.Adam)
    assert method.lr_factor(0, 10) == method.lr_factor(9, 10) == 1.0
    assert make_hdense(schedule="cosine").lr_factor(9, 10) < 0.1


@pytest.mark.parametrize("body", ["none", "one voxel", "one pair"])
def test_too_few_voxels_to_compare(make_hdense, body, hdense_crops):
    """No voxel, one voxel, or all of them in one pair: never a crash, and every parameter keeps a gradient."""
    method = make_hdense()
    crops = hdense_crops(method, 2)
    crops.body[:] = False
    if body == "one voxel":
        crops.body[0, 0, 5, 6, 7] = True
    if body == "one pair":
        crops.body[1] = True
    terms = method(method.views(crops, StepRNG(0, 0, 2)))
    terms["total"].backward()
    assert (terms["contrast"].item() == 0) == (body != "one pair")
    for name, p in method.named_parameters():
        if p.requires_grad:
            assert p.grad is not None and torch.isfinite(p.grad).all(), name
    with torch.no_grad():
        held_out = method.eval()(method.views(crops, StepRNG(0, 0, 2)))
    assert all(math.isfinite(v.item()) for v in held_out.values())


def test_constant_images_do_no_harm(make_hdense, hdense_crops):
    method = make_hdense()
    crops = hdense_crops(method, 2, low=1.0, high=1.0)
    crops.data[:] = 1.0
    terms = method(method.views(crops, StepRNG(0, 0, 2)))
    assert all(math.isfinite(v.item()) for v in terms.values())


def test_negatives_of_the_own_pair(make_hdense, hdense_batch):
    own, everybody = make_hdense(negatives="pair"), make_hdense()
    own.load_state_dict(everybody.state_dict())
    batch = hdense_batch(own, 3)
    a, b = own(batch), everybody(batch)
    counts = batch["valid"].sum(1)
    expected = sum(k.item() * math.log(2 * k.item() - 1) for k in counts) / counts.sum().item()
    assert a["chance"].item() == pytest.approx(expected) and a["chance"] < b["chance"]
    assert a["contrast"] < b["contrast"]


@pytest.mark.parametrize("name", ["hdense", "vox2vec"])
@pytest.mark.parametrize(("geometry", "arch"), CASES[:2])
def test_every_preset_takes_a_step(make_hdense, name, geometry, arch, hdense_batch):
    cls = get_method(name)
    for preset, values in {"": {}, **cls.presets}.items():
        values = {**values, "shuffle_blocks": min(values.get("shuffle_blocks", 0), 50)}
        method = make_hdense(name, geometry, arch, channels=2, **values)
        optimiser = method.optimiser()
        method(hdense_batch(method))["total"].backward()
        for key, p in method.named_parameters():
            assert (p.grad is not None) == p.requires_grad, (preset, key)
        optimiser.step()
        parts = method.pretrained_parts()
        assert parts == {"encoder": True, "decoder_stages": [0, 1]}


def test_what_a_person_sees(make_hdense, hdense_batch):
    for dim, name in ((3, "hdense"), (2, "hdense"), (3, "vox2vec")):
        method = make_hdense(name, dim=dim).eval()
        with torch.no_grad():
            picture = method.pictures(hdense_batch(method, 6))
            z = method.embed(hdense_batch(method, 6))
        grey = [REAL, SEEN, OTHER, ALIKE] + [RESTORED] * (name == "hdense")
        assert set(picture.columns) == {*grey, COLOURS, OTHER_COLOURS} == set(picture.points)
        for key, image in picture.columns.items():
            assert image.shape == (4, *method.request.size[-2:]) + (() if key in grey else (3,))
            low = -1 if key == ALIKE else 0
            assert np.isfinite(image).all() and image.min() >= low - 1e-5 and image.max() <= 1 + 1e-5
        assert z.shape == (12, 8) and torch.isfinite(z).all()
    only = make_hdense(contrast_weight=0.0)
    assert only.embed({}) is None
    with torch.no_grad():
        assert set(only.pictures(hdense_batch(only)).columns) == {REAL, SEEN, RESTORED}


def test_pictures_show_the_same_slice_of_both_crops(make_hdense, hdense_crops):
    method = make_hdense(corruption="none").eval()
    crops = hdense_crops(method, 2)
    crops.data[:] = torch.linspace(-2, 3, method.request.read_size[0]).view(-1, 1, 1)  # a slice has one value
    with torch.no_grad():
        picture = method.pictures(method.views(crops, StepRNG(0, 0, 2)))
    columns = picture.columns
    assert np.array_equal(columns[REAL], columns[OTHER])


def test_verdict(make_hdense):
    terms = {"chance": 6.0, "nearest": 0.4, "nearest_chance": 0.005, "total": 1.0, "restoration": 0.1}
    learnt, sentence = make_hdense().verdict({"total": 9.0}, {**terms, "contrast": 2.9})
    assert learnt and "below half of 6" in sentence and "40.0 %" in sentence
    learnt, sentence = make_hdense("vox2vec").verdict({"total": 9.0}, {**terms, "contrast": 3.1})
    assert not learnt and "vox2vec did not learn" in sentence
    assert (
        make_hdense().verdict({}, {"chance": 6.0, "contrast": 2.9})[1].endswith("half of 6 (all voxels look the same).")
    )
    only = make_hdense(contrast_weight=0.0)
    assert only.verdict({"restoration": 0.3, "total": 3.0}, {"restoration": 0.1, "total": 1.0})[0]
    assert not only.verdict({"restoration": 0.19, "total": 3.0}, {"restoration": 0.1, "total": 1.0})[0]


def test_half_precision_forward(make_hdense, hdense_batch):
    method = make_hdense()
    batch = hdense_batch(method)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        terms = method(batch)
    assert terms["contrast"].dtype == terms["restoration"].dtype == torch.float32
    exact = method(batch)
    assert abs(terms["total"] - exact["total"]) < 0.1 * exact["total"].abs()


def test_projected_voxels_have_unit_length(make_hdense):
    method = make_hdense()
    h = 5 * torch.randn(9, method.projector[0].in_features)
    z = method.project(h)
    torch.testing.assert_close(z.norm(dim=1), torch.ones(9))
    torch.testing.assert_close(z, F.normalize(method.projector(h), dim=1))
