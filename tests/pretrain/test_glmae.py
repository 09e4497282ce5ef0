"""glmae: what each network sees, in which order things move, and that the arms are what they say."""

import logging
import math

import numpy as np
import pytest
import torch
from torch import nn

from nnssl.config import make_config
from nnssl.ema import cosine_momentum
from nnssl.errors import NnsslError
from nnssl.networks import unwrap
from nnssl.pretrain.augment.rng import StepRNG
from nnssl.pretrain.methods import Progress, get_method

ISO = ((1, 1, 1), (2, 2, 2), (2, 2, 2))


ANISO = ((1, 1, 1), (1, 2, 2), (2, 2, 2))


GEOMETRIES = {"iso": (ISO, (8, 12, 16)), "aniso": (ANISO, (4, 16, 12))}


CASES = [("iso", "plain", 3), ("aniso", "resenc", 3), ("iso", "resenc", 2)]


SMALL = {"prototypes": 32, "hidden": 16, "bottleneck": 8}


MEDIAN = (20, 40, 35)


# ---------------------------------------------------------------------------------------------- loss


@pytest.mark.parametrize(("geometry", "arch", "dim"), CASES)
@pytest.mark.parametrize("mode", ["dense", "sparse"])
def test_nothing_leaks_into_the_student(make_glmae, geometry, arch, dim, mode, make_batch, gradients):
    """Whatever stands behind the masks of the student: its loss terms and all gradients are the same bits."""
    method = make_glmae(geometry, arch, dim, masking=mode, ramp=0.0)
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


def test_the_teacher_sees_whole_global_views_only(make_glmae, make_batch, gradients):
    method = make_glmae(global_views=2, views="B")
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


def test_order_of_one_step(make_glmae, make_batch):
    """The loss uses the old centre; teacher, centre and ramp move afterwards, and not where a step is skipped."""
    method = make_glmae(ramp=0.5)
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


def test_without_weight_it_is_plain_masked_reconstruction(make_glmae, make_batch, gradients):
    plain, full = make_glmae(gg_weight=0.0, lg_weight=0.0), make_glmae(ramp=1.0)  # at step 0 the ramp is 0
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


def test_local_views_in_any_order(make_glmae, make_batch):
    method = make_glmae(local_views=3).eval()
    batch = make_batch(method)
    order = torch.tensor([6, 7, 8, 0, 1, 2, 3, 4, 5])
    with torch.no_grad():
        a = method(batch)
        b = method({**batch, "local": {k: v[order] for k, v in batch["local"].items()}})
    for key in ("total", "gg", "lg"):
        torch.testing.assert_close(a[key], b[key])


@pytest.mark.parametrize(("p", "q"), [(1, 0), (2, 0), (2, 1), (0, 2)])
def test_any_number_of_views(make_glmae, p, q, make_batch, gradients):
    method = make_glmae(global_views=p, local_views=q)
    terms, grads = gradients(method, make_batch(method))
    assert ("gg" in terms) == (p > 0) and ("lg" in terms) == (p > 0 and q > 0)
    assert torch.isfinite(terms["total"]) and all(torch.isfinite(g).all() for g in grads.values())
    for name, parameter in method.named_parameters():
        assert (name in grads) == parameter.requires_grad, name


@pytest.mark.parametrize("preset", list(get_method("glmae").presets))
def test_presets_are_the_arms(make_glmae, preset, make_batch, gradients):
    values = get_method("glmae").presets[preset]
    method = make_glmae(**values)
    terms, _ = gradients(method, make_batch(method))
    there = {"arm_a": "local", "arm_b": "global local", "arm_c": "global local gg"}.get(
        preset, "global local gg lg"
    ).split()
    assert ("local_reconstruction" in terms) and ("global_reconstruction" in terms) == ("global" in there)
    assert method.consistent == ("gg" in there)
    assert (method.config.lg_weight > 0) == ("lg" in there)
    assert method.pretrained_parts() == {"encoder": True, "decoder_stages": [0, 1]}


def test_terms_of_an_untrained_network(make_glmae, make_batch):
    method = make_glmae(ramp=0.0, prototypes=64)
    nn.init.zeros_(method.agreement.projector.prototypes)
    terms = method(make_batch(method))
    assert terms["gg"].item() == pytest.approx(math.log(64), rel=1e-4)
    assert 0 < terms["teacher_entropy"] <= math.log(64) + 1e-5
    method = make_glmae(ramp=0.0)
    terms = method(make_batch(method))
    assert terms["gradient_ratio"] > 0 and math.isfinite(terms["gradient_ratio"])
    assert terms["mean_entropy"] >= terms["teacher_entropy"] - 1e-5
    assert "retrieval" not in terms


@pytest.mark.parametrize("form", ["cosine", "mse"])
def test_agreement_without_prototypes(make_glmae, make_batch, gradients, form):
    """A predictor on the student's side alone, a variance term, no centre; the teacher learns nothing."""
    method = make_glmae(consistency=form, ramp=0.0, global_views=2, variance_weight=0.3)
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
        make_glmae(consistency=form, variance_weight=0.0)
    assert not make_glmae(consistency=form, variance_weight=0.0, gg_weight=0.0, lg_weight=0.0).consistent


def test_images_are_kept_apart(make_glmae, make_batch, gradients):
    """The total counts koleo by its weight and the ramp, and without weight there is no such term."""
    method = make_glmae(ramp=0.0, koleo_weight=0.5)
    terms, grads = gradients(method, make_batch(method))
    rec = terms["global_reconstruction"] + terms["local_reconstruction"]
    agreed = 0.1 * terms["gg"] + 0.1 * terms["lg"] + 0.5 * terms["koleo"]
    torch.testing.assert_close(terms["total"], rec + agreed)
    assert any(n.startswith("agreement.projector") for n in grads)
    assert "koleo" not in make_glmae(ramp=0.0, koleo_weight=0.0)(make_batch(method))


def test_retrieval_knows_that_two_crops_may_be_of_one_case(make_glmae, make_crops):
    method = make_glmae().eval()
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
def test_alarm_in_training(make_glmae, make_batch, caplog, trouble, options):
    """Trouble that is really there is named by what training itself measures."""
    method = make_glmae(ramp=0.0, **options)
    if trouble == "collapse":
        nn.init.zeros_(method.agreement.projector.mlp[-1].weight)
        nn.init.ones_(method.agreement.projector.mlp[-1].bias)
    with caplog.at_level(logging.WARNING, "nnssl"):
        for k in range(2):
            method(make_batch(method, 6, step=k))["total"].backward()
            method.after_step(Progress(50 * (k + 1), 100, 0, 1))
    assert len(caplog.records) == 1 and f": {trouble}" in caplog.text
    healthy = make_glmae(ramp=0.0)
    healthy(make_batch(healthy, 6))
    assert healthy.agreement.problem() is None


def test_standardised_features_tell_images_apart(make_glmae, make_batch):
    """Pooled InstanceNorm maps are nearly equal for all images; running moments undo that."""
    spread = {}
    for on in (True, False):
        method = make_glmae(standardise=on, features=(8, 16, 16)).eval()
        with torch.no_grad():
            spread[on] = method(make_batch(method, 8))["embedding_spread"].item()
    assert spread[True] > 3 * spread[False]


def test_autocast(make_glmae, make_batch):
    method = make_glmae(ramp=0.0)
    batch, state = make_batch(method), {k: v.clone() for k, v in method.state_dict().items()}
    exact = method(batch)
    method.load_state_dict(state)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = method(batch)
    assert rough["gg"].dtype == rough["total"].dtype == torch.float32
    assert abs(rough["total"] - exact["total"]) < 0.05 * exact["total"]


# ---------------------------------------------------------------------------------------------- for a person


def test_alarm_names_the_trouble(make_glmae, caplog, make_batch):
    method = make_glmae()
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
def test_what_a_person_sees(make_glmae, values, make_batch):
    method = make_glmae(**values).eval()
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


def test_verdict(make_glmae):
    good = {"reconstruction": 0.1, "inpainting": 0.3, "surround": 0.5, "oracle": 0.2}
    last = {f"{k}_{t}": v for k in ("local", "global") for t, v in good.items()}
    healthy = {
        "teacher_entropy": 2.0,
        "mean_entropy": 3.0,
        "embedding_spread": 0.8,
        "retrieval": 0.8,
        "retrieval_chance": 0.25,
    }
    method = make_glmae()
    learnt, sentence = method.verdict({"retrieval": 0.3}, {**last, **healthy})
    assert learnt and "tells images apart" in sentence and "80 % of the cases (25 % by chance, 30 % before" in sentence
    assert not method.verdict({}, {**last, **healthy, "global_reconstruction": 0.4})[0]
    learnt, sentence = method.verdict({}, {**last, **healthy, "teacher_entropy": 0.0, "mean_entropy": 0.0})
    assert not learnt and "collapse" in sentence
    assert method.verdict({"total": 2.0}, {"total": 1.0})[0]
    alone = {**healthy, "retrieval": 1.0, "retrieval_chance": 1.0}  # a single held-out volume
    assert "finds the global view" not in method.verdict({}, {**last, **alone})[1] and method.note(alone) == ""
    assert method.note(healthy) == "local views found 80 % (25 % by chance)"


def test_the_line_of_an_epoch_says_consistency_in_words(make_glmae):
    from nnssl.pretrain.engine.messages import epoch_line

    row = {"epoch": 1, "lr": 1e-3, "step_s": 0.5, "data_wait": 0.1, "train/total": 3.0}
    row |= {"train/global_reconstruction": 0.9, "train/gg": 8.4, "train/lg": 8.5}
    text = epoch_line(row, 2, make_glmae().note({}), 1.0, make_glmae().spoken)
    assert "(global reconstruction 0.9, agreement of large views 8.4, of small with large views 8.5)" in text
