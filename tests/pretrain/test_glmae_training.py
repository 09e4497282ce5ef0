"""glmae's runs: what nnU-Net gets, exact resume, two processes, and that local views come to find their volume."""

import math
import os
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from nnunet_weights import loaded_by_nnunet
from torch import nn

from nnssl import checkpoint
from nnssl.config import make_config
from nnssl.networks import build_network, unwrap
from nnssl.plans import Plan
from nnssl.pretrain import run
from nnssl.pretrain.augment.rng import StepRNG
from nnssl.pretrain.engine.hooks import Hook
from nnssl.pretrain.methods import Crops, Progress, SourceStats, get_method

ISO = ((1, 1, 1), (2, 2, 2), (2, 2, 2))
SMALL = {"prototypes": 32, "hidden": 16, "bottleneck": 8}
MEDIAN = (20, 40, 35)


def build(plans, description, values, median=MEDIAN, crop=None, dim=3):
    plan = Plan.from_dicts(plans, "3d_fullres" if dim == 3 else "2d", description)
    cls = get_method("glmae")
    config = make_config(cls.Config, {**SMALL, **values})
    request = cls.crops(plan, SourceStats(median, 5), config, crop)
    torch.manual_seed(0)
    return cls(build_network(plan), plan, request, config)


def train(method, batches):
    optimiser = method.optimiser()
    for step, batch in enumerate(batches):
        optimiser.zero_grad(set_to_none=True)
        method(batch)["total"].backward()
        nn.utils.clip_grad_norm_(method.parameters(), method.grad_clip)
        optimiser.step()
        method.after_step(Progress(step + 1, len(batches), 0, 1))
    return method


# ---------------------------------------------------------------------------------------------- runs


def test_nnunet_gets_the_student(make_glmae, tmp_path, make_batch):
    method = make_glmae("aniso", "resenc")
    train(method, [make_batch(method, step=k) for k in range(2)])
    network = loaded_by_nnunet(method, tmp_path / "weights.pth")
    x = torch.randn(1, 1, *method.request.size)
    for a, b in zip(network.encoder(x), unwrap(method.network).encoder(x)):
        assert torch.equal(a, b)
    assert not torch.equal(network.encoder(x)[-1], method.agreement.teacher_encoder(x)[-1])


@pytest.mark.slow
def test_resume_is_exact(tiny_preprocessed, nnunet_env):
    """Two epochs equal one epoch, a stop and another, bit for bit: teacher, centre, moments and ramp are all kept."""

    class Stop(Hook):
        name = "stop"

        def after_epoch(self, engine, row):
            os.kill(os.getpid(), 15)

    tiny_preprocessed(901, "Tiny", 6, plan_options={"features": (4, 4, 6), "patch": (8, 8, 8)})
    options = {"workers": 0, "batch_size": 2, "held_out_batches": 1, **SMALL}
    common = {"method": "glmae", "device": "cpu", "epochs": 2, "iterations": 2, "options": options}
    straight = run(901, name="straight", **common)
    assert not run(901, name="halves", hooks=[Stop()], **common).finished
    halves = run(901, method="glmae", device="cpu", name="halves", continue_run=True)
    assert straight.finished and halves.finished
    a, b = (checkpoint.load(r.checkpoint).weights for r in (straight, halves))
    assert all(torch.equal(a[k], b[k]) for k in a)
    a, b = (checkpoint.load(r.folder / "checkpoint_latest.pth").training["method"] for r in (straight, halves))
    assert a.keys() == b.keys() and {"agreement.centre.value", "agreement.moments.teacher.mean", "weight"} <= set(a)
    assert all(torch.equal(a[k], b[k]) for k in a if k != "balance")
    assert "retrieval" in straight.metrics


def _worker(index, port, folder, arguments, crops):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=index, world_size=2)
    method = build(*arguments)
    wrapped = nn.parallel.DistributedDataParallel(method)
    crops = Crops(**{k: v[2 * index : 2 * index + 2] for k, v in vars(crops).items() if v is not None})
    terms = wrapped(method.views(crops, StepRNG(0, 0, 4, 2 * index, 2)))
    terms["total"].backward()
    grads = {k: p.grad for k, p in method.named_parameters() if p.grad is not None}
    method.after_step(Progress(1, 10, 0, 1))
    torch.save(
        ({k: v.detach() for k, v in terms.items()}, grads, method.agreement.centre.value), f"{folder}/{index}.pt"
    )
    dist.destroy_process_group()


def test_two_processes_equal_one(tmp_path, tiny_plans, tiny_dataset_json, make_crops, gradients):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    plans = tiny_plans(strides=ISO, patch=(8, 12, 16), features=(4, 4, 6))
    arguments = (plans, tiny_dataset_json(), {"ramp": 0.0})
    method = build(*arguments)
    crops = make_crops(method, 4)
    mp.spawn(_worker, args=(port, str(tmp_path), arguments, crops), nprocs=2)
    with torch.no_grad():
        batch = method.views(crops, StepRNG(0, 0, 4))
    terms, grads = gradients(method, batch)
    method.after_step(Progress(1, 10, 0, 1))
    ranks = [torch.load(tmp_path / f"{i}.pt") for i in range(2)]
    for key in (
        "total",
        "gg",
        "lg",
        "koleo",
        "global_reconstruction",
        "teacher_entropy",
        "mean_entropy",
        "embedding_spread",
    ):
        mean = sum(r[0][key] for r in ranks) / 2
        torch.testing.assert_close(mean, terms[key].detach(), atol=1e-5, rtol=1e-4, msg=key)
    largest = max(float(g.abs().max()) for g in grads.values())
    for _, theirs, centre in ranks:
        torch.testing.assert_close(centre, method.agreement.centre.value, atol=1e-6, rtol=1e-4)
        for key, grad in grads.items():
            torch.testing.assert_close(theirs[key], grad, atol=1e-4 * largest, rtol=1e-3, msg=key)


@pytest.mark.slow
def test_local_views_find_their_volume(tiny_plans, tiny_dataset_json, make_crops):
    """Volumes of distinct texture: on new volumes a local view finds the global view of its own well above chance."""
    plans = tiny_plans(strides=ISO, patch=(16, 16, 16), features=(8, 16, 16))
    weights = {"lg_weight": 1.0, "gg_weight": 1.0, "ramp": 0.0, "lr": 1e-3, "mask_ratio": 0.5}
    teacher = {"prototypes": 64, "hidden": 128, "bottleneck": 64, "teacher_momentum": 0.99, "centre_momentum": 0.9}
    method = build(plans, tiny_dataset_json(), {**weights, **teacher}, median=(32, 32, 32))
    window = method.request.read_size

    def volumes(seed):
        g, made = torch.Generator().manual_seed(seed), []
        for i in range(8):  # bright or dark, small or large, few or many blobs
            cell, density = (2, 4)[i // 2 % 2], (0.02, 0.1)[i // 4]
            blobs = (torch.rand(1, 1, *[w // cell for w in window], generator=g) < density).float()
            blobs.view(-1)[0] = 1
            x = F.interpolate(blobs, size=window, mode="trilinear")[0] + 0.05 * torch.randn(window, generator=g)
            made.append((x - x.mean()) / x.std() * (1 if i % 2 else -1))
        crops = make_crops(method, 8)
        crops.data, crops.body = torch.stack(made), torch.ones_like(crops.body)
        return crops

    optimiser, found = method.optimiser(), []
    for step in range(120):
        with torch.no_grad():
            batch = method.views(volumes(step % 16), StepRNG(0, step, 8))
        optimiser.zero_grad(set_to_none=True)
        method(batch)["total"].backward()
        nn.utils.clip_grad_norm_(method.parameters(), method.grad_clip)
        optimiser.param_groups[0]["lr"] = 1e-3 * min(1, (step + 1) / 20)
        optimiser.step()
        method.after_step(Progress(step + 1, 120, 0, 1))
    method.eval()
    with torch.no_grad():
        for k in range(12):
            terms = method(method.views(volumes(100 + k), StepRNG(0, 1000 + k, 8)))
            found.append(terms["retrieval"].item())
    assert terms["retrieval_chance"].item() == pytest.approx(1 / 8)
    assert sum(found) / len(found) > 0.21  # 192 views: 3.5 standard errors above chance
    assert terms["embedding_spread"] > 0.2 and terms["teacher_entropy"] < 0.9 * terms["mean_entropy"]
    assert terms["gg"] < 0.95 * math.log(64)
