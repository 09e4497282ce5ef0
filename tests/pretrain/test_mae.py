"""mae: what is hidden stays hidden, and what a run tells is true."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from nnssl.errors import NnsslError
from nnssl.losses.masked import masked_error
from nnssl.masking.picture import ERROR, FILLED, PAINTED, REAL, SHOWN
from nnssl.pretrain.augment.rng import StepRNG
from nnssl.pretrain.methods import SourceStats, get_method

ISO = ((1, 1, 1), (2, 2, 2), (2, 2, 2))


ANISO = ((1, 1, 1), (1, 2, 2), (2, 2, 2))


STRIDED = ((1, 2, 2), (2, 2, 2), (1, 2, 2))


GEOMETRIES = {"iso": (ISO, (8, 12, 16)), "aniso": (ANISO, (4, 16, 12)), "strided": (STRIDED, (4, 16, 8))}


CASES = [
    ("iso", "plain", 3),
    ("aniso", "resenc", 3),
    ("strided", "plain", 3),
    ("iso", "resenc", 3),
    ("aniso", "plain", 2),
]


MODES = [{}, {"fill": "learned"}, {"masking": "sparse"}, {"per_channel": True}]


# ---------------------------------------------------------------------------------------------- views and masks


@pytest.mark.parametrize(("geometry", "arch", "dim"), CASES)
def test_views_have_exact_masks(make_mae, geometry, arch, dim, make_batch):
    method = make_mae(geometry, arch, dim, channels=2)
    batch = make_batch(method)
    size = method.request.size
    assert batch["input"].shape == (3, 2, *size) and batch["mask"].shape == batch["valid"].shape == (3, 1, *size)
    assert size == GEOMETRIES[geometry][1][-dim:]
    voxels = math.prod(method.block)
    per_axis = [n // b for n, b in zip(size, method.block)]
    cells = batch["mask"].float()
    pool = F.avg_pool3d if dim == 3 else F.avg_pool2d
    means = pool(cells, method.block)
    assert ((means == 0) | (means == 1)).all()
    full = batch["valid"].flatten(1).all(1)
    n = math.prod(per_axis)
    assert (batch["mask"][full].flatten(1).sum(1) == min(max(round(0.75 * n), 1), n - 1) * voxels).all()
    assert not torch.equal(batch["mask"][0], batch["mask"][1])
    assert torch.equal(batch["mask"], make_batch(method)["mask"])
    assert not torch.equal(batch["mask"], make_batch(method, step=1)["mask"])


def test_mask_of_each_channel_and_spread_of_the_ratio(make_mae, make_batch):
    mask = make_batch(make_mae(channels=3, per_channel=True))["mask"]
    assert mask.shape[1] == 3 and not torch.equal(mask[:, 0], mask[:, 1])
    method = make_mae(mask_spread=0.15, augment_p=0, mirror=False)
    share = make_batch(method, 40)["mask"].float().flatten(1).mean(1)
    assert share.min() >= 0.59 and share.max() <= 0.91 and share.std() > 0.04


def test_padding_is_dark_invalid_and_never_hidden(make_mae, make_crops):
    """A window that starts before the image: the padding is the lowest intensity, and no error counts there."""
    method = make_mae(augment_p=0, mirror=False)
    crops = make_crops(method, start=-4)
    crops.data[:, :, :4] = 0
    crops.data[:, :, :, :4] = 0
    crops.data[..., :4] = 0
    batch = method.views(crops, StepRNG(0, 0, 3))
    assert not batch["valid"][:, :, :4].any() and batch["valid"][:, :, 4:, 4:, 4:].all()
    assert (batch["input"].masked_select(~batch["valid"]) == -2).all()
    assert not (batch["mask"] & ~batch["valid"]).any()
    n = 4 * 8 * 12 // math.prod(method.block)
    assert (batch["mask"].flatten(1).sum(1) == round(0.75 * n) * math.prod(method.block)).all()


def test_turned_views_of_padded_windows(make_mae, make_crops):
    method = make_mae(augment_p=1.0)
    crops = make_crops(method, 8, start=-6)
    for axis in (2, 3, 4):
        crops.data.narrow(axis, 0, 6).zero_()
    batch = method.views(crops, StepRNG(0, 0, 8))
    assert not batch["valid"].all() and batch["valid"].any()
    assert (batch["input"].masked_select(~batch["valid"]) == -2).all()
    for a, b in zip(make_mae(augment_p=0, mirror=False).request.read_size, make_mae().request.read_size):
        assert a <= b


def test_windows_hold_turned_crops_but_no_more_than_the_image(make_mae):
    method = make_mae("iso")
    size, window = method.request.size, method.request.read_size
    assert all(n < w <= 2 * n and (w - n) % 2 == 0 for n, w in zip(size, window))
    for median, expected in (((8, 12, 16), size), ((10, 13, 9), (10, 14, 16)), ((99, 99, 99), window)):
        assert method.crops(method.plan, SourceStats(median, 5), method.config).read_size == expected
    still = make_mae("iso", augment_p=0)
    assert still.request.read_size == still.request.size


def test_a_crop_without_enough_image_is_skipped_and_counted(make_mae, make_crops, gradients):
    method = make_mae(augment_p=0, mirror=False)
    crops = make_crops(method)
    crops.data[0] = 0
    crops.data[0, :, 0, 0, 0] = 1
    crops.data[0, :, :, :, 0] = 0
    crops.data[0, :, 0, 0, 0] = 1
    batch = method.views(crops, StepRNG(0, 0, 3))
    terms, grads = gradients(method, batch)
    assert terms["skipped"] == 1 and torch.isfinite(terms["total"])
    alone = {k: v[1:] for k, v in batch.items()}
    torch.testing.assert_close(terms["total"], method(alone)["total"])
    nothing = {**batch, "valid": torch.zeros_like(batch["valid"])}
    terms, grads = gradients(method, nothing)
    assert terms["total"] == 0 and terms["skipped"] == 3
    assert all((g == 0).all() for g in grads.values())


def test_the_body_is_read_only_where_the_error_counts_there(make_mae):
    assert make_mae(region="body").request.body and not make_mae().request.body


def test_error_over_the_body_only(make_mae, make_crops):
    method = make_mae(region="body", augment_p=0, mirror=False)
    crops = make_crops(method)
    batch = method.views(crops, StepRNG(0, 0, 3))
    assert torch.equal(batch["valid"], crops.body)


# ---------------------------------------------------------------------------------------------- no leak


@pytest.mark.parametrize(("geometry", "arch", "dim"), CASES)
@pytest.mark.parametrize("mode", MODES, ids=str)
def test_nothing_leaks(make_mae, geometry, arch, dim, mode, make_batch, gradients):
    """Whatever stands behind the mask: prediction and every gradient are the same bits. What is visible does matter."""
    method = make_mae(geometry, arch, dim, channels=2, **mode)
    batch = make_batch(method)
    prediction = method.reconstruct(batch["input"], batch["mask"])[1]
    terms, grads = gradients(method, batch)
    for value in (50 * torch.randn_like(batch["input"]), torch.inf, -torch.inf, torch.nan):
        hidden = {**batch, "input": torch.where(batch["mask"], value, batch["input"])}
        assert torch.equal(method.reconstruct(hidden["input"], hidden["mask"])[1], prediction)
        other, others = gradients(method, hidden)
        assert torch.equal(other["total"], terms["total"]) and others.keys() == grads.keys()
        assert all(torch.equal(others[k], grads[k]) for k in grads)
    seen = batch["input"].clone()
    place = tuple(torch.nonzero(~batch["mask"].expand_as(seen))[7].tolist())
    seen[place] += 2.0
    changed = method.reconstruct(seen, batch["mask"])[1]
    assert not torch.equal(changed[place[0]], prediction[place[0]])
    others = [i for i in range(3) if i != place[0]]
    assert torch.equal(changed[others], prediction[others])


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_only_hidden_valid_voxels_give_gradient(make_mae, mode, make_batch):
    method = make_mae(channels=2, **mode)
    batch = make_batch(method)
    batch["valid"] = torch.rand(batch["valid"].shape) < 0.6
    prediction = torch.randn_like(batch["target"], requires_grad=True)
    terms = method.errors(prediction, batch["target"], batch["mask"], batch["valid"])
    terms["reconstruction"].backward()
    region = (batch["mask"] & batch["valid"]).expand_as(prediction)
    assert (prediction.grad[~region] == 0).all()
    expected = 2 * (prediction - batch["target"])[region] / region.sum()
    torch.testing.assert_close(prediction.grad[region], expected.detach())


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_targets_that_are_not_finite_drop_out(make_mae, bad, make_batch, gradients):
    method = make_mae()
    batch = make_batch(method)
    batch["target"] = batch["target"].clone()
    batch["target"][0, 0, 0] = bad
    batch["input"] = torch.where(batch["mask"], batch["input"], torch.nan_to_num(batch["input"]))
    terms, grads = gradients(method, batch)
    assert torch.isfinite(terms["total"]) and all(torch.isfinite(g).all() for g in grads.values())


# ---------------------------------------------------------------------------------------------- what learns


@pytest.mark.parametrize(("geometry", "arch", "dim"), CASES)
def test_what_learns_and_what_does_not(make_mae, geometry, arch, dim, make_batch, gradients):
    for preset in ({}, *get_method("mae").presets.values(), {"target": "block_norm"}, {"error": "l1"}):
        method = make_mae(geometry, arch, dim, **preset)
        terms, grads = gradients(method, make_batch(method))
        assert set(terms) == {"total", "reconstruction", "skipped"}
        for name, p in method.named_parameters():
            assert (name in grads) == p.requires_grad, (preset, name)
            assert p.requires_grad == ("seg_layers" not in name), name
        assert all(torch.isfinite(g).all() for g in grads.values())
        optimiser = method.optimiser()
        held = {id(p) for g in optimiser.param_groups for p in g["params"]}
        assert held == {id(p) for p in method.parameters() if p.requires_grad}
        optimiser.step()
        assert method.pretrained_parts() == {"encoder": True, "decoder_stages": [0, 1]}


def test_optimisers(make_mae):
    sgd = make_mae().optimiser()
    assert isinstance(sgd, torch.optim.SGD) and sgd.param_groups[0]["lr"] == 1e-2 and sgd.param_groups[0]["nesterov"]
    assert make_mae().lr_factor(0, 100) == 1 and make_mae().lr_factor(50, 100) == pytest.approx(0.5**0.9)
    assert make_mae().lr_factor(2, 1) == 0, "past the end, as the estimate of a very short run goes"
    adam = make_mae(optimiser="adamw", fill="learned").optimiser()
    assert [g["weight_decay"] for g in adam.param_groups] == [0.05, 0.0]
    assert all(p.squeeze().ndim > 1 for p in adam.param_groups[0]["params"])
    assert make_mae(optimiser="adamw").lr_factor(0, 100) == pytest.approx(0.2)
    assert make_mae(lr=0.3, weight_decay=0.1).optimiser().param_groups[0]["lr"] == 0.3
    group = sgd.param_groups[0]
    assert group["weight_decay"] == 3e-5 and group["momentum"] == 0.99, "nnU-Net's"
    plain = make_mae(momentum=0.0, weight_decay=0.1).optimiser().param_groups[0]
    assert not plain["nesterov"] and plain["momentum"] == 0 and plain["weight_decay"] == 0.1
    assert [g["lr"] for g in adam.param_groups] == [5e-4, 5e-4] and adam.param_groups[0]["betas"] == (0.9, 0.999)
    several = make_mae(optimiser="adamw", channels=2).optimiser().param_groups[1]["params"]
    assert several and all(p.squeeze().ndim <= 1 for p in several), "kernels of one voxel are decayed too"
    own = make_mae(optimiser="adamw", lr=0.2, weight_decay=0.3).optimiser().param_groups
    assert [(g["lr"], g["weight_decay"]) for g in own] == [(0.2, 0.3), (0.2, 0.0)]


def test_what_does_not_fit_is_refused(make_mae):
    for options in ({"fill": "learned"}, {"per_channel": True}):
        with pytest.raises(NnsslError, match="sparse"):
            make_mae(masking="sparse", **options)
    with pytest.raises(NnsslError, match="block=3,3,3"):
        make_mae(block="3,3,3")
    assert make_mae(block="4,6,8").block == (4, 6, 8)


def test_perfect_is_zero_and_zero_is_one(make_mae, make_crops):
    method = make_mae(augment_p=0, mirror=False)
    crops = make_crops(method, 8)
    crops.data = torch.randn_like(crops.data)
    batch = method.views(crops, StepRNG(0, 0, 8))
    keys = ("target", "mask", "valid")
    assert method.errors(batch["target"], *(batch[k] for k in keys))["reconstruction"] == 0
    nothing = method.errors(torch.zeros_like(batch["target"]), *(batch[k] for k in keys))
    assert nothing["reconstruction"].item() == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("target", ["intensity", "block_norm"])
def test_guesses_are_measured_in_eval_only(make_mae, target, make_batch):
    method = make_mae(channels=2, target=target).eval()
    batch = make_batch(method)
    with torch.no_grad():
        terms = method(batch)
    assert set(terms) == {"total", "reconstruction", "skipped", "surround", "inpainting", "oracle"}
    assert terms["oracle"] < terms["surround"] and terms["inpainting"] < terms["surround"]
    region = batch["mask"] & batch["valid"]
    if target == "intensity":
        blocks = batch["target"] * region
        pool, n = F.avg_pool3d, region.float()
        mean = pool(blocks, method.block) / pool(n, method.block).clamp_min(1e-9)
        wide = F.interpolate(mean, size=blocks.shape[2:], mode="nearest")
        torch.testing.assert_close(terms["oracle"], masked_error(wide, batch["target"], region))
    else:
        assert terms["oracle"].item() == pytest.approx(1, abs=0.1)


def test_autocast(make_mae, make_batch):
    for mode in MODES:
        method = make_mae(**mode)
        batch = make_batch(method)
        exact = method(batch)["total"]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rough = method(batch)["total"]
        assert rough.dtype == torch.float32 and abs(rough - exact) < 0.05 * exact


# ---------------------------------------------------------------------------------------------- for a person


@pytest.mark.parametrize("dim", [2, 3])
@pytest.mark.parametrize("options", [{}, {"masking": "sparse", "target": "block_norm"}], ids=str)
def test_pictures_and_embedding(make_mae, dim, options, make_batch):
    method = make_mae("iso", "plain", dim, 2, **options).eval()
    batch = make_batch(method, 5)
    with torch.no_grad():
        picture = method.pictures(batch)
        z = method.embed(batch)
    columns = picture.columns
    assert list(columns) == [SHOWN, PAINTED, REAL, FILLED, ERROR]
    assert set(picture.tags) == {PAINTED, FILLED} and "Learnt" in picture.note
    for name, image in columns.items():
        assert image.shape == (4, *method.request.size[-2:]) + ((3,) if name == SHOWN else ())
        assert np.isfinite(image).all() and image.min() >= 0 and image.max() <= 1
    hidden = batch["mask"][:4, 0] if dim == 2 else batch["mask"][:4, 0, method.request.size[0] // 2]
    assert np.array_equal(columns[PAINTED][~hidden.numpy()], columns[REAL][~hidden.numpy()])
    assert z.shape == (5, 16) and torch.isfinite(z).all()


def test_verdict(make_mae):
    last = {"total": 0.2, "reconstruction": 0.2, "surround": 0.5, "inpainting": 0.3, "oracle": 0.15}
    learnt, sentence = make_mae().verdict({}, last)
    assert learnt and "mae learnt" in sentence and "0.3" in sentence and "0.15" in sentence
    assert not make_mae().verdict({}, {**last, "reconstruction": 0.35})[0]
    assert not make_mae().verdict({}, {**last, "inpainting": 0.6, "surround": 0.1})[0]
    assert make_mae().verdict({"total": 2.0}, {"total": 1.0})[0]


def test_guesses_do_not_see_what_is_hidden(make_mae, make_batch):
    """If a guess stays as it is while what is hidden moves by +c and -c, its mean squared errors add up to 2 (e + c^2)."""
    method = make_mae(channels=2).eval()
    batch = make_batch(method)
    region, valid, c = batch["mask"] & batch["valid"], batch["valid"], 0.7

    def errors(shift):
        target = torch.where(region, batch["target"] + shift, batch["target"])
        return method.errors(torch.zeros_like(target), target, batch["mask"], valid)

    now, up, down = errors(0.0), errors(c), errors(-c)
    for name in ("surround", "inpainting"):
        assert float(up[name] + down[name] - 2 * now[name]) == pytest.approx(2 * c * c, rel=1e-4), name
        assert float(up[name]) != pytest.approx(float(now[name]), rel=1e-3)
    assert float(up["oracle"]) == pytest.approx(float(now["oracle"]), rel=1e-4)  # it is made of what is hidden


def test_the_hidden_share_is_drawn_around_the_ratio(make_mae):
    """mask_ratio +- mask_spread: the mean of many is the ratio, within four standard errors."""
    method = make_mae(mask_ratio=0.6, mask_spread=0.15, block="2,2,2")
    valid = torch.ones(500, 1, *method.request.size, dtype=torch.bool)
    share = method.draw_mask(valid, StepRNG(0, 0, 500)).float().flatten(1).mean(1)
    assert abs(float(share.mean()) - 0.6) < 4 * 0.15 / 3**0.5 / 500**0.5
    assert 0.44 < float(share.min()) < 0.46 and 0.74 < float(share.max()) < 0.76
    exact = make_mae(mask_ratio=0.6, block="2,2,2").draw_mask(valid, StepRNG(0, 0, 500)).float().flatten(1).mean(1)
    assert exact.unique().tolist() == [pytest.approx(round(0.6 * 192) / 192)]
