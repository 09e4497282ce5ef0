"""``-m robust``: the forms of the criterion, what it compares, and that it learns."""

import math

import numpy as np
import pytest
import torch

from nnssl.errors import NnsslError
from nnssl.losses.diagnostics import place_share
from nnssl.networks import forward_features
from nnssl.pretrain.augment import StepRNG, central_crop
from nnssl.pretrain.methods import Crops, SourceStats, get_method
from nnssl.pretrain.methods.robust import CROP, OTHER, SECOND
from nnssl.transferability import distance_matrix, robustness_loss, separate
from nnssl.transferability.objective import FORMS, separation_loss
from nnssl.transferability.pooling import pool

STATS = SourceStats(median_shape=(28, 36, 28), n_cases=12)


def crops_for(method, n=6, seed=0, cases=None):
    g = torch.Generator().manual_seed(seed)
    window, channels = method.request.read_size, method.plan.n_channels
    coarse = torch.randn(n, channels, *[4] * len(window), generator=g)
    mode = "trilinear" if len(window) == 3 else "bilinear"
    data = torch.nn.functional.interpolate(coarse, size=window, mode=mode, align_corners=True)
    data = data + 0.1 * torch.randn(data.shape, generator=g)
    flat = data.flatten(2)
    return Crops(
        data=data,
        body=torch.ones(n, 1, *window, dtype=torch.bool),
        position=torch.rand(n, 3, generator=g, dtype=torch.float64),
        axis_position=torch.rand(n, 3, generator=g, dtype=torch.float64),
        intensity=torch.stack([flat.quantile(0.005, dim=2), flat.quantile(0.995, dim=2)], -1),
        start=torch.zeros(n, 3, dtype=torch.int64),
        case=[f"case_{i}" for i in range(n)] if cases is None else cases,
    )


# --- the forms --------------------------------------------------------------------------------------------------------


def separation(n=6, seed=0, groups=None):
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(n, 5, generator=g, dtype=torch.float64, requires_grad=True)
    p = q.detach() + 0.5 * torch.randn(n, 5, generator=g, dtype=torch.float64)
    return q, p, separate(q, p, groups=groups)


@pytest.mark.parametrize("form", FORMS)
def test_forms_against_a_double_loop(form):
    q, p, s = separation(groups=["a", "a", "b", "c", "d", "d"])
    table = distance_matrix(q, p).tolist()
    groups, m, t, k = "aabcdd", 0.4, 0.2, 2
    total = 0.0
    for i in range(6):
        u = sorted((table[i][i] - table[i][j] + m for j in range(6) if groups[i] != groups[j]), reverse=True)
        total += {
            "hinge": sum(max(0, x) for x in u) / len(u),
            "hardest": sum(max(0, x) for x in u[:k]) / k,
            "softplus": sum(t * math.log1p(math.exp(x / t)) for x in u) / len(u),
            "lse": t * math.log(1 + sum(math.exp(x / t) for x in u)),
        }[form]
    ours = separation_loss(s, form=form, margin=m, temperature=t, hardest=k)
    assert float(ours.detach()) == pytest.approx(total / 6, abs=1e-9)


@torch.no_grad()
def test_smooth_forms_tend_to_the_hinge():
    _, _, s = separation()
    u = (s.delta + 0.5).masked_fill(~s.mask, -math.inf)
    assert float(separation_loss(s, form="softplus", temperature=1e-3)) == pytest.approx(
        float(robustness_loss(s)), abs=1e-3
    )
    hardest = float(u.amax(1).clamp_min(0).mean())
    assert float(separation_loss(s, form="lse", temperature=1e-3)) == pytest.approx(hardest, abs=1e-3)
    assert float(separation_loss(s, form="hardest", hardest=1)) == pytest.approx(hardest, abs=1e-12)
    assert float(separation_loss(s, form="hardest", hardest=99)) == pytest.approx(float(robustness_loss(s)), abs=1e-12)


@pytest.mark.parametrize(("form", "silent"), [("hinge", True), ("hardest", True), ("softplus", False), ("lse", False)])
def test_a_satisfied_hinge_is_silent_and_the_smooth_forms_are_not(form, silent):
    q = torch.eye(4, dtype=torch.float64).requires_grad_()
    p = torch.eye(4, dtype=torch.float64) + 0.05
    separation_loss(separate(q, p), form=form, margin=0.5).backward()
    assert (float(q.grad.abs().max()) == 0) == silent


@pytest.mark.parametrize("form", FORMS)
def test_one_case_alone_gives_zero_not_nan(form):
    q, p, _ = separation()
    loss = separation_loss(separate(q, p, groups=torch.zeros(6), check=False), form=form)
    loss.backward()
    assert float(loss.detach()) == 0 and torch.isfinite(q.grad).all()


def test_groups_as_a_tensor():
    _, _, by_name = separation(groups=["a", "a", "b", "c", "d", "d"])
    _, _, by_number = separation(groups=torch.tensor([7, 7, 1, 2, 3, 3]))
    assert torch.equal(by_name.mask, by_number.mask)
    with pytest.raises(NnsslError, match="Did you mean 'hinge'"):
        separation_loss(by_name, form="hing")


# --- the method -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dim", "arch", "channels"), [(3, "plain", 1), (3, "resenc", 2), (2, "plain", 2)])
def test_one_step_trains_the_encoder_and_nothing_else(make_robust, dim, arch, channels):
    method = make_robust(dim, arch, channels)
    crops = crops_for(method)
    with torch.no_grad():
        batch = method.views(crops, StepRNG(0, 0, len(crops)))
    assert batch["a"].shape == (6, channels, *method.request.size) == batch["b"].shape
    assert not torch.equal(batch["a"], batch["b"]) and torch.isfinite(batch["a"]).all()
    terms = method(batch)
    assert all(torch.isfinite(v) and v.ndim == 0 for v in terms.values())
    terms["total"].backward()
    names = {n for n, p in method.network.named_parameters() if p.grad is not None}
    assert names == {n for n, _ in method.network.named_parameters() if n.startswith("encoder.")}
    assert all(torch.isfinite(p.grad).all() for p in method.parameters() if p.grad is not None)
    optimiser = method.optimiser()
    assert sum(p.numel() for g in optimiser.param_groups for p in g["params"]) == sum(
        p.numel() for p in method.network.encoder.parameters()
    )
    assert method.embed(batch).shape[0] == 6 and method.pictures(batch).columns[CROP].shape[0] == 4


def test_crops_of_one_case_are_not_pushed_apart(make_robust):
    method = make_robust(levels=1, batch_standardise=False, form="hinge")
    twins = crops_for(method, 4, cases=["a", "a", "b", "b"])
    batch = method.views(twins, StepRNG(0, 0, 4))
    a, b = method.features(batch["a"])[0], method.features(batch["b"])[0]
    expected = [robustness_loss(separate(x, y, groups=["a", "a", "b", "b"])) for x, y in ((a, b), (b, a))]
    assert float(method(batch)["total"]) == pytest.approx(float(sum(expected) / 2), abs=1e-6)


def test_standardised_features_are_not_all_alike(make_robust):
    for standardised, low, high in ((False, 0.0, 0.3), (True, 0.9, 1.3)):
        method = make_robust(batch_standardise=standardised)
        terms = method(method.views(crops_for(method, 8), StepRNG(0, 0, 8)))
        assert low < float(terms["distance_other"]) < high


def test_views_depend_on_the_sample_only(make_robust):
    method = make_robust()
    crops = crops_for(method)
    whole = method.views(crops, StepRNG(3, 5, 6))
    for first, count in ((0, 3), (3, 3)):
        half = Crops(**{k: v[first : first + count] for k, v in vars(crops).items() if v is not None})
        part = method.views(half, StepRNG(3, 5, 6, first, count))
        for name in whole:
            torch.testing.assert_close(part[name], whole[name][first : first + count])


def test_view_options_can_be_turned_off(make_robust):
    off = dict.fromkeys(("gamma", "noise", "blur", "jitter", "rotation", "shift"), 0.0)
    method = make_robust(**off, min_scale=1.0, max_scale=1.0)
    batch = method.views(crops_for(method), StepRNG(0, 0, 6))
    torch.testing.assert_close(batch["a"], batch["still"], atol=1e-4, rtol=1e-4)


def test_views_are_not_affine(make_robust):
    """What InstanceNorm would undo is not all that happens: no view is a + b * crop."""
    method = make_robust(noise=0.0, blur=0.0, rotation=0.0, min_scale=1.0, max_scale=1.0, shift=0.0)
    batch = method.views(crops_for(method), StepRNG(0, 0, 6))
    for x, y in zip(batch["still"].flatten(1).numpy(), batch["a"].flatten(1).numpy()):
        assert np.corrcoef(x, y)[0, 1] > 0.9
        slope, offset = np.polyfit(x, y, 1)
        assert np.abs(y - slope * x - offset).max() > 1e-3 * y.std()


def test_the_place_in_the_crop_is_not_told_by_zeros(make_robust):
    """By default convolutions repeat what is at the border: of noise, untrained features vary less with the place; one that
    is asked for has nnU-Net's zeros."""
    shares = {}
    for padding in ("replicate", "zeros"):
        method = make_robust(padding=padding)
        assert {m.padding_mode for m in method.network.modules() if isinstance(m, torch.nn.Conv3d)} == {padding}
        noise = torch.randn(12, 1, *method.request.size, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            shares[padding] = place_share(forward_features(method.network, noise, 0).skips[-1])
    assert make_robust().config.padding == "replicate" and shares["replicate"] < 0.5 * shares["zeros"]


@pytest.mark.parametrize("padding", ["replicate", "zeros"])
def test_crops_without_content_have_finite_gradients(make_robust, padding):
    method = make_robust(padding=padding, noise=0.0)
    crops = crops_for(method)
    crops.data[:3] = 0.5
    batch = method.views(crops, StepRNG(0, 0, 6))
    assert (batch["still"][:3].flatten(1).std(1) > 0).all() == (padding == "replicate")
    torch.testing.assert_close(batch["still"][3:], central_crop(crops.data, method.request.size)[3:])
    method(batch)["total"].backward()
    norms = [float(p.grad.norm()) for p in method.network.parameters() if p.grad is not None]
    assert norms and all(math.isfinite(n) and n < 1e3 for n in norms)


def test_it_learns_and_says_so(make_robust):
    method = make_robust(lr=3e-3, warmup=0.0)
    crops = crops_for(method, 8)
    held_out = method.views(crops_for(method, 8, seed=9), StepRNG(0, 10**6, 8))
    optimiser = method.optimiser()

    def measure():
        with torch.no_grad():
            return {k: float(v) for k, v in method(held_out).items()}

    first = measure()
    for step in range(12):
        optimiser.zero_grad()
        method(method.views(crops, StepRNG(0, step, 8)))["total"].backward()
        optimiser.step()
    last = measure()
    assert last["total"] < first["total"]
    learnt, sentence = method.verdict(first, last)
    assert "robustness loss" in sentence and learnt == ("robust learnt" in sentence)
    assert not method.verdict(last, first)[0]
    alone = {**first, "distance_other": 0.0}
    judged, why = method.verdict(alone, {**last, "distance_other": 0.0})
    assert not judged and "cannot be judged: it compares cases, and only one is held out" in why
    shown = method.pictures(held_out | {"case": held_out["case"] * 0})
    assert OTHER not in shown.columns and OTHER not in shown.tags and SECOND in shown.tags, "no other case to resemble"


def test_what_counts_as_learnt(make_robust):
    """The criterion fell, as many crops as before find their other view, and views are nearer than other cases."""
    first = {"robustness": 1.0, "nearest": 0.5, "distance_same": 0.3, "distance_other": 0.5}
    last = {"robustness": 0.9, "nearest": 0.5, "distance_same": 0.3, "distance_other": 0.5}
    method = make_robust()
    assert method.verdict(first, last)[0]
    for change in ({"robustness": 1.0}, {"nearest": 0.49}, {"distance_same": 0.5}):
        learnt, sentence = method.verdict(first, {**last, **change})
        assert not learnt and "did not learn" in sentence
    alone = {"distance_other": 0.0}  # only where both are 0 is there a single case
    for before, after, one in (({}, {}, False), (alone, {}, False), ({}, alone, False), (alone, alone, True)):
        assert ("cannot be judged" in method.verdict({**first, **before}, {**last, **after})[1]) == one


def test_mistakes(make_robust):
    cls = get_method("robust")
    plan = make_robust().plan
    with pytest.raises(NnsslError, match="needs at least 2"):
        cls.crops(plan, SourceStats((28, 36, 28), 1), cls.Config())
    with pytest.raises(NnsslError, match="3 stages"):
        make_robust(levels=4)
    with pytest.raises(NnsslError, match="multiple of 4"):
        cls.crops(plan, STATS, cls.Config(), (10, 12, 12))


def test_the_trace_has_views_that_training_does_not_use(make_robust):
    from nnssl.transferability import choose_families

    cls = get_method("robust")
    for modality in ("ct", "mr"):
        left = choose_families(modality, exclude=cls.view_families)
        assert len(left) >= 2 and not set(left) & set(cls.view_families)


# --- against loops ----------------------------------------------------------------------------------------------------


def pair_of(method, n=6):
    g = torch.Generator().manual_seed(5)
    a = torch.randn(n, 1, *method.request.size, generator=g)
    b = 2 * a + torch.randn(a.shape, generator=g) + torch.linspace(0, 1, n).view(-1, 1, 1, 1, 1)
    return {"a": a, "b": b, "still": a, "case": torch.tensor([4, 4, 1, 2, 3, 0])[:n]}


@torch.no_grad()
def test_the_deepest_stages_are_compared(make_robust):
    method = make_robust(levels=1)
    x = pair_of(method)["a"]
    skips = forward_features(method.network, x, 0).skips
    (only,) = method.features(x)
    assert torch.equal(only, pool(skips[-1], "grid", grid=2))
    two = make_robust(levels=2).features(x)
    assert [f.shape[1] for f in two] == [8 * 8, 16 * 8] and torch.equal(two[1], only)
    torch.testing.assert_close(make_robust(batch_standardise=False).embed({"still": x}), only)


@torch.no_grad()
@pytest.mark.parametrize("together", [True, False])
def test_total_is_the_mean_over_levels_and_both_directions(make_robust, together):
    """Features standardised over both views at once; each view in turn is the anchor. A loop over pairs of crops."""
    method = make_robust(levels=2, margin=0.4, temperature=0.2, batch_standardise=together)
    batch, m, t = pair_of(method), 0.4, 0.2
    case, directions, same, other, found, hinges = batch["case"].tolist(), [], [], [], [], []
    for a, b in zip(method.features(batch["a"]), method.features(batch["b"])):
        if together:
            both = torch.cat([a, b])
            both = (both - both.mean(0)) / (both.var(0, unbiased=False) + 1e-5).sqrt()
            a, b = both[:6], both[6:]
        for q, p in ((a, b), (b, a)):
            table = [[1 - float(q[i] @ p[j] / q[i].norm() / p[j].norm()) for j in range(6)] for i in range(6)]
            total = 0.0
            for i in range(6):
                far = [table[i][j] for j in range(6) if case[j] != case[i]]
                total += t * math.log(1 + sum(math.exp((table[i][i] - f + m) / t) for f in far)) / 6
                same.append(table[i][i])
                other.append(sum(far) / len(far))
                found.append(all(table[i][i] < f for f in far))
                hinges += [table[i][i] - f + m > 0 for f in far]
            directions.append(total)
    assert abs(directions[0] - directions[1]) > 1e-5 and abs(directions[2] - directions[3]) > 1e-5
    terms = method(batch)
    assert float(terms["total"]) == pytest.approx(sum(directions) / 4, rel=1e-5)
    for name, values in (("distance_same", same), ("distance_other", other), ("nearest", found), ("active", hinges)):
        assert float(terms[name]) == pytest.approx(sum(values) / len(values), rel=1e-4, abs=1e-6), name


def test_gamma_keeps_what_lies_outside_of_the_range_and_noise_is_small(make_robust):
    class Fixed(StepRNG):
        """Each number at three quarters of its range."""

        def uniform(self, low, high, *shape):
            return torch.full((self.count, *shape), low + 0.75 * (high - low))

    x = torch.tensor([-0.2, 0.0, 0.25, 1.0, 1.3]).view(1, 1, 5, 1, 1).expand(2, 1, 5, 2, 2)
    unit = torch.tensor([0.0, 1.0]).expand(2, 1, 2)
    still = {"blur": 0.0, "jitter": 0.0}
    bent = make_robust(noise=0.0, gamma=0.3, **still)._augment(x, unit, Fixed(0, 0, 2))
    expected = torch.tensor([-0.2, 0.0, 0.25 ** math.exp(0.15), 1.0, 1.3])
    torch.testing.assert_close(bent[0, 0, :, 0, 0], expected, atol=1e-5, rtol=0)
    flat = torch.zeros(2, 1, 16, 20, 18)
    noisy = make_robust(noise=0.1, gamma=0.0, **still)._augment(flat, unit, Fixed(0, 0, 2))
    assert float(noisy.std()) == pytest.approx(0.075, rel=0.03)
