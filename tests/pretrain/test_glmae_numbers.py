"""What glmae adds up, measures and chooses, by hand; shapes, order of a step and runs are tested in test_glmae.py."""

import logging
import math

import pytest
import torch
import torch.nn.functional as F

from nnssl.errors import NnsslError
from nnssl.networks import encoder_module
from nnssl.pretrain.augment.rng import StepRNG
from nnssl.pretrain.methods import Progress

SMALL = {"prototypes": 32, "hidden": 16, "bottleneck": 8}


def heard(method, batch):
    """Terms of a step, and the pooled features and whole views that the agreement is made of."""
    forward, seen = method.agreement.forward, []
    method.agreement.forward = lambda features, whole: (seen.append((features, whole)), forward(features, whole))[1]
    terms = method(batch)
    method.agreement.forward = forward
    return terms, *seen[0]


# ---------------------------------------------------------------------------------------------- choices


def test_presets_and_constants(make_glmae):
    presets = make_glmae().presets
    assert presets["arm_a"] == {"global_views": 0, "gg_weight": 0.0, "lg_weight": 0.0}
    assert presets["arm_b"] == {"gg_weight": 0.0, "lg_weight": 0.0} and presets["arm_c"] == {"lg_weight": 0.0}
    assert presets["more_views"] == {"global_views": 2, "local_views": 4} and not presets["arm_d"]
    teacher = {"prototypes": 256, "hidden": 256, "bottleneck": 64, "teacher_momentum": 0.99, "centre_momentum": 0.9}
    assert presets["short"] == {**teacher, "gg_weight": 0.3, "lg_weight": 0.3, "koleo_weight": 0.06, "lr": 1e-3}
    assert make_glmae().grad_clip == 1.0


def test_what_is_said_of_the_views(make_glmae):
    request = make_glmae().request
    assert "up to 2.5x2.5x2.19 times as wide; local views have 8x12x16 voxels." in request.explanation
    assert "75 % of the blocks of 2x2x2 voxels are hidden in 3 views" in request.explanation
    assert "nothing wider" not in request.explanation
    narrow = {"median": (9, 13, 17), "crop": (8, 12, 16)}
    assert "nothing wider" in make_glmae(**narrow, views="A").request.explanation
    for options in ({"views": "B"}, {"views": "A", "global_views": 0}):
        assert "nothing wider" not in make_glmae(**narrow, **options).request.explanation
    assert "8x8x12 voxels" in make_glmae(**narrow).request.explanation


def test_what_is_asked_of_the_loader(make_glmae):
    request = make_glmae().request
    assert (request.batch_size, request.min_batch) == (4, 2) and make_glmae(batch_size=6).request.batch_size == 6


def test_one_zoom_is_legal_and_the_decoder_needs_a_reconstruction(make_glmae):
    assert make_glmae(min_zoom=2.0, max_zoom=2.0).request.read_size == (16, 24, 32)
    for options in ({"global_views": 0, "local_weight": 0.0}, {"local_views": 0, "global_weight": 0.0}):
        with pytest.raises(NnsslError, match="decoder would not learn"):
            make_glmae(**options)
    for options in ({"local_weight": 0.0}, {"global_weight": 0.0}, {"local_views": 0}, {"global_views": 0}):
        make_glmae(**options)
    with pytest.raises(NnsslError, match="variance_weight"):
        make_glmae(consistency="mse", variance_weight=0.0, gg_weight=0.0)
    make_glmae(consistency="mse", variance_weight=0.0, gg_weight=0.0, lg_weight=0.0)
    make_glmae(variance_weight=0.0)


def test_a_block_has_to_fit_both_kinds_of_views(make_glmae):
    """Local views have 8x8x12 voxels, global ones 8x12x16: blocks of 4x8x4 fit the former alone, of 4x4x16 the latter."""
    narrow = {"median": (9, 13, 17), "crop": (8, 12, 16), "views": "B"}
    make_glmae(**narrow, block="4,4,4")
    for block in ("4,8,4", "4,4,16"):
        with pytest.raises(NnsslError, match="block="):
            make_glmae(**narrow, block=block)


def test_two_stages_are_pooled_by_mean_and_maximum(make_glmae):
    agreement = make_glmae().agreement
    assert agreement.projector.mlp[0].in_features == 2 * (6 + 8) and agreement.maximum
    assert agreement.embedding_moments["global"].mean.shape == (8,)
    assert not hasattr(make_glmae(consistency="mse").agreement, "embedding_moments")


# ---------------------------------------------------------------------------------------------- views


def test_a_voxel_is_valid_where_half_of_it_is_body(make_glmae, make_crops):
    """Intensities say how much of a voxel is body; at twice the width some are exactly half of it."""
    method = make_glmae(region="body", min_zoom=2.0, max_zoom=2.0, body_share=0.0)
    crops = make_crops(method, 6)
    crops.body[:] = False
    crops.body[..., 3:13, 5:, 7:26] = True
    crops.data = 1.0 + crops.body.float()
    crops.shape = torch.tensor([method.request.read_size] * 6)
    batch = method.views(crops, StepRNG(0, 0, 6))
    for view in batch.values():
        assert torch.equal(view["valid"], view["target"] >= 1.5) and not view["valid"].all()
    assert (batch["global"]["target"] == 1.5).any()


def test_zoom_is_the_mean_over_axes(make_glmae, make_crops):
    """Twice as wide where the image is, but not beyond it: 16 of 20, 12 of 12, 32 of 35 voxels."""
    method = make_glmae(min_zoom=2.0, max_zoom=2.0)
    crops = make_crops(method, 3)
    crops.data[:, :, :, 12:] = 0
    batch = method.views(crops, StepRNG(0, 0, 3))
    torch.testing.assert_close(batch["global"]["zoom"], torch.full((3,), 5 / 3))
    assert torch.equal(batch["local"]["zoom"], torch.ones(6))
    assert method(batch)["zoom"].item() == pytest.approx(5 / 3)


def test_each_axis_is_mirrored_half_of_the_time(make_glmae, make_crops):
    method = make_glmae(mirror=True, global_views=0, local_views=1, body_share=0.0)
    crops = make_crops(method, 200)
    axes = [
        torch.arange(float(n)).view([-1 if i == k else 1 for k in range(3)]) for i, n in enumerate(crops.data.shape[2:])
    ]
    crops.data = (1 + axes[0] + 100 * axes[1] + 10_000 * axes[2]).expand(200, 1, -1, -1, -1)
    target = method.views(crops, StepRNG(0, 0, 200))["local"]["target"]
    for axis in (2, 3, 4):
        share = (target.diff(dim=axis).flatten(1)[:, 0] < 0).float().mean().item()
        assert share == pytest.approx(0.5, abs=0.14)  # 4 standard errors


# ---------------------------------------------------------------------------------------------- loss


def test_total_by_hand(make_glmae, make_batch):
    weights = {"global_weight": 0.5, "local_weight": 2.0, "gg_weight": 0.3, "lg_weight": 0.2, "koleo_weight": 0.05}
    method = make_glmae(ramp=1.0, **weights)
    method.weight.fill_(0.25)
    batch = make_batch(method)
    for training, ramp in ((True, 0.25), (False, 1.0)):  # held-out cases are judged by the whole
        terms = method.train(training)(batch)
        agreed = 0.3 * terms["gg"] + 0.2 * terms["lg"] + 0.05 * terms["koleo"]
        expected = 0.5 * terms["global_reconstruction"] + 2 * terms["local_reconstruction"] + ramp * agreed
        torch.testing.assert_close(terms["total"], expected)
    alone = make_glmae(ramp=0.0, local_views=0, **weights)
    terms = alone(make_batch(alone))
    agreed = 0.3 * terms["gg"] + 0.05 * terms["koleo"]
    torch.testing.assert_close(terms["total"], 0.5 * terms["global_reconstruction"] + agreed)
    assert make_glmae(ramp=0.0).weight == 1 and make_glmae(ramp=0.1).weight == 0


def test_gradients_of_both_halves_are_compared_every_fifty_steps(make_glmae, make_batch):
    method = make_glmae(ramp=1.0)  # the ratio is that without the ramp, which is 0 here
    batch = make_batch(method)
    ratio = method(batch)["gradient_ratio"].item()
    terms = method(batch)
    assert terms["gradient_ratio"].item() == ratio
    params = list(encoder_module(method.network).parameters())
    norms = []
    for term in (
        0.1 * terms["gg"] + 0.1 * terms["lg"] + 0.02 * terms["koleo"],
        terms["global_reconstruction"] + terms["local_reconstruction"],
    ):
        grads = torch.autograd.grad(term, params, retain_graph=True, allow_unused=True)
        norms.append(math.sqrt(sum(float(g.double().square().sum()) for g in grads if g is not None)))
    assert ratio == pytest.approx(norms[0] / norms[1], rel=1e-3)
    other = make_batch(method, seed=5)
    method.after_step(Progress(49, 1000, 0, 1))
    assert method(other)["gradient_ratio"].item() == ratio
    method.after_step(Progress(50, 1000, 0, 1))
    assert method.eval()(other)["gradient_ratio"].item() == ratio  # measured in training alone
    with torch.no_grad():
        assert method.train()(other)["gradient_ratio"].item() == ratio
    assert method(other)["gradient_ratio"].item() != ratio


def test_where_nothing_is_hidden_all_numbers_are_finite(make_glmae, make_batch):
    """There is no reconstruction then, nor a gradient of it that the consistency's could be compared with."""
    method, batch = make_glmae(), make_batch(make_glmae())
    for view in batch.values():
        view["mask"][:] = False
    terms = method(batch)
    assert terms["global_reconstruction"] == terms["local_reconstruction"] == 0
    assert all(torch.isfinite(v) for v in terms.values()) and terms["gradient_ratio"] > 1e6


@pytest.mark.parametrize(("ramp", "step", "weight"), [(0.5, 2, 0.4), (0.5, 5, 1.0), (0.05, 1, 1.0), (0.0, 1, 1.0)])
def test_ramp(make_glmae, ramp, step, weight):
    """Of ten steps; a ramp of less than a step is over after the first."""
    method = make_glmae(ramp=ramp)
    method.after_step(Progress(step, 10, 0, 1))
    assert method.weight.item() == pytest.approx(weight)


def test_alarm_after_a_twentieth_of_the_run(make_glmae, make_batch, caplog):
    method = make_glmae()
    method(make_batch(method))
    method.agreement.seen.copy_(torch.tensor([0.0, 0.1, 1.0]))
    with caplog.at_level(logging.WARNING, "nnssl"):
        method.after_step(Progress(100, 2020, 0, 1))
        assert not caplog.records
        method.after_step(Progress(100, 2000, 0, 1))
    assert "step 100: collapse" in caplog.text


# ---------------------------------------------------------------------------------------------- agreement


def test_cross_entropy_by_hand(make_glmae, make_batch):
    """Teacher: softmax((logits - centre) / tau_t) of whole views; student: log softmax(logits / tau_s); mean over all pairs."""
    method = make_glmae(global_views=2, local_views=3, student_temperature=0.2, teacher_temperature=0.05)
    a = method.agreement
    a.centre.value.normal_(0, 0.1)
    centre = a.centre.value.clone()
    terms, features, whole = heard(method, make_batch(method))
    teacher = a.teacher_projector.module
    with torch.no_grad():
        said = teacher.logits(F.normalize(a.project("teacher", a._look(whole)), dim=1)).view(2, 3, -1)
        q = [[torch.softmax((x - centre) / 0.05, 0) for x in view] for view in said]
        for name, kind, views in (("gg", "global", 2), ("lg", "local", 3)):
            z = a.projector.logits(F.normalize(a.project(kind, features[kind]), dim=1)).view(views, 3, -1)
            pairs = [
                -(q[i][b] * torch.log_softmax(z[j][b] / 0.2, 0)).sum()
                for i in range(2) for j in range(views) for b in range(3)
            ]  # fmt: skip
            assert terms[name].item() == pytest.approx(float(sum(pairs)) / len(pairs), rel=1e-4)
    assert torch.equal(a.centre.value, centre)
    assert a.seen.tolist() == pytest.approx(
        [terms[k].item() for k in ("teacher_entropy", "mean_entropy", "embedding_spread")]
    )
    kept = a.seen.clone()
    method.eval()(make_batch(method, seed=3))
    assert torch.equal(a.seen, kept)  # what training saw
    before = [p.clone() for p in teacher.parameters()]
    with torch.no_grad():
        for p in a.projector.parameters():
            p.add_(1.0)
    a.follow(encoder_module(method.network), 1, 10)
    assert not torch.equal(a.centre.value, centre)
    share = 0.004 * (1 + math.cos(math.pi / 10)) / 2  # of the student: 1 - mu, after one of ten steps
    for old, new in zip(before, teacher.parameters()):
        torch.testing.assert_close(new, old + share, atol=1e-6, rtol=0)


def test_distances_by_hand(make_glmae, make_batch):
    """Without prototypes: the predictor's output against the teacher's embedding; the variance over volumes of each view."""
    for form in ("cosine", "mse"):
        method = make_glmae(consistency=form, global_views=2, local_views=2)
        a = method.agreement
        terms, features, whole = heard(method, make_batch(method, 4))
        with torch.no_grad():
            said = a.project("teacher", a._look(whole)).view(2, 4, 8)
            projected = {k: a.project(k, v) for k, v in features.items()}
            for name, kind in (("gg", "global"), ("lg", "local")):
                seen = a.predictor(torch.cat(list(projected.values()))).view(2, 2, 4, 8)[int(kind == "local")]
                pairs = [(seen[j, b], said[i, b]) for i in range(2) for j in range(2) for b in range(4)]
                far = [
                    1 - F.cosine_similarity(z, e, dim=0) if form == "cosine" else (z - e).square().mean()
                    for z, e in pairs
                ]
                assert terms[name].item() == pytest.approx(float(sum(far)) / len(far), rel=1e-3, abs=1e-6)
            z = torch.cat([v.view(2, 4, 8) for v in projected.values()])
            z = F.normalize(z, dim=2) * math.sqrt(8) if form == "cosine" else z
            hinge = (1 - (z.var(1, unbiased=False) + 1e-4).sqrt()).clamp_min(0).mean()
        assert terms["variance"].item() == pytest.approx(float(hinge), rel=1e-3)


def test_spread_and_cosine_are_of_global_views(make_glmae, make_batch):
    method = make_glmae(global_views=2)
    a = method.agreement
    terms, features, whole = heard(method, make_batch(method))
    assert not any(
        terms[k].requires_grad for k in ("embedding_spread", "view_cosine", "teacher_entropy", "mean_entropy")
    )
    with torch.no_grad():
        z = F.normalize(a.project("global", features["global"]), dim=1)
        e = F.normalize(a.project("teacher", a._look(whole)), dim=1)
    spread = z.std(0, unbiased=False).mean() * math.sqrt(8)
    assert terms["embedding_spread"].item() == pytest.approx(float(spread), rel=1e-4)
    assert terms["view_cosine"].item() == pytest.approx(float((z * e).sum(1).mean()), rel=1e-3, abs=1e-4)
    alike = (
        torch.stack([v[[1, 2, 0]] - v for v in z.view(2, 3, 8)]),
        torch.stack([v[[2, 0, 1]] - v for v in z.view(2, 3, 8)]),
    )
    nearest = torch.stack([d.norm(dim=2) for d in alike]).amin(0)
    assert terms["koleo"].item() == pytest.approx(float(-nearest.log().mean()), rel=1e-3)


def test_a_teacher_that_sees_what_the_student_sees_agrees_with_it(make_glmae, make_batch):
    """At the start both are the same: unmasked features of the global views find their volume, at a cosine of 1."""
    method = make_glmae(standardise=False).eval()
    a, batch = method.agreement, make_batch(method, 5)
    whole, volume = batch["global"]["input"], torch.arange(5)
    with torch.no_grad():
        features = a._look(whole)
        assert a({"global": features}, whole)["view_cosine"].item() == pytest.approx(1, abs=1e-5)
        found = a.retrieval(torch.cat([features, features]), whole, volume)
        assert found["retrieval"] == 1 and found["retrieval_chance"].item() == pytest.approx(0.2)
        shifted = a.retrieval(features.roll(1, 0), whole, volume)
        z = method.embed(batch)
    assert shifted["retrieval"] == 0
    torch.testing.assert_close(z.norm(dim=1), torch.ones(5))


def test_training_standardises_by_the_batch_and_each_kind_by_itself(make_glmae, make_batch):
    method = make_glmae(moments_momentum=0.5)
    a = method.agreement
    x = 3 + 2 * torch.randn(6, 28)
    for kind in ("global", "local", "teacher"):
        torch.testing.assert_close(a.moments[kind](x).mean(0), torch.zeros(28), atol=1e-5, rtol=0)
        y = a.project(kind, x)
        torch.testing.assert_close(y.mean(0), torch.zeros(8), atol=1e-4, rtol=0)
    a.moments["local"](x + 10)
    assert (a.moments["local"].mean - a.moments["global"].mean).mean().item() == pytest.approx(10 * 0.5, abs=1e-3)
    assert a.moments["global"].momentum == a.embedding_moments["local"].momentum == 0.5


# ---------------------------------------------------------------------------------------------- for a person


def test_found_by_chance_as_often_is_said_up_to_99_per_cent(make_glmae):
    method = make_glmae()
    good = {"reconstruction": 0.1, "inpainting": 0.3, "surround": 0.5, "oracle": 0.2}
    last = {f"local_{k}": v for k, v in good.items()}
    for chance, said in ((0.99, True), (0.991, False)):
        terms = {**last, "retrieval": 1.0, "retrieval_chance": chance}
        assert bool(method.note(terms)) == said
        assert ("A local view finds" in method.verdict({}, terms)[1]) == said
    assert method.note({}) == ""


def test_curves_are_of_the_views_that_there_are(make_glmae):
    def lines(**options):
        return [list(c.lines) for c in make_glmae(**options).curves()]

    assert lines() == [["global_reconstruction"], ["local_reconstruction"], ["retrieval"]]
    assert lines(global_views=0)[0] == ["local_reconstruction"] and lines(local_views=0)[0] == ["global_reconstruction"]
    found = make_glmae().curves()[-1]
    assert found.percent and [m.term for m in found.levels] == ["retrieval_chance"]


def test_pictures_are_of_the_first_view_of_each_kind(make_glmae, make_batch):
    method = make_glmae(global_views=2, local_views=3).eval()
    batch = make_batch(method, 2)
    with torch.no_grad():
        columns = method.pictures(batch).columns
    for word, kind in (("large", "global"), ("small", "local")):
        shown = {k: v for k, v in columns.items() if k.startswith(f"{word} view")}
        assert len(shown) == 4 and all(len(v) == 2 for v in shown.values())
        view = {k: batch[kind][k][:2] for k in ("input", "target", "mask", "valid")}
        with torch.no_grad():
            expected = method.panel(*view.values()).columns
        assert all((shown[f"{word} view: {k}"] == v).all() for k, v in expected.items() if f"{word} view: {k}" in shown)
