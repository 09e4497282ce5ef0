"""voco on volumes that are small, empty, constant or not finite, with several channels, of slices, and of thick ones."""

import math

import pytest
import torch

from nnssl.losses.overlap import overlap_labels
from nnssl.pretrain.augment import StepRNG
from nnssl.pretrain.methods import Crops

# ---- degenerate volumes (36) -----------------------------------------------------------------------------------------


def step(method, crops):
    batch = method.views(crops, StepRNG(0, 3, len(crops)))
    method.zero_grad()
    terms = method(batch)
    terms["total"].backward()
    assert all(bool(torch.as_tensor(v).isfinite().all()) for v in terms.values())
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in method.parameters() if p.requires_grad)
    return batch, {k: float(torch.as_tensor(v).detach()) for k, v in terms.items()}


def test_volume_smaller_than_the_window(make_voco, voco_crops):
    """Padded with the lower clip value; cells of padding are left out and overlaps add up to 1 over the others."""
    method = make_voco()
    shape = torch.tensor([[4, 24, 16], [4, 12, 16], [4, 24, 16]])
    start = torch.tensor([[0, 0, 0], [0, -6, 0], [0, 0, 0]])
    crops = voco_crops(method, shape=shape, start=start)
    crops.data[1, :, :, :6] = crops.data[1, :, :, 18:] = 0
    batch, _ = step(method, crops)
    window = method.windows(crops, crops.intensity[..., 0])[0]
    assert torch.equal(window[1, :, :, :6], torch.full_like(window[1, :, :, :6], -2.0))
    assert torch.equal(window[1, :, :, 6:18], crops.data[1, :, :, 6:18])
    assert batch["base"][1].all() and batch["base"][0].all()  # a quarter of the outer cells lies in the image
    shape[1, 1], start[1, 1] = 10, -7  # 8 - 7 = 1 of 8 planes
    batch, _ = step(method, voco_crops(method, shape=shape, start=start))
    assert batch["base"].sum(1).tolist() == [6, 0, 6] and not batch["random"][1].any()  # two cells are left
    wide = make_voco(grid=(1, 3, 3), crop=(4, 8, 8), stats=(6, 26, 26), random_crops=30)
    shape = torch.tensor([[4, 24, 24], [4, 10 + 8, 24], [4, 24, 24]])
    start = torch.tensor([[0, 0, 0], [0, -7, 0], [0, 0, 0]])
    batch, terms = step(wide, voco_crops(wide, shape=shape, start=start))
    assert batch["base"][1].tolist() == [False] * 3 + [True] * 6
    torch.testing.assert_close(batch["overlap"].sum(2), torch.ones(3, 30))
    assert bool((batch["overlap"][1, :, :3] == 0).all()) and terms["skipped"] == 0
    kept = overlap_labels(batch["offset"], (4, 8, 8), (1, 3, 3))[1, :, 3:].sum(1)
    assert bool((kept >= 0.5).all())


def test_air_constant_and_not_finite_volumes_are_skipped(make_voco, voco_crops):
    method = make_voco()
    good = voco_crops(method, 5)
    air, constant, nan = good.data.clone(), good.data.clone(), good.data.clone()
    good.body[1] = False
    air[1] = -2 + 0.01 * air[1]
    constant[2], nan[3, 0, 0, 0, 0] = 0.7, math.nan
    data = torch.stack([good.data[0], air[1], constant[2], nan[3], good.data[4]])
    batch, terms = step(method, Crops(**{**vars(good), "data": data}))
    assert batch["base"].any(1).tolist() == [True, False, False, False, True]
    assert terms["skipped"] == pytest.approx(0.6)
    told = {k: v for k, v in vars(good).items() if v is not None}
    pair = Crops(**{k: v[[0, 4]] if isinstance(v, torch.Tensor) else [v[0], v[4]] for k, v in told.items()})
    batch = method.eval().views(Crops(**{**vars(good), "data": data}), StepRNG(0, 3, 5))
    alone = {**batch, **{k: batch[k][[0, 4]] for k in batch}}
    for key in ("total", "intra", "inter", "reg", "top1", "mae"):
        torch.testing.assert_close(method(batch)[key], method(alone)[key], atol=1e-5, rtol=1e-4)
    assert len(pair) == 2


def test_all_volumes_skipped(make_voco, voco_crops):
    method = make_voco()
    crops = voco_crops(method)
    crops.data[:] = 0.3
    _, terms = step(method, crops)
    assert terms["total"] == 0 and terms["skipped"] == 1 and terms["position_learnt"] == 0
    assert all(float(p.grad.abs().sum()) == 0 for p in method.parameters() if p.requires_grad)


def test_masked_normalisation_is_padded_with_its_own_outside(make_voco, voco_crops):
    method = make_voco()
    crops = voco_crops(method, shape=torch.tensor([[4, 24, 12]] * 3))
    assert float(method.windows(crops, crops.intensity[..., 0])[0][..., 12:].unique()) == -2
    method.plan.config.configuration["use_mask_for_norm"] = [True]
    assert float(method.windows(crops, crops.intensity[..., 0])[0][..., 12:].abs().max()) == 0


def test_several_channels_are_cut_together(make_voco, voco_crops, voco_batch):
    method = make_voco(channels=2)
    batch = voco_batch(method.eval(), channels=2)
    assert batch["crops"].shape == (3, 9, 2, 4, 8, 8)
    crops = voco_crops(method, channels=2)
    crops.data[:, 1] = crops.data[:, 0] + 1
    x = method.train().views(crops, StepRNG(0, 1, 3))["crops"]
    assert x.shape[2] == 2
    quiet = make_voco(channels=2, intensity=0.0).views(crops, StepRNG(0, 1, 3))["crops"]
    torch.testing.assert_close(quiet[:, :, 1], quiet[:, :, 0] + 1)


def test_2d_plans(make_voco, voco_batch):
    method = make_voco(dim=2, stats=(10, 26, 26), crop=(8, 8))
    assert method.grid == (3, 3)
    batch = voco_batch(method)
    assert batch["crops"].shape == (3, 12, 1, 8, 8)
    terms = method(batch)
    terms["total"].backward()
    assert bool(terms["total"].isfinite())
    picture = method.eval().pictures(voco_batch(method))
    assert all(c.shape == (3, 24, 24, 3) for c in picture.columns.values())


def test_anisotropic_plan(make_voco, voco_batch):
    """(31) Crops of 20x64x64 in a grid of 1x3x3: one step."""
    strides = ((1, 1, 1), (1, 2, 2), (1, 2, 2), (2, 2, 2), (2, 2, 2), (1, 2, 2))
    plan = {"strides": strides, "patch": (20, 256, 224), "features": (2, 2, 2, 4, 4, 4), "spacing": (6.0, 0.6, 0.6)}
    plan["median_shape"] = (20, 256, 216)
    method = make_voco(plan=plan, stats=(20, 256, 216), crop=None, random_crops=1)
    assert method.request.size == (20, 64, 64) and method.grid == (1, 3, 3)
    terms = method(voco_batch(method, 2))
    terms["total"].backward()
    assert bool(terms["total"].isfinite())
