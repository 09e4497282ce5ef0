"""mae's runs: what nnU-Net gets, exact resume, two processes, and that it learns."""

import math
import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from nnunet_weights import loaded_by_nnunet
from torch import nn

from nnssl import checkpoint
from nnssl.config import make_config
from nnssl.networks import build_network, forward_features
from nnssl.plans import Plan
from nnssl.pretrain import run
from nnssl.pretrain.augment.rng import StepRNG
from nnssl.pretrain.methods import Crops, SourceStats, get_method

ISO = ((1, 1, 1), (2, 2, 2), (2, 2, 2))


def build(plans, description, values, dim=3):
    plan = Plan.from_dicts(plans, "3d_fullres" if dim == 3 else "2d", description)
    cls = get_method("mae")
    config = make_config(cls.Config, values)
    request = cls.crops(plan, SourceStats((30, 40, 35), 5), config)
    torch.manual_seed(0)
    return cls(build_network(plan), plan, request, config)


# ---------------------------------------------------------------------------------------------- runs


@pytest.mark.parametrize(("arch", "mode"), [("plain", "dense"), ("resenc", "sparse")])
def test_nnunet_loads_the_weights(make_mae, tmp_path, arch, mode, make_batch):
    method = make_mae("aniso", arch, masking=mode)
    keys = list(method.network.state_dict())
    batch = make_batch(method)
    optimiser = method.optimiser()
    method(batch)["total"].backward()
    optimiser.step()
    assert list(method.network.state_dict()) == keys == list(build_network(method.plan).state_dict())
    network = loaded_by_nnunet(method, tmp_path / "weights.pth")
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
def test_overfits_one_volume(make_mae, mode, make_crops):
    """200 steps on one smooth volume: hidden blocks are predicted far better than by the mean of what is around them."""
    options = {"optimiser": "adamw", "lr": 3e-3, "augment_p": 0, "mirror": False, "masking": mode, "block": "4,4,4"}
    method = make_mae("iso", "resenc", features=(8, 16, 16), **options)
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
