"""glmae: what each network sees, in which order things move, and that the arms are what they say."""

import logging
import math
import os
import socket

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import nn

from nnssl import checkpoint
from nnssl.config import make_config
from nnssl.ema import cosine_momentum
from nnssl.errors import NnsslError
from nnssl.networks import build_network, unwrap
from nnssl.plans import Plan
from nnssl.pretrain import run
from nnssl.pretrain.augment.rng import StepRNG
from nnssl.pretrain.engine.hooks import Hook
from nnssl.pretrain.methods import Crops, Progress, SourceStats, get_method

ISO = ((1, 1, 1), (2, 2, 2), (2, 2, 2))
ANISO = ((1, 1, 1), (1, 2, 2), (2, 2, 2))
GEOMETRIES = {"iso": (ISO, (8, 12, 16)), "aniso": (ANISO, (4, 16, 12))}
CASES = [("iso", "plain", 3), ("aniso", "resenc", 3), ("iso", "resenc", 2)]
SMALL = {"prototypes": 32, "hidden": 16, "bottleneck": 8}
MEDIAN = (20, 40, 35)


def build(plans, description, values, median=MEDIAN, crop=None, dim=3):
    plan = Plan.from_dicts(plans, "3d_fullres" if dim == 3 else "2d", description)
    cls = get_method("glmae")
    config = make_config(cls.Config, {**SMALL, **values})
    request = cls.crops(plan, SourceStats(median, 5), config, crop)
    torch.manual_seed(0)
    return cls(build_network(plan), plan, request, config)


@pytest.fixture
def make(tiny_plans, tiny_dataset_json):
    """``make(geometry, arch, dim, channels, features, median, crop, **options) -> method``."""

    def made(geometry="iso", arch="plain", dim=3, channels=1, features=(4, 6, 8), median=MEDIAN, crop=None, **options):
        strides, size = GEOMETRIES[geometry]
        plans = tiny_plans(dim, arch, channels, strides=strides, patch=size, features=features)
        return build(plans, tiny_dataset_json(channels), options, median, crop, dim)

    return made


def train(method, batches):
    optimiser = method.optimiser()
    for step, batch in enumerate(batches):
        optimiser.zero_grad(set_to_none=True)
        method(batch)["total"].backward()
        nn.utils.clip_grad_norm_(method.parameters(), method.grad_clip)
        optimiser.step()
        method.after_step(Progress(step + 1, len(batches), 0, 1))
    return method


# ---------------------------------------------------------------------------------------------- crops and views


@pytest.mark.parametrize(("geometry", "arch", "dim"), CASES)
@pytest.mark.parametrize("mode", ["A", "B"])
def test_shapes_of_the_views(make, geometry, arch, dim, mode, make_batch):
    method = make(geometry, arch, dim, 2, views=mode, global_views=2, local_views=3)
    size = method.request.size
    stride = method.plan.total_stride
    batch = make_batch(method)
    assert batch["global"]["target"].shape == (6, 2, *size) and batch["local"]["target"].shape == (
        9,
        2,
        *method.local_size,
    )
    expected = size if mode == "A" else tuple(min(n, math.ceil(0.6 * n / s) * s) for n, s in zip(size, stride))
    assert method.local_size == expected
    assert (batch["global"]["zoom"] > 1).all() and (batch["local"]["zoom"] == 1).all()
    for view in batch.values():
        assert view["mask"].shape == view["valid"].shape == (len(view["target"]), 1, *view["target"].shape[2:])
        blocks = math.prod(n // b for n, b in zip(view["mask"].shape[2:], method.block))
        counts = view["mask"].flatten(1).sum(1)[view["valid"].flatten(1).all(1)]
        assert (counts == min(max(round(0.75 * blocks), 1), blocks - 1) * math.prod(method.block)).all()
    assert not torch.equal(batch["local"]["target"][:3], batch["local"]["target"][3:6])
    again = make_batch(method)
    assert all(torch.equal(batch[k][x], again[k][x]) for k in batch for x in batch[k])


def test_crop_and_mode_follow_the_volume(make, make_batch):
    wide = make()  # patch 8x12x16 in a volume of 20x40x35
    assert (
        wide.request.size == (8, 12, 16) and wide.request.read_size == (20, 30, 35) and wide.local_size == (8, 12, 16)
    )
    tight = make(median=(8, 12, 16))
    assert tight.request.size == (4, 8, 8) and tight.local_size == (4, 8, 8)  # two thirds leave room for wider views
    narrow = make(median=(9, 13, 17), crop=(8, 12, 16))
    assert narrow.local_size == (8, 8, 12) and "0.6" not in narrow.request.explanation
    assert make(median=(9, 13, 17), crop=(8, 12, 16), views="A").local_size == (8, 12, 16)
    thin = make(median=(4, 40, 35), crop=(4, 12, 16))
    zoomed = make_batch(thin, 20)["global"]["zoom"]
    assert thin.request.read_size == (4, 30, 35) and zoomed.min() > 1.2  # no wider in z, but in the plane


def test_the_body_is_read_where_views_should_show_it_or_the_error_counts_there(make):
    assert make().request.body and make(body_share=0.0, region="body").request.body
    assert not make(body_share=0.0).request.body


def test_small_images_are_padded_dark_and_not_counted(make, make_crops):
    method = make(median=MEDIAN)
    crops = make_crops(method)
    crops.data[:, :, 6:] = 0  # six slices are left of a crop of eight
    batch = method.views(crops, StepRNG(0, 0, 3))
    for view in batch.values():
        outside = ~view["valid"]
        assert outside.any() and not (view["mask"] & outside).all()
        whole_slices = outside.flatten(3).all(3)
        assert torch.equal(whole_slices.squeeze(1).sum(1), torch.full((len(outside),), 2))
        dark = view["target"][whole_slices[..., None, None].expand_as(view["target"])]
        torch.testing.assert_close(dark, torch.full_like(dark, -2.0))


@pytest.mark.parametrize("image", [(20, 12, 9), (8, 30, 16), (5, 12, 35), (20, 30, 35)])
@pytest.mark.parametrize("mode", ["A", "B"])
def test_views_of_larger_equal_and_smaller_volumes(make, make_crops, image, mode):
    """Whatever the volume has on an axis: views have their shape, are no wider than it, and know what lies outside."""
    method = make(views=mode)
    crops = make_crops(method, 4)
    for axis, (n, w) in enumerate(zip(image, method.request.read_size), start=2):
        assert n <= w
        crops.data.narrow(axis, n, w - n).zero_()
    batch = method.views(crops, StepRNG(0, 0, 4))
    for kind, size in (("global", method.request.size), ("local", method.local_size)):
        view = batch[kind]
        assert view["target"].shape[2:] == size
        inside = math.prod(min(n, s) for n, s in zip(image, size))
        assert (view["valid"].flatten(1).sum(1) == inside).all()
        wider = [min(2.5, max(1.0, n / s)) for n, s in zip(image, method.request.size)]
        assert view["zoom"].max() <= (sum(wider) / 3 if kind == "global" else 1) + 1e-5


@pytest.mark.parametrize("mirror", [False, True])
def test_views_show_the_volume(make, mirror, make_crops):
    method = make(mirror=mirror)
    crops = make_crops(method, 2)
    ramp = torch.arange(crops.data.shape[3]).float() + 1
    crops.data[:] = ramp.view(1, 1, 1, -1, 1)
    batch = method.views(crops, StepRNG(0, 0, 2))
    for kind, least in (("global", 1.4), ("local", 1.0)):
        steps = batch[kind]["target"].diff(dim=3)
        slope = steps.abs().mean((1, 2, 3, 4))
        assert (slope >= least - 1e-3).all() and (slope <= 2.51).all()
        assert (steps > 0).all() or mirror
        assert batch[kind]["valid"].all()


def test_options_that_make_no_sense(make):
    with pytest.raises(NnsslError, match="nothing would be learnt"):
        make(global_views=0, local_views=0)
    with pytest.raises(NnsslError, match="min_zoom"):
        make(min_zoom=2.0, max_zoom=1.5)
    with pytest.raises(NnsslError, match="decoder"):
        make(local_weight=0.0, global_weight=0.0)
    with pytest.raises(NnsslError, match="sparse"):
        make(masking="sparse", fill="learned")
    with pytest.raises(NnsslError, match="block="):
        make(block="3,3,3")


# ---------------------------------------------------------------------------------------------- loss


@pytest.mark.parametrize(("geometry", "arch", "dim"), CASES)
@pytest.mark.parametrize("mode", ["dense", "sparse"])
def test_nothing_leaks_into_the_student(make, geometry, arch, dim, mode, make_batch, gradients):
    """Whatever stands behind the masks of the student: its loss terms and all gradients are the same bits."""
    method = make(geometry, arch, dim, masking=mode, ramp=0.0)
    state = {k: v.clone() for k, v in method.state_dict().items()}
    batch = make_batch(method)
    whole = batch["global"]["input"]
    teacher = method.agreement.forward
    method.agreement.forward = lambda features, seen: teacher(features, whole)  # the teacher keeps its whole views
    terms, grads = gradients(method, batch)
    for value in (50 * torch.randn(()), torch.inf, torch.nan):
        method.load_state_dict(state)
        hidden = {k: {**v, "input": torch.where(v["mask"], value, v["input"])} for k, v in batch.items()}
        other, others = gradients(method, hidden)
        for key in ("total", "gg", "lg", "koleo", "global_reconstruction", "local_reconstruction"):
            assert torch.equal(other[key], terms[key]), key
        assert others.keys() == grads.keys() and all(torch.equal(others[k], grads[k]) for k in grads)


def test_the_teacher_sees_whole_global_views_only(make, make_batch, gradients):
    method = make(global_views=2, views="B")
    batch = make_batch(method)
    seen = []
    method.agreement.teacher_encoder.module.register_forward_pre_hook(lambda m, x: seen.append(x[0]))
    student = []
    unwrap(method.network).encoder.register_forward_pre_hook(lambda m, x: student.append(x[0]))
    terms, grads = gradients(method, batch)
    assert len(seen) == 1 and torch.equal(seen[0], batch["global"]["target"])
    assert len(student) == 2
    for x, kind in zip(student, ("global", "local")):
        hidden = batch[kind]["mask"].expand_as(x)
        assert (x[hidden] == 0).all() and torch.equal(x[~hidden], batch[kind]["target"][~hidden])
    teacher = [p for n, p in method.named_parameters() if n.startswith("agreement.teacher_")]
    assert teacher and all(p.grad is None and not p.requires_grad for p in teacher)
    optimised = {id(p) for g in method.optimiser().param_groups for p in g["params"]}
    assert not optimised & {id(p) for p in teacher}
    assert not any(
        m.training for n in ("teacher_encoder", "teacher_projector") for m in getattr(method.agreement, n).modules()
    )
    for name, p in method.named_parameters():
        assert (name in grads) == p.requires_grad and ("seg_layers" not in name or not p.requires_grad), name


def test_order_of_one_step(make, make_batch):
    """The loss uses the old centre; teacher, centre and ramp move afterwards, and not where a step is skipped."""
    method = make(ramp=0.5)
    optimiser, batch = method.optimiser(), make_batch(method)
    before = [p.clone() for p in method.agreement.teacher_encoder.parameters()]
    method(batch)["total"].backward()
    assert (method.agreement.centre.value == 0).all() and method.weight == 0
    optimiser.step()
    assert all(torch.equal(a, b) for a, b in zip(before, method.agreement.teacher_encoder.parameters()))
    method.after_step(Progress(1, 10, 0, 1))
    mu = cosine_momentum(1, 10)
    for old, new, s in zip(
        before, method.agreement.teacher_encoder.parameters(), unwrap(method.network).encoder.parameters()
    ):
        torch.testing.assert_close(new, mu * old + (1 - mu) * s)
    assert (method.agreement.centre.value != 0).any() and method.weight == pytest.approx(0.2)
    centre = method.agreement.centre.value.clone()
    with torch.no_grad():
        method.eval()(batch)
    method.train()
    assert torch.equal(method.agreement.centre.value, centre)
    method.after_step(Progress(5, 10, 0, 1))
    assert method.weight == 1 and torch.equal(method.agreement.centre.value, centre)  # nothing observed in between


def test_without_weight_it_is_plain_masked_reconstruction(make, make_batch, gradients):
    plain, full = make(gg_weight=0.0, lg_weight=0.0), make(ramp=1.0)  # at step 0 the ramp is 0
    assert not hasattr(plain, "agreement")
    full.network.load_state_dict(plain.network.state_dict())
    full.head.load_state_dict(plain.head.state_dict())
    batch = make_batch(plain)
    a, b = gradients(plain, batch)[1], gradients(full, batch)[1]
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert all((v == 0).all() for k, v in b.items() if k.startswith("agreement"))
    mae = get_method("mae")
    alone = mae(plain.network, plain.plan, plain.request, make_config(mae.Config, {}))
    alone.head.load_state_dict(plain.head.state_dict())
    terms = plain(batch)
    for kind in ("global", "local"):
        torch.testing.assert_close(alone(batch[kind])["total"], terms[f"{kind}_reconstruction"])
    torch.testing.assert_close(terms["total"], terms["global_reconstruction"] + terms["local_reconstruction"])


def test_local_views_in_any_order(make, make_batch):
    method = make(local_views=3).eval()
    batch = make_batch(method)
    order = torch.tensor([6, 7, 8, 0, 1, 2, 3, 4, 5])
    with torch.no_grad():
        a = method(batch)
        b = method({**batch, "local": {k: v[order] for k, v in batch["local"].items()}})
    for key in ("total", "gg", "lg"):
        torch.testing.assert_close(a[key], b[key])


@pytest.mark.parametrize(("p", "q"), [(1, 0), (2, 0), (2, 1), (0, 2)])
def test_any_number_of_views(make, p, q, make_batch, gradients):
    method = make(global_views=p, local_views=q)
    terms, grads = gradients(method, make_batch(method))
    assert ("gg" in terms) == (p > 0) and ("lg" in terms) == (p > 0 and q > 0)
    assert torch.isfinite(terms["total"]) and all(torch.isfinite(g).all() for g in grads.values())
    for name, parameter in method.named_parameters():
        assert (name in grads) == parameter.requires_grad, name


@pytest.mark.parametrize("preset", list(get_method("glmae").presets))
def test_presets_are_the_arms(make, preset, make_batch, gradients):
    values = get_method("glmae").presets[preset]
    method = make(**values)
    terms, _ = gradients(method, make_batch(method))
    there = {"arm_a": "local", "arm_b": "global local", "arm_c": "global local gg"}.get(
        preset, "global local gg lg"
    ).split()
    assert ("local_reconstruction" in terms) and ("global_reconstruction" in terms) == ("global" in there)
    assert method.consistent == ("gg" in there)
    assert (method.config.lg_weight > 0) == ("lg" in there)
    assert method.pretrained_parts() == {"encoder": True, "decoder_stages": [0, 1]}


def test_terms_of_an_untrained_network(make, make_batch):
    method = make(ramp=0.0, prototypes=64)
    nn.init.zeros_(method.agreement.projector.prototypes)
    terms = method(make_batch(method))
    assert terms["gg"].item() == pytest.approx(math.log(64), rel=1e-4)
    assert 0 < terms["teacher_entropy"] <= math.log(64) + 1e-5
    method = make(ramp=0.0)
    terms = method(make_batch(method))
    assert terms["gradient_ratio"] > 0 and math.isfinite(terms["gradient_ratio"])
    assert terms["mean_entropy"] >= terms["teacher_entropy"] - 1e-5
    assert "retrieval" not in terms


@pytest.mark.parametrize("form", ["cosine", "mse"])
def test_agreement_without_prototypes(make, make_batch, gradients, form):
    """A predictor on the student's side alone, a variance term, no centre; the teacher learns nothing."""
    method = make(consistency=form, ramp=0.0, global_views=2, variance_weight=0.3)
    batch = make_batch(method)
    terms, grads = gradients(method, batch)
    assert {"gg", "lg", "variance"} <= set(terms) and "teacher_entropy" not in terms
    rec = terms["global_reconstruction"] + terms["local_reconstruction"]
    agreed = 0.1 * terms["gg"] + 0.1 * terms["lg"] + 0.3 * terms["variance"]
    torch.testing.assert_close(terms["total"], rec + agreed)
    for name, p in method.named_parameters():
        assert (name in grads) == p.requires_grad and (".teacher_" not in name or not p.requires_grad), name
    assert any(n.startswith("agreement.predictor") for n in grads) and not hasattr(method.agreement, "centre")
    method.after_step(Progress(1, 10, 0, 1))
    with torch.no_grad():
        last = {k: float(v) for k, v in method.eval()(batch).items()}
    assert "retrieval" in last and "Consistency" not in method.verdict(last, {**last, "embedding_spread": 0.8})[1]
    assert "collapse" in method.verdict(last, {**last, "embedding_spread": 0.01})[1]
    with pytest.raises(NnsslError, match="variance_weight"):
        make(consistency=form, variance_weight=0.0)
    assert not make(consistency=form, variance_weight=0.0, gg_weight=0.0, lg_weight=0.0).consistent


def test_images_are_kept_apart(make, make_batch, gradients):
    """The total counts koleo by its weight and the ramp, and without weight there is no such term."""
    method = make(ramp=0.0, koleo_weight=0.5)
    terms, grads = gradients(method, make_batch(method))
    rec = terms["global_reconstruction"] + terms["local_reconstruction"]
    agreed = 0.1 * terms["gg"] + 0.1 * terms["lg"] + 0.5 * terms["koleo"]
    torch.testing.assert_close(terms["total"], rec + agreed)
    assert any(n.startswith("agreement.projector") for n in grads)
    assert "koleo" not in make(ramp=0.0, koleo_weight=0.0)(make_batch(method))


def test_retrieval_knows_that_two_crops_may_be_of_one_case(make, make_crops):
    method = make().eval()
    crops = make_crops(method, 4)
    crops.case[:] = ["a", "b", "a", "a"]
    with torch.no_grad():
        batch = method.views(crops, StepRNG(0, 0, 4))
        terms = method(batch)
    a, b = batch["global"]["volume"][:2]
    assert batch["global"]["volume"].tolist() == [a, b, a, a] and a != b
    assert batch["local"]["volume"].tolist() == [a, b, a, a] * 2
    assert terms["retrieval_chance"].item() == pytest.approx((3 * 3 / 4 + 1 / 4) / 4)


@pytest.mark.parametrize(
    ("trouble", "options"),
    [
        ("collapse", {}),
        ("plateau: the teacher's targets are the same", {"standardise": False}),
        ("plateau: the teacher's targets are uniform", {"teacher_temperature": 10.0}),
    ],
)
def test_alarm_in_training(make, make_batch, caplog, trouble, options):
    """Trouble that is really there is named by what training itself measures."""
    method = make(ramp=0.0, **options)
    if trouble == "collapse":
        nn.init.zeros_(method.agreement.projector.mlp[-1].weight)
        nn.init.ones_(method.agreement.projector.mlp[-1].bias)
    with caplog.at_level(logging.WARNING, "nnssl"):
        for k in range(2):
            method(make_batch(method, 6, step=k))["total"].backward()
            method.after_step(Progress(50 * (k + 1), 100, 0, 1))
    assert len(caplog.records) == 1 and f": {trouble}" in caplog.text
    healthy = make(ramp=0.0)
    healthy(make_batch(healthy, 6))
    assert healthy.agreement.problem() is None


def test_standardised_features_tell_images_apart(make, make_batch):
    """Pooled InstanceNorm maps are nearly equal for all images; running moments undo that."""
    spread = {}
    for on in (True, False):
        method = make(standardise=on, features=(8, 16, 16)).eval()
        with torch.no_grad():
            spread[on] = method(make_batch(method, 8))["embedding_spread"].item()
    assert spread[True] > 3 * spread[False]


def test_autocast(make, make_batch):
    method = make(ramp=0.0)
    batch, state = make_batch(method), {k: v.clone() for k, v in method.state_dict().items()}
    exact = method(batch)
    method.load_state_dict(state)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = method(batch)
    assert rough["gg"].dtype == rough["total"].dtype == torch.float32
    assert abs(rough["total"] - exact["total"]) < 0.05 * exact["total"]


# ---------------------------------------------------------------------------------------------- for a person


def test_alarm_names_the_trouble(make, caplog, make_batch):
    method = make()
    with caplog.at_level(logging.WARNING, "nnssl"):
        method(make_batch(method))
        method.agreement.seen.copy_(torch.tensor([0.0, 0.1, 1.0]))
        method.after_step(Progress(50, 10000, 0, 1))  # too early to tell
        assert not caplog.records
        method.after_step(Progress(50, 1000, 0, 1))
        method.after_step(Progress(100, 1000, 0, 1))
        assert len(caplog.records) == 1 and "step 50: collapse" in caplog.text
        method.agreement.seen.copy_(torch.tensor([math.log(32), math.log(32), 1.0]))
        method.after_step(Progress(150, 1000, 0, 1))
    assert "step 150: plateau" in caplog.text and "teacher_temperature" in caplog.text


@pytest.mark.parametrize("values", [{}, {"views": "B", "masking": "sparse"}, {"global_views": 0}, {"local_views": 0}])
def test_what_a_person_sees(make, values, make_batch):
    method = make(**values).eval()
    batch = make_batch(method, 4)
    with torch.no_grad():
        terms, picture, z = method(batch), method.pictures(batch), method.embed(batch)
    kinds = [k for k in ("global", "local") if k in batch]
    assert len(picture.columns) == 4 * len(kinds)
    for image in picture.columns.values():
        assert len(image) == 3 and np.isfinite(image).all() and image.min() >= 0 and image.max() <= 1
    assert z.ndim == 2 and torch.isfinite(z).all()
    for kind in kinds:
        assert terms[f"{kind}_oracle"] < terms[f"{kind}_surround"]
    assert ("retrieval" in terms) == (len(kinds) == 2)
    last = {k: float(v) for k, v in terms.items()}
    learnt, sentence = method.verdict(last, last)
    assert not learnt and "did not learn" in sentence
    assert ("A local view finds" in sentence) == (len(kinds) == 2) == ("by chance" in method.note(last))


def test_verdict(make):
    good = {"reconstruction": 0.1, "inpainting": 0.3, "surround": 0.5, "oracle": 0.2}
    last = {f"{k}_{t}": v for k in ("local", "global") for t, v in good.items()}
    healthy = {
        "teacher_entropy": 2.0,
        "mean_entropy": 3.0,
        "embedding_spread": 0.8,
        "retrieval": 0.8,
        "retrieval_chance": 0.25,
    }
    method = make()
    learnt, sentence = method.verdict({"retrieval": 0.3}, {**last, **healthy})
    assert learnt and "tells images apart" in sentence and "80 % of the cases (25 % by chance, 30 % before" in sentence
    assert not method.verdict({}, {**last, **healthy, "global_reconstruction": 0.4})[0]
    learnt, sentence = method.verdict({}, {**last, **healthy, "teacher_entropy": 0.0, "mean_entropy": 0.0})
    assert not learnt and "collapse" in sentence
    assert method.verdict({"total": 2.0}, {"total": 1.0})[0]
    alone = {**healthy, "retrieval": 1.0, "retrieval_chance": 1.0}  # a single held-out volume
    assert "finds the global view" not in method.verdict({}, {**last, **alone})[1] and method.note(alone) == ""
    assert method.note(healthy) == "local views found 80 % (25 % by chance)"


def test_the_line_of_an_epoch_says_consistency_in_words(make):
    from nnssl.pretrain.engine.messages import epoch_line

    row = {"epoch": 1, "lr": 1e-3, "step_s": 0.5, "data_wait": 0.1, "train/total": 3.0}
    row |= {"train/global_reconstruction": 0.9, "train/gg": 8.4, "train/lg": 8.5}
    text = epoch_line(row, 2, make().note({}), 1.0, make().spoken)
    assert "(global reconstruction 0.9, agreement of large views 8.4, of small with large views 8.5)" in text


# ---------------------------------------------------------------------------------------------- runs


def test_nnunet_gets_the_student(make, tmp_path, make_batch):
    from nnunetv2.run.load_pretrained_weights import load_pretrained_weights

    method = make("aniso", "resenc")
    train(method, [make_batch(method, step=k) for k in range(2)])
    payload = checkpoint.build_payload(
        method.network,
        method.plan,
        method="glmae",
        config=vars(method.config),
        crop_size=method.request.size,
        pretrained_parts=method.pretrained_parts(),
        data={},
        citations=method.citation,
    )
    checkpoint.save(tmp_path / "weights.pth", payload)
    network = build_network(method.plan)
    load_pretrained_weights(network, str(tmp_path / "weights.pth"))
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


@pytest.mark.parametrize(
    ("size", "median", "views", "window", "local"),
    [
        ((8, 12, 16), (20, 40, 35), "auto", (20, 30, 35), (8, 12, 16)),  # wider: both of one size
        ((8, 12, 16), (8, 12, 16), "auto", (8, 12, 16), (8, 8, 12)),  # nothing is: 0.6 in whole steps of 4
        ((8, 12, 16), (8, 12, 16), "A", (8, 12, 16), (8, 12, 16)),
        ((8, 12, 16), (20, 40, 35), "B", (20, 30, 35), (8, 8, 12)),
        ((8, 20, 16), (8, 24, 16), "auto", (8, 24, 16), (8, 20, 16)),  # 1.2 times as wide on one axis is wider
        ((8, 20, 16), (8, 23, 16), "auto", (8, 23, 16), (8, 12, 12)),
        ((8, 12, 16), (5, 6, 50), "B", (8, 12, 40), (8, 8, 12)),  # at least the crop, at most 2.5 of it
    ],
)
def test_windows_and_modes(make, size, median, views, window, local):
    method = make(median=median, crop=size, views=views)
    assert (method.request.size, method.request.read_size, method.local_size) == (size, window, local)
