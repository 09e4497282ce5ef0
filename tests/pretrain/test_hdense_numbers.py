"""What hdense reports, draws and chooses, by hand; shapes, gradients and learning are tested in test_hdense.py."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nnssl.config import make_config
from nnssl.intensity import rescale_intensity
from nnssl.networks import build_network
from nnssl.plans import Plan
from nnssl.pretrain.augment.rng import StepRNG
from nnssl.pretrain.methods import Crops, SourceStats, get_method
from nnssl.pretrain.methods.hdense.method import ALIKE, COLOURS, OTHER, OTHER_COLOURS, REAL, RESTORED, SEEN

SMALL = {"n_voxels": 24, "proj_dim": 8, "level_dim": 4, "pairs_per_volume": 1}
STRIDES = ((1, 1, 1), (1, 2, 2), (2, 2, 2))


@pytest.fixture
def make(tiny_plans, tiny_dataset_json):
    """``make(dim, channels, strides, change, size, **options) -> method``; ``change`` of the network."""

    def build(dim=3, channels=1, strides=STRIDES, change=None, size=(4, 16, 12), **options):
        plans = tiny_plans(dim, "plain", channels, strides=strides, patch=(8, 32, 24))
        plan = Plan.from_dicts(plans, "3d_fullres" if dim == 3 else "2d", tiny_dataset_json(channels))
        cls = get_method("hdense")
        config = make_config(cls.Config, {**SMALL, **options})
        request = cls.crops(plan, SourceStats((20, 40, 35), 5), config, size[-dim:])
        network = build_network(plan, deep_supervision=False)
        return cls(change(network) if change else network, plan, request, config)

    return build


def batch_of(method, n=2, step=0):
    g = torch.Generator().manual_seed(1)
    window, channels = method.request.read_size, method.plan.n_channels
    data = F.interpolate(
        torch.randn(n, channels, *[w // 3 + 1 for w in window], generator=g), size=window, mode="nearest"
    )
    data = data + 0.3 * torch.randn(data.shape, generator=g)
    position = torch.rand(n, 3, generator=g).double()
    intensity = torch.tensor([-2.0, 3.0]).expand(n, channels, 2).clone()
    body = torch.ones(n, 1, *window, dtype=torch.bool)
    crops = Crops(data, body, position, position, intensity, torch.zeros(n, 3, dtype=torch.int64), ["c"] * n)
    with torch.no_grad():
        return method.views(crops, StepRNG(0, step, n))


def unit(method, batch, crop, voxels):
    """Projected unit vectors ``(n, proj_dim)`` of voxels ``(n, dim)`` of a crop."""
    h = method.representation(method.pyramid(batch["input"][crop : crop + 1]), voxels[None])[0]
    return F.normalize(method.projector(h), dim=1)


# ---------------------------------------------------------------------------------------------- choices


def test_presets_are_what_the_paper_and_the_release_did(make):
    presets = make().presets
    assert presets["paper"] == {"negatives": "pair", "recon_head": "double", "gather": False}
    released = {"train_scale_proj": False, "independent_permutations": False, "shuffle_blocks": 5000, "gather": False}
    assert presets["released"] == released
    assert presets["no_restoration"] == {"level_dim": 0, "levels": 0, "restoration_weight": 0.0}
    assert presets["no_balance"] == {"level_dim": 0, "levels": 0}
    assert presets["restoration_only"] == {"contrast_weight": 0.0}
    assert presets["frozen_projections"] == {"train_scale_proj": False}
    assert presets["cpu"] == {"n_voxels": 128, "crop_voxels": 16384}
    assert make().grad_clip == 1.0


def test_what_is_asked_of_the_loader(make):
    request = make().request
    assert request.body and request.trim and request.min_batch == 1 and request.read_size == (7, 31, 23)


@pytest.mark.parametrize(
    ("patch", "multiple", "voxels", "expected"),
    [
        ((32, 128, 128), (16, 16, 16), None, (32, 128, 128)),  # exactly as many as are allowed
        ((96, 160, 128), (8, 16, 16), None, (80, 80, 80)),  # always the longest axis, the first of them
        ((64, 32, 32), (4, 32, 32), 20 * 32 * 32, (20, 32, 32)),  # two axes cannot be shorter
        ((64, 64, 64), (8, 8, 8), 64, (8, 16, 8)),  # nor any below two cells in all
    ],
)
def test_the_largest_crop_that_memory_allows(tiny_plans, tiny_dataset_json, patch, multiple, voxels, expected):
    steps = [tuple(2 if m > 2**i else 1 for m in multiple) for i in range(int(math.log2(max(multiple))))]
    strides = ((1, 1, 1), *steps)
    plans = tiny_plans(3, patch=patch, strides=strides, features=(4,) * len(strides))
    plan = Plan.from_dicts(plans, "3d_fullres", tiny_dataset_json())
    assert tuple(plan.total_stride) == multiple
    cls = get_method("hdense")
    config = cls.Config(**({} if voxels is None else {"crop_voxels": voxels}))
    request = cls.crops(plan, SourceStats((200, 400, 300), 9), config)
    assert request.size == expected
    assert ("crop_voxels" in request.explanation) == (expected != patch)


def test_heads(make):
    assert sum(p.numel() for p in make().restore.parameters()) == 4 + 1  # one 1x1x1 convolution, bias
    double = make(recon_head="double").restore
    assert [m.kernel_size for m in double if isinstance(m, nn.Conv3d)] == [(3, 3, 3), (1, 1, 1)]
    assert len([m for m in make(proj_layers=2).projector if isinstance(m, nn.Linear)]) == 2


@pytest.mark.parametrize("dim", [2, 3])
def test_restored_crops_are_as_large_as_the_crop(make, dim):
    """Where the first stage has a stride, what the head paints is enlarged between its voxels."""
    method = make(dim, strides=((1, 2, 2), (2, 2, 2), (1, 2, 2)), size=(4, 16, 24))
    finest = torch.randn(2, 4, *[s // t for s, t in zip(method.request.size, method.strides[0])])
    out, small = method.restored(finest, method.request.size), method.restore(finest)
    assert out.shape == (2, 1, *method.request.size)
    corners = (x[(..., *[slice(0, None, s - 1) for s in x.shape[2:]])] for x in (out, small))
    torch.testing.assert_close(*corners)
    assert out.min() >= small.min() - 1e-5 and out.max() <= small.max() + 1e-5
    torch.testing.assert_close(method.restored(finest, small.shape[2:]), small)


# ---------------------------------------------------------------------------------------------- numbers


def test_both_weights_count(make):
    terms = make(contrast_weight=0.3, restoration_weight=0.5)(batch_of(make()))
    torch.testing.assert_close(terms["total"], 0.3 * terms["contrast"] + 0.5 * terms["restoration"])
    for off, left in (("contrast_weight", "restoration"), ("restoration_weight", "contrast")):
        terms = make(**{off: 0.0})(batch_of(make()))
        torch.testing.assert_close(terms["total"], (10.0 if left == "restoration" else 1.0) * terms[left])


def test_two_voxels_are_enough_and_one_is_not(make):
    method, batch = make().eval(), batch_of(make())
    batch["valid"][:] = False
    batch["valid"][0, 0] = batch["valid"][1, 3] = True
    with torch.no_grad():
        two = method(batch)
        batch["valid"][1, 3] = False
        one = method(batch)
    assert two["contrast"] > 0 and two["chance"].item() == pytest.approx(math.log(3))
    assert two["nearest_chance"].item() == 0.5
    assert one["contrast"] == one["chance"] == one["nearest"] == one["positive_cos"] == one["other_cos"] == 0
    assert one["nearest_chance"].item() == 1


def test_equal_crops_are_found_again(make):
    """Both crops show the same, and nothing is spoilt: each voxel is most similar to itself, but for ties."""
    method = make(corruption="none", min_overlap=1.0).eval()
    with torch.no_grad():
        terms = method(batch_of(method, 3))
    assert terms["nearest"] > 0.95 and terms["positive_cos"].item() == pytest.approx(1, abs=1e-5)
    assert terms["other_cos"] < 0.99 and terms["nearest_chance"].item() == pytest.approx(1 / 72)
    assert "nearest" not in method.train()(batch_of(method, 3))


def test_cosines_by_hand(make):
    method = make(min_overlap=0.5).eval()
    batch = batch_of(method)
    assert batch["valid"].all()
    with torch.no_grad():
        terms = method(batch)
        a, b = (torch.cat([unit(method, batch, 2 * k + i, batch["voxels"][k, i]) for i in range(2)]) for k in (0, 1))
    assert terms["positive_cos"].item() == pytest.approx((a * b).sum(1).mean().item(), abs=1e-5)
    z = torch.cat([a, b])
    others = (z @ z.T).sum() - len(z) - 2 * (a * b).sum()
    assert terms["other_cos"].item() == pytest.approx(others.item() / (len(z) * (len(z) - 2)), abs=1e-5)
    assert terms["nearest"].item() == pytest.approx(
        ((a @ b.T).argmax(1) == torch.arange(48)).float().mean().item(), abs=0.05
    )


def test_vectors_are_made_in_full_precision(make):
    method, batch = make().eval(), batch_of(make())
    levels = [level.detach() for level in method.pyramid(batch["input"])]
    voxels = batch["voxels"].flatten(0, 1)
    h = method.representation(levels, voxels)
    z = method.project(h.flatten(0, 1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = method.representation([level.bfloat16() for level in levels], voxels)
        torch.testing.assert_close(method.representation(levels, voxels), h, atol=1e-6, rtol=0)
        torch.testing.assert_close(method.project(h.flatten(0, 1)), z, atol=1e-6, rtol=0)
        restored = method.restored(levels[0], method.request.size)
    assert low.dtype == z.dtype == restored.dtype == torch.float32


def with_batch_norm(module):
    for name, child in module.named_children():
        if isinstance(child, nn.InstanceNorm3d):
            setattr(module, name, nn.BatchNorm3d(child.num_features))
        else:
            with_batch_norm(child)
    return module


def test_batch_norm_sees_the_crops_of_one_view(make):
    """As published: what the network makes of view A does not depend on view B, and in a batch of three pairs not on which."""
    method = make(change=with_batch_norm)
    assert method.norm_sees_batch and not make().norm_sees_batch
    x = torch.randn(6, 1, *method.request.size)
    other = torch.cat([x[:3], 3 * torch.randn_like(x[3:])])
    mixed = torch.cat([x[:2], 3 * torch.randn_like(x[2:3]), x[3:]])
    for a, b, c in zip(*[method.pyramid(v) for v in (x, other, mixed)]):
        assert len(a) == 6 and torch.equal(a[:3], b[:3]) and torch.equal(a[3:], c[3:])
        assert not torch.allclose(a[:2], c[:2], atol=1e-3)


# ---------------------------------------------------------------------------------------------- for a person


def test_a_crop_is_the_mean_of_its_voxels(make):
    method, batch = make().eval(), batch_of(make(), 3)
    batch["valid"][0, 10:] = False
    batch["valid"][1] = False
    with torch.no_grad():
        got = method.embed(batch)
        for crop in range(6):
            k, i = divmod(crop, 3)
            z = unit(method, batch, crop, batch["voxels"][k, i])[batch["valid"][i]]
            torch.testing.assert_close(got[crop], z.mean(0) if len(z) else torch.zeros(8), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dim", [2, 3])
def test_pictures_by_hand(make, dim):
    method = make(dim, channels=2, contrast_weight=0.5, restoration_weight=0.5).eval()
    batch = batch_of(method, 6)
    assert batch["bounds"].shape == (12, 2, 2) and batch["anchor"].shape == (2, 6, dim)
    with torch.no_grad():
        picture = method.pictures(batch)
        levels = method.pyramid(batch["input"])
        restored = method.restored(levels[0], method.request.size)
    here, there = batch["anchor"]
    seen = rescale_intensity(batch["input"], batch["bounds"])

    def cut(x, place):
        return (x[0] if dim == 2 else x[0, place[0]]).numpy()

    for i in range(4):
        for caption, x, crop, place in (
            (REAL, batch["target"], i, here[i]),
            (SEEN, seen, i, here[i]),
            (RESTORED, restored, i, here[i]),
            (OTHER, batch["target"], 6 + i, there[i]),
        ):
            np.testing.assert_allclose(picture.columns[caption][i], cut(x[crop].clamp(0, 1), place), atol=1e-5)
        with torch.no_grad():
            mark = unit(method, batch, i, here[i : i + 1])[0]
            for y, x in ((0, 0), (3, 7), (15, 11), tuple(there[i, -2:].tolist())):
                voxel = torch.cat([there[i, :-2], torch.tensor([y, x])])[None]
                cosine = float(mark @ unit(method, batch, 6 + i, voxel)[0])
                assert picture.columns[ALIKE][i, y, x] == pytest.approx(cosine, abs=1e-4)
    for caption in picture.columns:
        expected = there if caption in (OTHER, ALIKE, OTHER_COLOURS) else here
        assert np.array_equal(picture.points[caption], expected[:4, -2:].numpy())
    assert picture.columns[COLOURS].shape == picture.columns[OTHER_COLOURS].shape == (4, 16, 12, 3)
    assert ALIKE in picture.scales and "Restored:" in picture.note and "cross" in picture.note
    bare = make(dim, restoration_weight=0.0).eval()
    with torch.no_grad():
        note = bare.pictures(batch_of(bare)).note
    assert "Restored:" not in note and "cross" in note
    only = make(dim, contrast_weight=0.0).eval()
    with torch.no_grad():
        picture = only.pictures(batch_of(only))
    assert "Restored:" in picture.note and "cross" not in picture.note and len(picture.columns[REAL]) == 2


def test_equal_crops_have_equal_colours(make):
    method = make(corruption="none", min_overlap=1.0).eval()
    with torch.no_grad():
        columns = method.pictures(batch_of(method, 3)).columns
    np.testing.assert_allclose(columns[COLOURS], columns[OTHER_COLOURS], atol=1e-5)
    assert columns[COLOURS].std() > 0.05


def test_curves(make):
    separation, found, parted, restored = make(contrast_weight=0.5, restoration_weight=0.5).curves()
    assert [(m.term, m.factor) for m in separation.levels] == [("chance", 1.0), ("chance", 0.5)]
    assert found.percent and [m.term for m in found.levels] == ["nearest_chance"]
    assert set(parted.lines) == {"positive_cos", "other_cos"} and not parted.percent and not separation.percent
    assert [list(c.lines) for c in make(contrast_weight=0.0).curves()] == [["restoration"]]
    assert [list(c.lines) for c in make(restoration_weight=0.0).curves()] == [
        ["contrast"],
        ["nearest"],
        ["positive_cos", "other_cos"],
    ]
    assert list(restored.lines) == ["restoration"]


def test_half_of_chance_is_not_below_half_of_it(make):
    terms = {"chance": 6.0, "contrast": 3.0, "nearest": 0.4, "nearest_chance": 0.005}
    learnt, sentence = make().verdict({}, terms)
    assert not learnt and "not below half of 6" in sentence and "(0.5 % by chance)" in sentence
    assert not make(contrast_weight=0.0).verdict({"restoration": 0.5}, {"restoration": 0.25})[0]
    assert make(contrast_weight=0.0).verdict({"restoration": 0.5}, {"restoration": 0.249})[0]


def test_one_rate_or_half_a_cosine(make):
    assert [make().lr_factor(s, 100) for s in (0, 50, 99)] == [1.0, 1.0, 1.0]
    assert [make(schedule="cosine").lr_factor(s, 100) for s in (0, 50, 100)] == pytest.approx([1.0, 0.5, 0.0])
