"""Volume contrast learns, is the same on one process and on two, resumes, and leaves an encoder that nnU-Net loads."""

import logging
import math
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights

from nnssl import checkpoint
from nnssl.config import make_config
from nnssl.networks import alias_map, build_network
from nnssl.plans import Plan, load_plan
from nnssl.pretrain import run
from nnssl.pretrain.augment import StepRNG
from nnssl.pretrain.engine.hooks import Hook
from nnssl.pretrain.methods import Crops, Progress, SourceStats, get_method

FLAT = ((1, 1, 1), (1, 2, 2), (2, 2, 2))


def method_of(plans, description, *, stats=(6, 26, 18), crop=(4, 8, 8), **options):
    torch.manual_seed(0)
    plan = Plan.from_dicts(plans, "3d_fullres", description)
    cls = get_method("voco")
    config = make_config(cls.Config, {"proj_dim": 24, "random_crops": 3, **options})
    request = cls.crops(plan, SourceStats(stats, 5), config, crop)
    return cls(build_network(plan), plan, request, config)


def crops_of(method, n, seed=0):
    g, window = torch.Generator().manual_seed(seed), method.request.read_size
    coarse = torch.randn(n, 1, *[max(2, w // 3) for w in window], generator=g)
    data = F.interpolate(coarse, size=window, mode="trilinear") + 0.1 * torch.randn(n, 1, *window, generator=g)
    place, shape = torch.full((n, 3), 0.5, dtype=torch.float64), torch.tensor(window).expand(n, 3).clone()
    body, start = torch.ones(n, 1, *window, dtype=torch.bool), torch.zeros(n, 3, dtype=torch.long)
    body[1, :, :, : window[1] // 2] = False  # the second volume has fewer cells
    intensity, names = torch.tensor([-2.0, 2.0]).expand(n, 1, 2).clone(), [f"c{i}" for i in range(n)]
    return Crops(data, body, place, place, intensity, start, names, shape, ["d"] * n)


# ---- two processes ---------------------------------------------------------------------------------------------------


def one_step(method, module, first, n, total):
    crops = crops_of(method, total).part(first, n)
    with torch.no_grad():
        batch = method.views(crops, StepRNG(0, 3, total, first, n))
    terms = module(batch)
    terms["total"].backward()
    gradients = {k: p.grad for k, p in method.named_parameters() if p.grad is not None}
    embedded = method.embed(batch).detach()
    return {k: torch.as_tensor(v).detach() for k, v in terms.items()}, gradients, embedded


def _worker(index, port, folder, plans, description):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=index, world_size=2)
    for gather in (True, False):
        method = method_of(plans, description, gather=gather)
        wrapped = torch.nn.parallel.DistributedDataParallel(method)
        torch.save(one_step(method, wrapped, 2 * index, 2, 4), f"{folder}/{gather}{index}.pt")
        method.after_step(Progress(1, 1, 0, 1))
    dist.destroy_process_group()


def test_two_processes_equal_one(tmp_path, tiny_plans, tiny_dataset_json):
    """Statistics and pairs of volumes are those of the whole batch: also volume 1 of rank 0 with volume 2 of rank 1."""
    plans = tiny_plans(strides=FLAT, patch=(8, 24, 16), features=(4, 6, 8))
    description = tiny_dataset_json()
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.spawn(_worker, args=(port, str(tmp_path), plans, description), nprocs=2)
    method = method_of(plans, description)
    terms, gradients, embedded = one_step(method, method, 0, 4, 4)
    for gather in (True, False):
        ranks = [torch.load(tmp_path / f"{gather}{i}.pt") for i in range(2)]
        if not gather:
            mean = sum(r[0]["inter"] for r in ranks) / 2
            assert abs(float(mean - terms["inter"])) > 1e-4
            continue
        for key, value in terms.items():
            if key != "feature_std":
                torch.testing.assert_close(ranks[0][0][key], ranks[1][0][key])
            torch.testing.assert_close(sum(r[0][key] for r in ranks) / 2, value, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(torch.cat([r[2] for r in ranks]), embedded, atol=1e-4, rtol=1e-3)
        for _, grads, _ in ranks:
            assert grads.keys() == gradients.keys()
            for key, value in gradients.items():
                torch.testing.assert_close(grads[key], value, atol=1e-5, rtol=1e-3)


# ---- learning --------------------------------------------------------------------------------------------------------


def overfit(plans, description, steps, arch_lr=3e-3, **options):
    """Four fixed volumes, a grid of 1x3x3; returns mean intra loss and top-1 of the last steps, and the method."""
    method = method_of(
        plans,
        description,
        stats=(6, 26, 26),
        mirror=0.0,
        rot90=0.0,
        intensity=0.0,
        **{"proj_dim": 64, "lr": arch_lr, **options},
    )
    assert method.grid == (1, 3, 3)
    crops, optimiser = crops_of(method, 4, seed=1), method.optimiser()
    crops.body[:] = True
    values = []
    for step in range(steps):
        batch = method.views(crops, StepRNG(0, step, 4))
        optimiser.zero_grad()
        terms = method(batch)
        terms["total"].backward()
        torch.nn.utils.clip_grad_norm_(method.parameters(), method.grad_clip)
        for group in optimiser.param_groups:
            group["lr"] = arch_lr * method.lr_factor(step, steps)
        optimiser.step()
        method.after_step(Progress(1, 1, 0, 1))
        values.append([float(terms["intra"].detach()), float(terms["top1"])])
    last = torch.tensor(values[-20:]).mean(0)
    return float(last[0]), float(last[1]), method


def test_overfits_four_volumes(tiny_plans, tiny_dataset_json):
    """(29) As below, shorter: clearly below what the best constant gives."""
    plans = tiny_plans(strides=FLAT, patch=(8, 24, 24), features=(8, 12, 16))
    intra, top1, method = overfit(plans, tiny_dataset_json(), 120, random_crops=6)
    assert intra < 0.75 * method.levels.constant and top1 > 0.4


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "steps"), [("plain", 260), ("resenc", 200)])
def test_overfits_four_volumes_on_both_networks(tiny_plans, tiny_dataset_json, arch, steps):
    """(29) Within 260 steps the intra loss is below half of the best constant's and the most similar cell mostly right.

    Dropping whole crops (B1) or normalising each row of raw pooled features (B3) does not get there. With 400 steps, B1 on the
    residual network ends between 0.35 and 0.67, by chance on either side of the bound; with 200 it ends above 0.47 (four seeds).
    """
    plans = tiny_plans(3, arch, strides=FLAT, patch=(8, 24, 24), features=(8, 16, 32))
    intra, top1, method = overfit(plans, tiny_dataset_json(), steps, random_crops=6)
    assert intra < min(0.3, 0.5 * method.levels.constant) and top1 > 0.6
    for bug in ({"drop_rows": True, "standardise": False}, {"proj_norm": "row", "standardise": False}):
        worse, _, method = overfit(plans, tiny_dataset_json(), steps, random_crops=6, **bug)
        assert worse > 0.6 * method.levels.constant, bug


# ---- the whole command -----------------------------------------------------------------------------------------------


class Stop(Exception):  # noqa: N818
    """A kill after the first save."""


class Interrupt(Hook):
    name = "interrupt"

    def start(self, engine):
        original = engine.save

        def save(*, final=False):
            original(final=final)
            raise Stop

        engine.save = save


def pretrain(**options):
    tiny = {"batch_size": 2, "proj_dim": 16, "random_crops": 2, "workers": 0, "held_out_batches": 1}
    given = {"method": "voco", "device": "cpu", "iterations": 2, "processes": 1, "robustness_every": 0}

    def go(epochs, name, **more):
        return run(901, epochs=epochs, name=name, options={**tiny, **options}, **given, **more)

    return go


PLAN = {"features": (4, 4, 4), "strides": FLAT, "patch": (8, 24, 16)}


def test_resume_is_exact(tiny_preprocessed, caplog):
    """2 + 2 steps, with a kill after the first save, equal 4: teacher, optimiser, crops and dropout."""
    tiny_preprocessed(901, "Tiny", 5, shape=(8, 28, 20), plan_options=PLAN)
    go = pretrain(picture_every=0)
    with caplog.at_level(logging.INFO, logger="nnssl"):
        whole = go(2, "whole")
    epochs = [r.getMessage() for r in caplog.records if r.getMessage().startswith("epoch ")]
    assert len(epochs) == 2 and all("position learnt: " in line for line in epochs)
    with pytest.raises(Stop):
        go(2, "parts", hooks=[Interrupt()])
    parts = run(901, name="parts", method="voco", device="cpu", continue_run=True, robustness_every=0)
    saved = [checkpoint.load(r.folder / "checkpoint_latest.pth") for r in (whole, parts)]
    a, b = ({**s.weights, **s.training["method"]} for s in saved)
    assert any(k.startswith("teacher.") for k in a)
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert math.isfinite(whole.metrics["total"]) and "position learnt" in whole.sentence


@pytest.mark.parametrize(("arch", "window"), [("plain", "window"), ("resenc", "volume")])
def test_encoder_goes_into_fresh_networks(tiny_preprocessed, arch, window):
    """(30) Strictly, with all aliases equal and the same outputs; nnU-Net's own function takes the whole checkpoint."""
    tiny_preprocessed(901, "Tiny", 5, shape=(8, 28, 20), plan_options=PLAN, arch=arch)
    result = pretrain(window=window)(1, "once")
    assert (result.folder / "views_epoch_0001.png").is_file()
    weights, plan = checkpoint.load(result.checkpoint).weights, load_plan(901)
    fresh = build_network(plan)
    encoder = {k.removeprefix("encoder."): v for k, v in weights.items() if k.startswith("encoder.")}
    fresh.encoder.load_state_dict(encoder, strict=True)
    state = fresh.state_dict()
    for name, canonical in alias_map(fresh).items():
        assert torch.equal(state[name], state[canonical])
    network = build_network(plan)
    load_pretrained_weights(network, str(result.checkpoint))
    x = torch.randn(1, 1, 8, 16, 16)
    for one, other in zip(fresh.encoder(x), network.encoder(x)):
        assert torch.equal(one, other)
