"""mae and glmae on Primus: tokens behind the mask are gone, counts are exact, what learns, and what is refused."""

import math
import os

import numpy as np
import pytest
import torch

from nnssl import checkpoint
from nnssl.config import make_config
from nnssl.errors import NnsslError
from nnssl.networks import build_network
from nnssl.plans import load_plan
from nnssl.pretrain import run
from nnssl.pretrain.augment.rng import StepRNG
from nnssl.pretrain.engine.hooks import Hook
from nnssl.pretrain.methods import Progress, SourceStats, get_method, list_methods
from nnssl.weights import check_loadable, write_variant

SMALL = {"prototypes": 32, "hidden": 16, "bottleneck": 8}
CASES = [((8, 12, 16), (4, 4, 4)), ((8, 8, 24), (2, 4, 8)), ((16, 8, 8), (4, 2, 4))]


@pytest.fixture
def make(primus_plan):
    """``make(name="mae", patch, token, channels, kind, crop, median, **options) -> method``."""

    def build(
        name="mae",
        patch=(8, 12, 16),
        token=(4, 4, 4),
        channels=1,
        kind="Primus",
        crop=None,
        median=(20, 30, 36),
        **values,
    ):
        plan = primus_plan(kind, patch, token, channels)
        cls = get_method(name)
        config = make_config(cls.Config, {**(SMALL if name == "glmae" else {}), **values})
        request = cls.crops(plan, SourceStats(median, 5), config, crop)
        torch.manual_seed(0)
        return cls(build_network(plan), plan, request, config)

    return build


@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.75, 0.9])
@pytest.mark.parametrize(("patch", "token"), CASES)
def test_exact_numbers_of_tokens(make, make_batch, patch, token, ratio):
    """The encoder's blocks get exactly the visible tokens, and no others."""
    method = make(patch=patch, token=token, mask_ratio=ratio, augment_p=0)
    assert method.request.size == patch and method.block == token
    batch, seen = make_batch(method), []
    method.network.eva.blocks[0].register_forward_pre_hook(lambda m, x: seen.append(x[0].shape[1]))
    method(batch)
    n = math.prod(p // t for p, t in zip(patch, token))
    hidden = min(max(round(ratio * n), 1), n - 1)
    assert (batch["mask"].flatten(1).sum(1) == hidden * math.prod(token)).all() and seen == [n - hidden]


def test_blocks_of_several_tokens_and_ratios_that_differ(make, make_batch):
    method = make(patch=(16, 16, 16), block="8,8,4", mask_spread=0.2)
    batch = make_batch(method, 6)
    assert method.block == (8, 8, 4)
    shares = batch["mask"].float().mean((1, 2, 3, 4))
    assert len(shares.unique()) > 1  # samples show different numbers of tokens
    terms = method(batch)
    alone = [method({k: v[i : i + 1] for k, v in batch.items()})["reconstruction"] for i in range(6)]
    region = (batch["mask"] & batch["valid"]).flatten(1).sum(1)
    wanted = sum(a * n for a, n in zip(alone, region)) / region.sum()
    torch.testing.assert_close(terms["reconstruction"], wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("kind", "patch", "token"),
    [*(("Primus", *case) for case in CASES), *((f"PrimusV{v}", (8, 16, 24), (8, 8, 8)) for v in (2, 3))],
)
def test_nothing_leaks(make, make_batch, gradients, kind, patch, token):
    """Whatever stands behind the mask: prediction and every gradient are the same bits. What is visible does matter."""
    method = make(patch=patch, token=token, channels=2, kind=kind)
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


def test_convolutional_stems_would_leak_without_being_emptied(make, make_batch):
    """Why the input is emptied although tokens are dropped: PrimusV2 mixes voxels before there are tokens."""
    method = make(patch=(16, 16, 24), token=(8, 8, 8), kind="PrimusV2")
    from nnssl.networks import PrimusEncoder

    batch, encoder = make_batch(method), PrimusEncoder(method.network)
    visible = ~batch["mask"][:, :, ::8, ::8, ::8]
    with torch.no_grad():
        a = encoder(batch["input"], visible)[0]
        b = encoder(torch.where(batch["mask"], 50.0, batch["input"]), visible)[0]
    assert (a - b).abs().max() > 0.1


@pytest.mark.parametrize("name", ["mae", "glmae"])
def test_what_learns_and_what_does_not(make, make_batch, gradients, name):
    method = make(name)
    terms, grads = gradients(method, make_batch(method))
    for key, p in method.named_parameters():
        assert (key in grads) == p.requires_grad, key
        still = key.startswith(("network.up_projection", "agreement.teacher_"))
        assert p.requires_grad != still, key
    assert all(torch.isfinite(g).all() for g in grads.values()) and torch.isfinite(terms["total"])
    assert method.pretrained_parts() == {"encoder": True, "decoder_stages": []} and method.grad_clip == 1.0


def test_the_recipe_of_a_primus(make):
    method = make(warmup=0.1)
    adam = method.optimiser()
    assert isinstance(adam, torch.optim.AdamW) and adam.defaults["betas"] == (0.9, 0.98)
    assert [g["weight_decay"] for g in adam.param_groups] == [0.05, 0.0] and adam.param_groups[0]["lr"] == 3e-4
    names = {id(p): n for n, p in method.named_parameters()}
    held = [{names[id(p)] for p in g["params"]} for g in adam.param_groups]
    assert {"network.eva.pos_embed", "head.eva.pos_embed", "head.mask_token"} <= held[1]
    assert "network.down_projection.proj.weight" in held[0]
    assert [method.lr_factor(k, 100) for k in (0, 9, 10)] == pytest.approx([0.1, 1.0, 1.0])
    assert method.lr_factor(55, 100) == pytest.approx(0.5**0.9)
    assert isinstance(make(optimiser="sgd").optimiser(), torch.optim.SGD) and make(optimiser="sgd").lr_factor(0, 9) == 1


def test_what_does_not_fit_is_refused(make, primus_plan):
    for values in ({"masking": "sparse"}, {"fill": "learned"}, {"per_channel": True}):
        with pytest.raises(NnsslError, match="tokens of all channels that are left out"):
            make(**values)
    with pytest.raises(NnsslError, match="whole tokens of 4x4x4"):
        make(block="2,4,4")
    with pytest.raises(NnsslError, match="--crop 8x8x8: a Primus has a learned code for each place"):
        make(crop=(8, 8, 8))
    assert make(crop=(8, 12, 16)).request.size == (8, 12, 16)
    with pytest.raises(NnsslError, match="views=B.*no positions"):
        make("glmae", views="B")
    for name, cls in list_methods().items():
        if name not in ("mae", "glmae"):
            with pytest.raises(NnsslError, match=f"{name} looks at the stages of a U-Net.*-m mae or -m glmae"):
                cls.check_network(primus_plan())
        else:
            cls.check_network(primus_plan())


def test_small_images_are_padded_and_padding_is_visible_but_does_not_count(make, make_crops):
    method = make(augment_p=0, mirror=False, median=(6, 30, 36))
    crops = make_crops(method, 4)
    crops.data[:2, :, 4:] = 0  # of half of the samples the second layer of tokens is padding
    batch = method.views(crops, StepRNG(0, 0, 4))
    padding = ~batch["valid"]
    assert padding.any() and not (batch["mask"] & padding).any()
    counts = batch["mask"].flatten(1).sum(1) // 64
    assert counts.tolist() == [9, 9, 18, 18]
    terms = method(batch)
    assert torch.isfinite(terms["total"]) and terms["skipped"] == 0


def test_views_of_glmae_have_the_patch(make, make_batch):
    method = make("glmae", global_views=2, local_views=3)
    batch, seen = make_batch(method), []
    method.agreement.teacher_encoder.module.register_forward_pre_hook(lambda m, x: seen.append(x[0]))
    assert method.local_size == method.request.size == (8, 12, 16) and method.request.read_size == (20, 30, 36)
    assert batch["global"]["zoom"].min() > 1.2
    terms = method(batch)
    assert len(seen) == 1 and torch.equal(seen[0], batch["global"]["target"])  # whole, and never a local view
    assert {"gg", "lg", "global_reconstruction", "local_reconstruction", "zoom"} <= set(terms)
    method.eval()
    with torch.no_grad():
        assert {"retrieval", "retrieval_chance"} <= set(method(batch))
        assert method.embed(batch).shape == (6, 8)
        columns = method.pictures(batch).columns
    assert len(columns) == 8 and all(np.isfinite(c).all() for c in columns.values())


@pytest.mark.parametrize("form", ["ce", "cosine"])
def test_nothing_leaks_into_the_student_of_glmae(make, make_batch, gradients, form):
    method = make("glmae", ramp=0.0, consistency=form)
    state = {k: v.clone() for k, v in method.state_dict().items()}
    batch = make_batch(method)
    whole, agree = batch["global"]["input"], method.agreement.forward
    method.agreement.forward = lambda features, seen: agree(features, whole)
    terms, grads = gradients(method, batch)
    for value in (50 * torch.randn(()), torch.inf, torch.nan):
        method.load_state_dict(state)
        hidden = {k: {**v, "input": torch.where(v["mask"], value, v["input"])} for k, v in batch.items()}
        other, others = gradients(method, hidden)
        assert all(torch.equal(other[k], terms[k]) for k in ("total", "gg", "lg"))
        assert others.keys() == grads.keys() and all(torch.equal(others[k], grads[k]) for k in grads)


def test_the_teacher_follows_the_tokens_encoder(make, make_batch):
    method = make("glmae")
    optimiser, batch = method.optimiser(), make_batch(method)
    before = {n: p.clone() for n, p in method.agreement.teacher_encoder.module.named_parameters()}
    method(batch)["total"].backward()
    optimiser.step()
    method.after_step(Progress(1, 10, 0, 1))
    from nnssl.ema import cosine_momentum

    mu, student = cosine_momentum(1, 10), dict(method.network.named_parameters())
    for name, p in method.agreement.teacher_encoder.module.named_parameters():
        torch.testing.assert_close(p, mu * before[name] + (1 - mu) * student[name], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", ["mae", "glmae"])
def test_nnunet_will_load_it(make, make_batch, name):
    method = make(name)
    optimiser = method.optimiser()
    method(make_batch(method))["total"].backward()
    optimiser.step()
    payload = checkpoint.build_payload(
        method.network,
        method.plan,
        method=name,
        config={},
        crop_size=method.request.size,
        pretrained_parts=method.pretrained_parts(),
        data={},
    )
    report = check_loadable(payload, method.plan)
    assert report.part("encoder").percent == 100 and report.part("up_projection").loaded == 0


@pytest.mark.slow
def test_overfits_one_volume(make, make_crops):
    """On one smooth volume hidden tokens come to be predicted better than by the mean of what is around them."""
    method = make(patch=(16, 16, 16), augment_p=0, mirror=False, lr=3e-3, mask_ratio=0.5, warmup=0.0)
    crops, optimiser = make_crops(method, 2), method.optimiser()
    for step in range(300):
        optimiser.zero_grad()
        method(method.views(crops, StepRNG(0, step, 2)))["total"].backward()
        torch.nn.utils.clip_grad_norm_(method.parameters(), method.grad_clip)
        optimiser.step()
    method.eval()
    with torch.no_grad():
        terms = method(method.views(crops, StepRNG(0, 10**6, 2)))
    assert terms["reconstruction"] < 0.5 * terms["surround"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mae", "glmae"])
def test_resume_is_exact(tiny_preprocessed, nnunet_env, name):
    """Two epochs equal one epoch, a stop and another, bit for bit, although paths are dropped at random; by the whole engine."""

    class Stop(Hook):
        name = "stop"

        def after_epoch(self, engine, row):
            os.kill(os.getpid(), 15)

    tiny_preprocessed(901, "Tiny", 6, plan_options={"patch": (16, 24, 16)})
    write_variant(load_plan(901), "primus", network="primus:24,2,2")
    options = {"workers": 0, "batch_size": 2, "held_out_batches": 1, **(SMALL if name == "glmae" else {})}
    where = {"method": name, "device": "cpu", "plans": "nnUNetPlans_primus"}
    common = {**where, "epochs": 2, "iterations": 2, "options": options}
    straight = run(901, name="straight", **common)
    assert not run(901, name="halves", hooks=[Stop()], **common).finished
    halves = run(901, name="halves", continue_run=True, **where)
    assert straight.finished and halves.finished
    a, b = (checkpoint.load(r.checkpoint).weights for r in (straight, halves))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert (straight.folder / "views_epoch_0002.png").stat().st_size > 5000
    with pytest.raises(NnsslError, match="macl looks at the stages of a U-Net"):
        run(901, **{**common, "method": "macl", "options": {}})
