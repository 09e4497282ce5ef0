"""Properties of hdense (and of vox2vec, which is made of the same pieces) on tiny networks of both classes."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from nnssl.config import make_config
from nnssl.errors import NnsslError
from nnssl.heads.balanced import ScaleProjections
from nnssl.heads.restoration import restoration_head
from nnssl.intensity import rescale_intensity, restore_intensity
from nnssl.networks import build_network
from nnssl.plans import Plan
from nnssl.pretrain.augment.rng import StepRNG
from nnssl.pretrain.augment.units import unit_range
from nnssl.pretrain.methods import Crops, SourceStats, get_method
from nnssl.pretrain.methods.hdense.method import ALIKE, COLOURS, OTHER, OTHER_COLOURS, REAL, RESTORED, SEEN
from nnssl.pretrain.methods.hdense.window import window_corruption

ISOTROPIC = ((1, 1, 1), (2, 2, 2), (2, 2, 2))
ANISOTROPIC = ((1, 1, 1), (1, 2, 2), (2, 2, 2))
STRIDED = ((1, 2, 2), (2, 2, 2), (1, 2, 2))
GEOMETRIES = {"iso": (ISOTROPIC, (8, 12, 16)), "aniso": (ANISOTROPIC, (4, 16, 8)), "strided": (STRIDED, (4, 8, 16))}
SMALL = {"n_voxels": 24, "proj_dim": 8, "level_dim": 4, "pairs_per_volume": 1}


@pytest.fixture
def make(tiny_plans, tiny_dataset_json):
    """``make(method, geometry, arch, channels, crop, **options) -> (method, crops(n, seed))``."""

    def build(name="hdense", geometry="iso", arch="plain", channels=1, modality="MR", dim=3, **options):
        strides, size = GEOMETRIES[geometry]
        plans = tiny_plans(dim, arch, channels, strides=strides, patch=tuple(2 * s for s in size), modality=modality)
        configuration = "3d_fullres" if dim == 3 else "2d"
        plan = Plan.from_dicts(plans, configuration, tiny_dataset_json(channels, modality=modality))
        cls = get_method(name)
        values = {**SMALL, **options} if name == "hdense" else {**SMALL, "level_dim": 0, **options}
        config = make_config(cls.Config, values)
        request = cls.crops(plan, SourceStats((30, 40, 35), 5), config, size[-dim:])
        return cls(build_network(plan, deep_supervision=False), plan, request, config)

    return build


def make_crops(method, n=2, seed=0, low=-2.0, high=3.0):
    g = torch.Generator().manual_seed(seed)
    window, channels = method.request.read_size, method.plan.n_channels
    coarse = torch.randn(n, channels, *[w // 4 + 1 for w in window], generator=g)
    data = F.interpolate(coarse, size=window, mode="trilinear" if len(window) == 3 else "bilinear")
    data = data + 0.2 * torch.randn(data.shape, generator=g)
    position = torch.rand(n, 3, generator=g).double()
    return Crops(
        data=data,
        body=data[:, :1] > -1,
        position=position,
        axis_position=position,
        intensity=torch.tensor([low, high]).expand(n, channels, 2).clone(),
        start=torch.zeros(n, 3, dtype=torch.int64),
        case=["c"] * n,
    )


def make_batch(method, n=2, seed=0, step=0):
    with torch.no_grad():
        return method.views(make_crops(method, n, seed), StepRNG(0, step, n))


CASES = [("iso", "plain"), ("aniso", "resenc"), ("aniso", "plain"), ("strided", "plain"), ("iso", "resenc")]


# ---------------------------------------------------------------------------------------------- crop and views


def _plan(tiny_plans, tiny_dataset_json, patch, strides, dim=3):
    plans = tiny_plans(dim, patch=patch, strides=strides, features=(4,) * len(strides))
    return Plan.from_dicts(plans, "3d_fullres" if dim == 3 else "2d", tiny_dataset_json())


def test_the_crop_leaves_room_for_a_second_one(tiny_plans, tiny_dataset_json):
    cls, eight = get_method("hdense"), ((1, 1, 1), (2, 2, 2), (2, 2, 2), (2, 2, 2))
    plan = _plan(tiny_plans, tiny_dataset_json, (40, 56, 40), eight)
    request = cls.crops(plan, SourceStats((36, 50, 36), 9), cls.Config())
    assert request.size == (24, 32, 24) and request.read_size == (47, 63, 47)
    assert request.batch_size == request.crops_per_case == 10
    assert cls.crops(plan, SourceStats((36, 50, 36), 9), cls.Config(pairs_per_volume=4)).batch_size == 12
    assert cls.crops(plan, SourceStats((36, 50, 36), 9), cls.Config(), (16, 24, 32)).size == (16, 24, 32)
    assert "would be the same" in cls.crops(plan, SourceStats((24, 32, 24), 9), cls.Config(), (24, 32, 24)).explanation
    with pytest.raises(NnsslError, match="axis 1"):
        cls.crops(plan, SourceStats((36, 50, 36), 9), cls.Config(), (16, 20, 16))
    with pytest.raises(NnsslError, match="nothing would be learnt"):
        cls.crops(plan, SourceStats((36, 50, 36), 9), cls.Config(contrast_weight=0.0, restoration_weight=0.0))


def test_the_crop_is_not_larger_than_memory_allows(tiny_plans, tiny_dataset_json):
    cls = get_method("hdense")
    deep = ((1, 1, 1), (2, 2, 2), (2, 2, 2), (2, 2, 2), (1, 2, 2))
    plan = _plan(tiny_plans, tiny_dataset_json, (96, 160, 128), deep)
    request = cls.crops(plan, SourceStats((200, 400, 300), 9), cls.Config())
    assert math.prod(request.size) <= 128 * 128 * 32
    assert all(s % t == 0 for s, t in zip(request.size, plan.total_stride))
    assert "crop_voxels" in request.explanation
    free = cls.crops(plan, SourceStats((200, 400, 300), 9), cls.Config(crop_voxels=10**9))
    assert free.size == (96, 160, 128)
    flat = cls.crops(
        _plan(tiny_plans, tiny_dataset_json, (40, 56, 40), ISOTROPIC, 2), SourceStats((9, 90, 60), 9), cls.Config()
    )
    assert flat.size == (56, 40) and flat.read_size == (111, 79)


@pytest.mark.parametrize(("geometry", "arch"), CASES[:4:2])
@pytest.mark.parametrize("dim", [3, 2])
def test_views_show_the_same_voxels(make, geometry, arch, dim):
    method = make(geometry=geometry, arch=arch, dim=dim, channels=2)
    size = method.request.size
    batch = make_batch(method, 3)
    assert batch["input"].shape == batch["target"].shape == (6, 2, *size)
    assert batch["voxels"].shape == (2, 3, 24, dim) and batch["valid"].shape == (3, 24)
    a, b = batch["target"].chunk(2)
    differ = 0
    for i in range(3):
        k = batch["valid"][i]
        x, y = (batch["voxels"][v, i][k].unbind(1) for v in (0, 1))
        assert torch.equal(a[(i, slice(None), *x)], b[(i, slice(None), *y)])
        differ += int(not torch.equal(batch["voxels"][0, i], batch["voxels"][1, i]))
    assert differ > 0
    assert batch["target"].min() >= 0 and batch["target"].max() <= 1


def test_views_come_from_the_draws_only(make):
    method = make()
    crops = make_crops(method, 4)
    kept = crops.data.clone()
    whole = method.views(crops, StepRNG(0, 5, 4))
    again = method.views(crops, StepRNG(0, 5, 4))
    other = method.views(crops, StepRNG(0, 6, 4))
    assert torch.equal(crops.data, kept)
    assert all(torch.equal(whole[k], again[k]) for k in whole)
    assert not torch.equal(whole["input"], other["input"])
    half = Crops(**{k: v[2:] for k, v in vars(crops).items() if v is not None})
    part = method.views(half, StepRNG(0, 5, 4, 2, 2))
    assert torch.equal(part["valid"], whole["valid"][2:])
    for key in ("input", "target"):
        assert torch.equal(part[key], whole[key].view(2, 4, *whole[key].shape[1:])[:, 2:].flatten(0, 1))
    clean = make(corruption="none").views(crops, StepRNG(0, 5, 4))
    inside = restore_intensity(clean["target"], clean["bounds"])
    torch.testing.assert_close(clean["input"], inside)


def test_units_of_mr_and_ct(make):
    method = make(channels=2)
    intensity = torch.tensor([[[-2.0, 3.0], [0.5, 0.5]]])
    x = torch.randn(1, 2, 6, 7, 5)
    assert torch.equal(unit_range(method.plan, intensity), intensity)
    torch.testing.assert_close(restore_intensity(rescale_intensity(x, intensity), intensity), x, atol=1e-6, rtol=0)
    assert torch.isfinite(rescale_intensity(x, intensity)).all()  # a channel without a range
    ct = make(modality="CT")
    bounds = unit_range(ct.plan, torch.tensor([[[-9.0, 9.0]]]))
    torch.testing.assert_close(bounds, torch.tensor([[[(100 - 600) / 180, (1200 - 600) / 180]]]))
    x = torch.rand(1, 1, 6, 7, 5) * (bounds[..., 1] - bounds[..., 0]) + bounds[..., 0]
    u = rescale_intensity(x, bounds)
    assert u.min() >= -1e-6 and u.max() <= 1 + 1e-6
    torch.testing.assert_close(restore_intensity(u, bounds), x, atol=1e-6, rtol=1e-6)
    y = x + 0.1 * torch.randn_like(x)
    width = bounds[0, 0, 1] - bounds[0, 0, 0]
    torch.testing.assert_close(
        F.mse_loss(rescale_intensity(x, bounds), rescale_intensity(y, bounds)), F.mse_loss(x, y) / width**2
    )


@pytest.mark.parametrize("size", [(6, 20, 24), (20, 9, 16), (30, 21)])
def test_window_corruption(size):
    u = torch.rand(40, 2, *size) * 0.8 + 0.1
    kept = u.clone()
    out = window_corruption(u, StepRNG(0, 0, 40))
    assert out.shape == u.shape and out.min() >= 0 and out.max() <= 1
    assert torch.equal(u, kept) and torch.equal(out, window_corruption(u, StepRNG(0, 0, 40)))
    same = torch.stack([torch.equal(a, b) * torch.ones(()) for a, b in zip(out, u)]).mean()
    assert 0 < same < 0.3  # nothing happens with probability 0.05
    if len(size) == 3:  # slices do not mix
        one = torch.full((60, 1, *size), 0.5)
        one[:, :, 3] = torch.rand(60, 1, *size[1:])
        blurred = window_corruption(one, StepRNG(3, 0, 60))
        clean = blurred[:, :, 0].flatten(1).std(1) < 1e-5
        assert 0.3 < clean.float().mean() < 0.7  # the others got noise


# ---------------------------------------------------------------------------------------------- network and loss


@pytest.mark.parametrize(("geometry", "arch"), CASES)
def test_levels_are_the_decoder(make, geometry, arch):
    """Segmentation heads on the walked levels give the network's own outputs, with and without deep supervision."""
    method = make(geometry=geometry, arch=arch)
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


def test_widths_and_levels(make):
    assert isinstance(make().scale_proj, ScaleProjections) and make().projector[0].in_features == 3 * 4
    assert make(levels=2).projector[0].in_features == 2 * 4 and len(make(levels=2).strides) == 2
    assert make(levels=9).projector[0].in_features == 3 * 4
    raw = make("vox2vec")
    assert raw.projector[0].in_features == 4 + 8 + 16 and not hasattr(raw, "scale_proj")
    assert not hasattr(raw, "restore") and not hasattr(make(contrast_weight=0.0), "projector")


def test_a_batch_norm_network_sees_one_view_at_a_time(make):
    method = make()
    x = torch.randn(4, 1, *method.request.size)
    together = method.pyramid(x)
    method.norm_sees_batch = True
    for a, b in zip(together, method.pyramid(x)):
        torch.testing.assert_close(a, b)


def test_total_is_the_weighted_sum(make):
    method = make()
    terms = method(make_batch(method))
    torch.testing.assert_close(terms["total"], terms["contrast"] + 10 * terms["restoration"])
    assert terms["chance"].item() == pytest.approx(math.log(2 * make_batch(method)["valid"].sum().item() - 1))
    assert set(make(restoration_weight=0.0)(make_batch(method))) == set(terms) - {"restoration"}
    assert set(make(contrast_weight=0.0)(make_batch(method))) == {"total", "restoration"}
    method.eval()
    held = method(make_batch(method))
    assert 0 <= held["nearest"] <= 1 and held["nearest_chance"] < 0.05


def test_restoration_error(make):
    method = make(contrast_weight=0.0)
    batch = make_batch(method)
    method.restored = lambda finest, size: batch["target"].clone()
    assert method(batch)["restoration"] == 0
    wrong = batch["target"] + torch.tensor([0.0, 0.0, 0.3, 0.3]).view(4, 1, 1, 1, 1)  # only view B is wrong
    method.restored = lambda finest, size: wrong
    half = method(batch)["restoration"].item()
    assert half == pytest.approx(0.045, abs=1e-6)
    method.restored = lambda finest, size: batch["target"] - 0.3
    assert method(batch)["restoration"].item() == pytest.approx(2 * half, abs=1e-6)


def test_a_strided_first_stage_restores_the_whole_crop(make):
    method = make(geometry="strided")
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
def test_each_term_reaches_encoder_and_decoder(make, geometry, arch, which):
    method = make(geometry=geometry, arch=arch)
    _perturb_norms(method.network)
    method(make_batch(method))[which].backward()
    for name, reached in _reached(method.network).items():
        assert reached != ("seg_layers" in name), name
    assert not any(p.requires_grad for p in method.network.decoder.seg_layers.parameters())
    assert all(torch.isfinite(p.grad).all() for p in method.parameters() if p.grad is not None)


@pytest.mark.parametrize(("geometry", "arch"), CASES[:2])
@pytest.mark.parametrize("level", [0, 1, 2])
def test_a_level_reaches_the_stages_below_it(make, geometry, arch, level):
    method = make(geometry=geometry, arch=arch)
    _perturb_norms(method.network)
    method.pyramid(torch.randn(2, 1, *method.request.size))[level].square().mean().backward()
    stages = {int(n.split(".")[2]) for n, r in _reached(method.network).items() if r and n.startswith("decoder.stages")}
    assert stages == set(range(3 - 1 - level))


@pytest.mark.parametrize("train", [True, False])
def test_projections_are_trained_unless_frozen(make, train):
    method = make(train_scale_proj=train)
    optimiser = method.optimiser()
    optimised = {id(p) for g in optimiser.param_groups for p in g["params"]}
    before = {k: v.clone() for k, v in method.state_dict().items()}
    assert {k for k in before if k.startswith("scale_proj")} == {
        *(f"scale_proj.maps.{i}.weight" for i in range(3)),
        "scale_proj.maps.0.bias",
    }
    assert all((id(p) in optimised) == train for p in method.scale_proj.parameters())
    method(make_batch(method))["total"].backward()
    optimiser.step()
    for key, value in method.state_dict().items():
        if key.startswith("scale_proj") and key.endswith("weight"):
            assert torch.equal(value, before[key]) != train
    assert optimiser.param_groups[0]["lr"] == 3e-4 and isinstance(optimiser, torch.optim.Adam)
    assert method.lr_factor(0, 10) == method.lr_factor(9, 10) == 1.0
    assert make(schedule="cosine").lr_factor(9, 10) < 0.1


@pytest.mark.parametrize("body", ["none", "one voxel", "one pair"])
def test_too_few_voxels_to_compare(make, body):
    """No voxel, one voxel, or all of them in one pair: never a crash, and every parameter keeps a gradient."""
    method = make()
    crops = make_crops(method, 2)
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


def test_constant_images_do_no_harm(make):
    method = make()
    crops = make_crops(method, 2, low=1.0, high=1.0)
    crops.data[:] = 1.0
    terms = method(method.views(crops, StepRNG(0, 0, 2)))
    assert all(math.isfinite(v.item()) for v in terms.values())


def test_negatives_of_the_own_pair(make):
    own, everybody = make(negatives="pair"), make()
    own.load_state_dict(everybody.state_dict())
    batch = make_batch(own, 3)
    a, b = own(batch), everybody(batch)
    counts = batch["valid"].sum(1)
    expected = sum(k.item() * math.log(2 * k.item() - 1) for k in counts) / counts.sum().item()
    assert a["chance"].item() == pytest.approx(expected) and a["chance"] < b["chance"]
    assert a["contrast"] < b["contrast"]


@pytest.mark.parametrize("name", ["hdense", "vox2vec"])
@pytest.mark.parametrize(("geometry", "arch"), CASES[:2])
def test_every_preset_takes_a_step(make, name, geometry, arch):
    cls = get_method(name)
    for preset, values in {"": {}, **cls.presets}.items():
        values = {**values, "shuffle_blocks": min(values.get("shuffle_blocks", 0), 50)}
        method = make(name, geometry, arch, channels=2, **values)
        optimiser = method.optimiser()
        method(make_batch(method))["total"].backward()
        for key, p in method.named_parameters():
            assert (p.grad is not None) == p.requires_grad, (preset, key)
        optimiser.step()
        parts = method.pretrained_parts()
        assert parts == {"encoder": True, "decoder_stages": [0, 1]}


def test_what_a_person_sees(make):
    for dim, name in ((3, "hdense"), (2, "hdense"), (3, "vox2vec")):
        method = make(name, dim=dim).eval()
        with torch.no_grad():
            picture = method.pictures(make_batch(method, 6))
            z = method.embed(make_batch(method, 6))
        grey = [REAL, SEEN, OTHER, ALIKE] + [RESTORED] * (name == "hdense")
        assert set(picture.columns) == {*grey, COLOURS, OTHER_COLOURS} == set(picture.points)
        for key, image in picture.columns.items():
            assert image.shape == (4, *method.request.size[-2:]) + (() if key in grey else (3,))
            low = -1 if key == ALIKE else 0
            assert np.isfinite(image).all() and image.min() >= low - 1e-5 and image.max() <= 1 + 1e-5
        assert z.shape == (12, 8) and torch.isfinite(z).all()
    only = make(contrast_weight=0.0)
    assert only.embed({}) is None
    with torch.no_grad():
        assert set(only.pictures(make_batch(only)).columns) == {REAL, SEEN, RESTORED}


def test_pictures_show_the_same_slice_of_both_crops(make):
    method = make(corruption="none").eval()
    crops = make_crops(method, 2)
    crops.data[:] = torch.linspace(-2, 3, method.request.read_size[0]).view(-1, 1, 1)  # a slice has one value
    with torch.no_grad():
        picture = method.pictures(method.views(crops, StepRNG(0, 0, 2)))
    columns = picture.columns
    assert np.array_equal(columns[REAL], columns[OTHER])


def test_verdict(make):
    terms = {"chance": 6.0, "nearest": 0.4, "nearest_chance": 0.005, "total": 1.0, "restoration": 0.1}
    learnt, sentence = make().verdict({"total": 9.0}, {**terms, "contrast": 2.9})
    assert learnt and "below half of 6" in sentence and "40.0 %" in sentence
    learnt, sentence = make("vox2vec").verdict({"total": 9.0}, {**terms, "contrast": 3.1})
    assert not learnt and "vox2vec did not learn" in sentence
    assert make().verdict({}, {"chance": 6.0, "contrast": 2.9})[1].endswith("half of 6 (all voxels look the same).")
    only = make(contrast_weight=0.0)
    assert only.verdict({"restoration": 0.3, "total": 3.0}, {"restoration": 0.1, "total": 1.0})[0]
    assert not only.verdict({"restoration": 0.19, "total": 3.0}, {"restoration": 0.1, "total": 1.0})[0]


def test_half_precision_forward(make):
    method = make()
    batch = make_batch(method)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        terms = method(batch)
    assert terms["contrast"].dtype == terms["restoration"].dtype == torch.float32
    exact = method(batch)
    assert abs(terms["total"] - exact["total"]) < 0.1 * exact["total"].abs()


@pytest.mark.parametrize("corruption", ["local", "window"])
def test_both_crops_are_corrupted_and_each_by_itself(make, corruption):
    """Two crops of the same place: what the network sees differs from the target in both, and differently."""
    batch = make_batch(make(min_overlap=1.0, corruption=corruption), 6)
    a, b = batch["target"].chunk(2)
    assert torch.equal(a, b)
    seen_a, seen_b = rescale_intensity(batch["input"], batch["bounds"]).chunk(2)

    def far(x, y):
        return ((x - y).abs().flatten(1).amax(1) > 0.01).float().mean().item()

    for x, y in ((seen_a, a), (seen_b, b), (seen_a, seen_b)):
        assert far(x, y) == 1 if corruption == "local" else far(x, y) > 0.6  # p = 0.001 and 0.05 that nothing happens


def test_projected_voxels_have_unit_length(make):
    method = make()
    h = 5 * torch.randn(9, method.projector[0].in_features)
    z = method.project(h)
    torch.testing.assert_close(z.norm(dim=1), torch.ones(9))
    torch.testing.assert_close(z, F.normalize(method.projector(h), dim=1))
