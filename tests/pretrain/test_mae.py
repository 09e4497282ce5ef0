"""mae: what is hidden stays hidden, and what a run tells is true."""

import math
import os

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import nn

from nnssl import checkpoint
from nnssl.config import make_config
from nnssl.errors import NnsslError
from nnssl.losses.masked import masked_error
from nnssl.masking.picture import ERROR, FILLED, PAINTED, REAL, SHOWN
from nnssl.networks import build_network, forward_features
from nnssl.plans import Plan
from nnssl.pretrain import run
from nnssl.pretrain.augment.rng import StepRNG
from nnssl.pretrain.methods import Crops, SourceStats, get_method

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


def build(plans, description, values, dim=3):
    plan = Plan.from_dicts(plans, "3d_fullres" if dim == 3 else "2d", description)
    cls = get_method("mae")
    config = make_config(cls.Config, values)
    request = cls.crops(plan, SourceStats((30, 40, 35), 5), config)
    torch.manual_seed(0)
    return cls(build_network(plan), plan, request, config)


@pytest.fixture
def make(tiny_plans, tiny_dataset_json):
    """``make(geometry, arch, dim, channels, features, **options) -> method``."""

    def made(geometry="iso", arch="plain", dim=3, channels=1, features=(4, 6, 8), **options):
        strides, size = GEOMETRIES[geometry]
        plans = tiny_plans(dim, arch, channels, strides=strides, patch=size, features=features)
        return build(plans, tiny_dataset_json(channels), options, dim)

    return made


# ---------------------------------------------------------------------------------------------- views and masks


@pytest.mark.parametrize(("geometry", "arch", "dim"), CASES)
def test_views_have_exact_masks(make, geometry, arch, dim, make_batch):
    method = make(geometry, arch, dim, channels=2)
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


def test_mask_of_each_channel_and_spread_of_the_ratio(make, make_batch):
    mask = make_batch(make(channels=3, per_channel=True))["mask"]
    assert mask.shape[1] == 3 and not torch.equal(mask[:, 0], mask[:, 1])
    method = make(mask_spread=0.15, augment_p=0, mirror=False)
    share = make_batch(method, 40)["mask"].float().flatten(1).mean(1)
    assert share.min() >= 0.59 and share.max() <= 0.91 and share.std() > 0.04


def test_padding_is_dark_invalid_and_never_hidden(make, make_crops):
    """A window that starts before the image: the padding is the lowest intensity, and no error counts there."""
    method = make(augment_p=0, mirror=False)
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


def test_turned_views_of_padded_windows(make, make_crops):
    method = make(augment_p=1.0)
    crops = make_crops(method, 8, start=-6)
    for axis in (2, 3, 4):
        crops.data.narrow(axis, 0, 6).zero_()
    batch = method.views(crops, StepRNG(0, 0, 8))
    assert not batch["valid"].all() and batch["valid"].any()
    assert (batch["input"].masked_select(~batch["valid"]) == -2).all()
    for a, b in zip(make(augment_p=0, mirror=False).request.read_size, make().request.read_size):
        assert a <= b


def test_windows_hold_turned_crops_but_no_more_than_the_image(make):
    method = make("iso")
    size, window = method.request.size, method.request.read_size
    assert all(n < w <= 2 * n and (w - n) % 2 == 0 for n, w in zip(size, window))
    for median, expected in (((8, 12, 16), size), ((10, 13, 9), (10, 14, 16)), ((99, 99, 99), window)):
        assert method.crops(method.plan, SourceStats(median, 5), method.config).read_size == expected
    still = make("iso", augment_p=0)
    assert still.request.read_size == still.request.size


def test_a_crop_without_enough_image_is_skipped_and_counted(make, make_crops, gradients):
    method = make(augment_p=0, mirror=False)
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


def test_the_body_is_read_only_where_the_error_counts_there(make):
    assert make(region="body").request.body and not make().request.body


def test_error_over_the_body_only(make, make_crops):
    method = make(region="body", augment_p=0, mirror=False)
    crops = make_crops(method)
    batch = method.views(crops, StepRNG(0, 0, 3))
    assert torch.equal(batch["valid"], crops.body)


# ---------------------------------------------------------------------------------------------- no leak


@pytest.mark.parametrize(("geometry", "arch", "dim"), CASES)
@pytest.mark.parametrize("mode", MODES, ids=str)
def test_nothing_leaks(make, geometry, arch, dim, mode, make_batch, gradients):
    """Whatever stands behind the mask: prediction and every gradient are the same bits. What is visible does matter."""
    method = make(geometry, arch, dim, channels=2, **mode)
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
def test_only_hidden_valid_voxels_give_gradient(make, mode, make_batch):
    method = make(channels=2, **mode)
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
def test_targets_that_are_not_finite_drop_out(make, bad, make_batch, gradients):
    method = make()
    batch = make_batch(method)
    batch["target"] = batch["target"].clone()
    batch["target"][0, 0, 0] = bad
    batch["input"] = torch.where(batch["mask"], batch["input"], torch.nan_to_num(batch["input"]))
    terms, grads = gradients(method, batch)
    assert torch.isfinite(terms["total"]) and all(torch.isfinite(g).all() for g in grads.values())


# ---------------------------------------------------------------------------------------------- what learns


@pytest.mark.parametrize(("geometry", "arch", "dim"), CASES)
def test_what_learns_and_what_does_not(make, geometry, arch, dim, make_batch, gradients):
    for preset in ({}, *get_method("mae").presets.values(), {"target": "block_norm"}, {"error": "l1"}):
        method = make(geometry, arch, dim, **preset)
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


def test_optimisers(make):
    sgd = make().optimiser()
    assert isinstance(sgd, torch.optim.SGD) and sgd.param_groups[0]["lr"] == 1e-2 and sgd.param_groups[0]["nesterov"]
    assert make().lr_factor(0, 100) == 1 and make().lr_factor(50, 100) == pytest.approx(0.5**0.9)
    assert make().lr_factor(2, 1) == 0, "past the end, as the estimate of a very short run goes"
    adam = make(optimiser="adamw", fill="learned").optimiser()
    assert [g["weight_decay"] for g in adam.param_groups] == [0.05, 0.0]
    assert all(p.squeeze().ndim > 1 for p in adam.param_groups[0]["params"])
    assert make(optimiser="adamw").lr_factor(0, 100) == pytest.approx(0.2)
    assert make(lr=0.3, weight_decay=0.1).optimiser().param_groups[0]["lr"] == 0.3
    group = sgd.param_groups[0]
    assert group["weight_decay"] == 3e-5 and group["momentum"] == 0.99, "nnU-Net's"
    plain = make(momentum=0.0, weight_decay=0.1).optimiser().param_groups[0]
    assert not plain["nesterov"] and plain["momentum"] == 0 and plain["weight_decay"] == 0.1
    assert [g["lr"] for g in adam.param_groups] == [5e-4, 5e-4] and adam.param_groups[0]["betas"] == (0.9, 0.999)
    several = make(optimiser="adamw", channels=2).optimiser().param_groups[1]["params"]
    assert several and all(p.squeeze().ndim <= 1 for p in several), "kernels of one voxel are decayed too"
    own = make(optimiser="adamw", lr=0.2, weight_decay=0.3).optimiser().param_groups
    assert [(g["lr"], g["weight_decay"]) for g in own] == [(0.2, 0.3), (0.2, 0.0)]


def test_what_does_not_fit_is_refused(make):
    for options in ({"fill": "learned"}, {"per_channel": True}):
        with pytest.raises(NnsslError, match="sparse"):
            make(masking="sparse", **options)
    with pytest.raises(NnsslError, match="block=3,3,3"):
        make(block="3,3,3")
    assert make(block="4,6,8").block == (4, 6, 8)


def test_perfect_is_zero_and_zero_is_one(make, make_crops):
    method = make(augment_p=0, mirror=False)
    crops = make_crops(method, 8)
    crops.data = torch.randn_like(crops.data)
    batch = method.views(crops, StepRNG(0, 0, 8))
    keys = ("target", "mask", "valid")
    assert method.errors(batch["target"], *(batch[k] for k in keys))["reconstruction"] == 0
    nothing = method.errors(torch.zeros_like(batch["target"]), *(batch[k] for k in keys))
    assert nothing["reconstruction"].item() == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("target", ["intensity", "block_norm"])
def test_guesses_are_measured_in_eval_only(make, target, make_batch):
    method = make(channels=2, target=target).eval()
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


def test_autocast(make, make_batch):
    for mode in MODES:
        method = make(**mode)
        batch = make_batch(method)
        exact = method(batch)["total"]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rough = method(batch)["total"]
        assert rough.dtype == torch.float32 and abs(rough - exact) < 0.05 * exact


# ---------------------------------------------------------------------------------------------- for a person


@pytest.mark.parametrize("dim", [2, 3])
@pytest.mark.parametrize("options", [{}, {"masking": "sparse", "target": "block_norm"}], ids=str)
def test_pictures_and_embedding(make, dim, options, make_batch):
    method = make("iso", "plain", dim, 2, **options).eval()
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


def test_verdict(make):
    last = {"total": 0.2, "reconstruction": 0.2, "surround": 0.5, "inpainting": 0.3, "oracle": 0.15}
    learnt, sentence = make().verdict({}, last)
    assert learnt and "mae learnt" in sentence and "0.3" in sentence and "0.15" in sentence
    assert not make().verdict({}, {**last, "reconstruction": 0.35})[0]
    assert not make().verdict({}, {**last, "inpainting": 0.6, "surround": 0.1})[0]
    assert make().verdict({"total": 2.0}, {"total": 1.0})[0]


# ---------------------------------------------------------------------------------------------- runs


@pytest.mark.parametrize(("arch", "mode"), [("plain", "dense"), ("resenc", "sparse")])
def test_nnunet_loads_the_weights(make, tmp_path, arch, mode, make_batch):
    from nnunetv2.run.load_pretrained_weights import load_pretrained_weights

    method = make("aniso", arch, masking=mode)
    keys = list(method.network.state_dict())
    batch = make_batch(method)
    optimiser = method.optimiser()
    method(batch)["total"].backward()
    optimiser.step()
    assert list(method.network.state_dict()) == keys == list(build_network(method.plan).state_dict())
    payload = checkpoint.build_payload(
        method.network,
        method.plan,
        method="mae",
        config=vars(method.config),
        crop_size=method.request.size,
        pretrained_parts=method.pretrained_parts(),
        data={},
        citations=method.citation,
    )
    checkpoint.save(tmp_path / "weights.pth", payload)
    network = build_network(method.plan)
    load_pretrained_weights(network, str(tmp_path / "weights.pth"))
    a, b = forward_features(network, batch["input"]), forward_features(method.network, batch["input"])
    assert all(torch.equal(x, y) for x, y in zip(a.skips + a.levels, b.skips + b.levels))


@pytest.mark.slow
def test_resume_is_exact(tiny_preprocessed, nnunet_env):
    """Two epochs equal one epoch, a stop and another, bit for bit."""
    tiny_preprocessed(901, "Tiny", 6, plan_options={"features": (4, 4, 6)})
    options = {"workers": 0, "batch_size": 2, "held_out_batches": 1, "fill": "learned"}
    common = {"method": "mae", "device": "cpu", "epochs": 2, "iterations": 2, "options": options}

    from nnssl.pretrain.engine.hooks import Hook

    class Stop(Hook):
        name = "stop"

        def after_epoch(self, engine, row):
            os.kill(os.getpid(), 15)

    straight = run(901, name="straight", **common)
    assert not run(901, name="halves", hooks=[Stop()], **common).finished
    halves = run(901, method="mae", device="cpu", name="halves", continue_run=True)
    assert straight.finished and halves.finished
    a, b = (checkpoint.load(r.checkpoint).weights for r in (straight, halves))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert "interpolation" in straight.sentence
    assert (straight.folder / "views_epoch_0002.png").stat().st_size > 5000


def _worker(index, port, folder, arguments, crops):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=index, world_size=2)
    method = build(*arguments)
    wrapped = nn.parallel.DistributedDataParallel(method)
    mine = slice(2 * index, 2 * index + 2)
    crops = Crops(**{k: v[mine] for k, v in vars(crops).items() if v is not None})
    batch = method.views(crops, StepRNG(0, 0, 4, 2 * index, 2))
    terms = wrapped(batch)
    terms["total"].backward()
    grads = {k: p.grad for k, p in method.named_parameters() if p.grad is not None}
    torch.save((terms["total"].detach(), grads), f"{folder}/{index}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"augment_p": 0.0}, {"masking": "sparse", "augment_p": 0.0}], ids=str)
def test_two_processes_equal_one(tmp_path, tiny_plans, tiny_dataset_json, options, make_crops, gradients):
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    plans = tiny_plans(strides=ISO, patch=(8, 12, 16), features=(4, 4, 6))
    arguments = (plans, tiny_dataset_json(), options)
    method = build(*arguments)
    crops = make_crops(method, 4)
    crops.data[0, :, 6:] = 0  # ranks differ in how much there is to reconstruct
    mp.spawn(_worker, args=(port, str(tmp_path), arguments, crops), nprocs=2)
    terms, grads = gradients(method, method.views(crops, StepRNG(0, 0, 4)))
    ranks = [torch.load(tmp_path / f"{i}.pt") for i in range(2)]
    torch.testing.assert_close(sum(r[0] for r in ranks) / 2, terms["total"].detach(), atol=1e-6, rtol=1e-5)
    assert abs(ranks[0][0] - ranks[1][0]) > 1e-3
    for key, grad in grads.items():
        torch.testing.assert_close(ranks[0][1][key], grad, atol=1e-5, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["dense", "sparse"])
def test_overfits_one_volume(make, mode, make_crops):
    """200 steps on one smooth volume: hidden blocks are predicted far better than by the mean of what is around them."""
    options = {"optimiser": "adamw", "lr": 3e-3, "augment_p": 0, "mirror": False, "masking": mode, "block": "4,4,4"}
    method = make("iso", "resenc", features=(8, 16, 16), **options)
    crops, optimiser = make_crops(method, 2), method.optimiser()
    for step in range(200):
        batch = method.views(crops, StepRNG(0, step, 2))
        optimiser.zero_grad()
        method(batch)["total"].backward()
        nn.utils.clip_grad_norm_(method.parameters(), method.grad_clip)
        optimiser.step()
    method.eval()
    with torch.no_grad():
        terms = method(method.views(crops, StepRNG(0, 10**6, 2)))
    assert terms["reconstruction"] < 0.5 * terms["surround"]


@pytest.mark.slow
def test_learns_to_go_on_with_waves_it_has_not_seen(tiny_plans, tiny_dataset_json, make_crops):
    """Waves of 5, 7 and 6 voxels and any phase: what is hidden follows from what is around, but not by interpolation."""
    plans = tiny_plans(3, "resenc", strides=ISO, patch=(16, 16, 16), features=(8, 16, 16))
    options = {"optimiser": "adamw", "lr": 3e-3, "augment_p": 0, "mirror": False, "block": "4,4,4", "mask_ratio": 0.5}
    method = build(plans, tiny_dataset_json(), options)

    def waves(n, seed):
        phases = 2 * math.pi * torch.rand(n, 3, generator=torch.Generator().manual_seed(seed))
        crops = make_crops(method, n)
        grid = torch.meshgrid(*[torch.arange(w).float() for w in crops.data.shape[2:]], indexing="ij")
        periods = (5.0, 7.0, 6.0)
        waves = [sum(torch.sin(2 * math.pi * x / t + p) for x, t, p in zip(grid, periods, row)) for row in phases]
        crops.data, crops.body = torch.stack(waves)[:, None], torch.ones_like(crops.body)
        return method.views(crops, StepRNG(0, seed, n))

    def unseen():
        method.eval()
        with torch.no_grad():
            return {k: float(v) for k, v in method(waves(8, 10**6)).items()}

    first, optimiser = unseen(), method.optimiser()
    method.train()
    for step in range(60):
        optimiser.zero_grad()
        method(waves(4, step))["total"].backward()
        nn.utils.clip_grad_norm_(method.parameters(), method.grad_clip)
        optimiser.step()
    last = unseen()
    assert not method.verdict(first, first)[0] and method.verdict(first, last)[0]
    assert last["reconstruction"] < 0.3 * min(last["inpainting"], last["surround"])


def test_guesses_do_not_see_what_is_hidden(make, make_batch):
    """If a guess stays as it is while what is hidden moves by +c and -c, its mean squared errors add up to 2 (e + c^2)."""
    method = make(channels=2).eval()
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


def test_the_hidden_share_is_drawn_around_the_ratio(make):
    """mask_ratio +- mask_spread: the mean of many is the ratio, within four standard errors."""
    method = make(mask_ratio=0.6, mask_spread=0.15, block="2,2,2")
    valid = torch.ones(500, 1, *method.request.size, dtype=torch.bool)
    share = method.draw_mask(valid, StepRNG(0, 0, 500)).float().flatten(1).mean(1)
    assert abs(float(share.mean()) - 0.6) < 4 * 0.15 / 3**0.5 / 500**0.5
    assert 0.44 < float(share.min()) < 0.46 and 0.74 < float(share.max()) < 0.76
    exact = make(mask_ratio=0.6, block="2,2,2").draw_mask(valid, StepRNG(0, 0, 500)).float().flatten(1).mean(1)
    assert exact.unique().tolist() == [pytest.approx(round(0.6 * 192) / 192)]
