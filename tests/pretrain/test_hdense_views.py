"""hdense's crops and views: pairs that show the same voxels, units, and corruptions."""

import math

import pytest
import torch
import torch.nn.functional as F

from nnssl.errors import NnsslError
from nnssl.intensity import rescale_intensity, restore_intensity
from nnssl.plans import Plan
from nnssl.pretrain.augment.intensity import unit_range
from nnssl.pretrain.augment.rng import StepRNG
from nnssl.pretrain.methods import Crops, SourceStats, get_method
from nnssl.pretrain.methods.hdense.window import window_corruption

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
    plan = _plan(tiny_plans, tiny_dataset_json, (40, 56, 40), ((1, 1, 1), (2, 2, 2), (2, 2, 2)), 2)
    flat = cls.crops(plan, SourceStats((9, 90, 60), 9), cls.Config())
    assert flat.size == (56, 40) and flat.read_size == (111, 79)


@pytest.mark.parametrize(("geometry", "arch"), CASES[:4:2])
@pytest.mark.parametrize("dim", [3, 2])
def test_views_show_the_same_voxels(make_hdense, geometry, arch, dim, hdense_batch):
    method = make_hdense(geometry=geometry, arch=arch, dim=dim, channels=2)
    size = method.request.size
    batch = hdense_batch(method, 3)
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


def test_views_come_from_the_draws_only(make_hdense, hdense_crops):
    method = make_hdense()
    crops = hdense_crops(method, 4)
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
    clean = make_hdense(corruption="none").views(crops, StepRNG(0, 5, 4))
    inside = restore_intensity(clean["target"], clean["bounds"])
    torch.testing.assert_close(clean["input"], inside)


def test_units_of_mr_and_ct(make_hdense):
    method = make_hdense(channels=2)
    intensity = torch.tensor([[[-2.0, 3.0], [0.5, 0.5]]])
    x = torch.randn(1, 2, 6, 7, 5)
    assert torch.equal(unit_range(method.plan, intensity), intensity)
    torch.testing.assert_close(restore_intensity(rescale_intensity(x, intensity), intensity), x, atol=1e-6, rtol=0)
    assert torch.isfinite(rescale_intensity(x, intensity)).all()  # a channel without a range
    ct = make_hdense(modality="CT")
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


@pytest.mark.parametrize("corruption", ["local", "window"])
def test_both_crops_are_corrupted_and_each_by_itself(make_hdense, corruption, hdense_batch):
    """Two crops of the same place: what the network sees differs from the target in both, and differently."""
    batch = hdense_batch(make_hdense(min_overlap=1.0, corruption=corruption), 6)
    a, b = batch["target"].chunk(2)
    assert torch.equal(a, b)
    seen_a, seen_b = rescale_intensity(batch["input"], batch["bounds"]).chunk(2)

    def far(x, y):
        return ((x - y).abs().flatten(1).amax(1) > 0.01).float().mean().item()

    for x, y in ((seen_a, a), (seen_b, b), (seen_a, seen_b)):
        assert far(x, y) == 1 if corruption == "local" else far(x, y) > 0.6  # p = 0.001 and 0.05 that nothing happens
