"""The evaluator, its views, the schedule and the verdict: P13, P14, P15 and what follows from a trace."""

import json
import math

import numpy as np
import pytest
import torch
from torch import nn

from nnssl.errors import NnsslError
from nnssl.networks import set_padding
from nnssl.transferability import (
    Baseline,
    RobustnessConfig,
    RobustnessEvaluator,
    RobustnessMonitor,
    RobustnessResult,
    Schedule,
    Stopper,
    choose_families,
    judge,
    photometric_view,
    plan_schedule,
    pool,
    random_baseline,
    robustness_loss,
    separate,
)


class Encoder(nn.Module):
    """Three stages, with dropout and InstanceNorm."""

    def __init__(self, channels=1, dropout=0.5):
        super().__init__()
        self.stages = nn.ModuleList()
        for a, b in ((channels, 4), (4, 8), (8, 8)):
            block = nn.Conv3d(a, b, 3, stride=2, padding=1), nn.InstanceNorm3d(b, affine=True), nn.LeakyReLU()
            self.stages.append(nn.Sequential(*block, nn.Dropout(dropout)))

    def forward(self, x):
        out = []
        for stage in self.stages:
            x = stage(x)
            out.append(x)
        return out


class Net(nn.Module):
    def __init__(self, channels=1, dropout=0.5):
        super().__init__()
        self.encoder = Encoder(channels, dropout)
        self.head = nn.Conv3d(8, 1, 1)

    def forward(self, x):
        return self.head(self.encoder(x)[-1])


def volumes(n=6, channels=1, size=(16, 24, 16), seed=0):
    """Smooth random volumes: structure on several scales."""
    g = torch.Generator().manual_seed(seed)
    coarse = torch.randn(n, channels, 4, 4, 4, generator=g)
    x = nn.functional.interpolate(coarse, size=size, mode="trilinear", align_corners=True)
    return x + 0.1 * torch.randn(n, channels, *size, generator=g)


@pytest.fixture
def evaluator():
    return RobustnessEvaluator(volumes())


def test_equals_the_pure_functions(evaluator):
    net = Net().eval()
    result = evaluator.evaluate(net)
    with torch.no_grad():
        q, p = (pool(net.encoder(v)[-2], "grid", grid=2).double() for v in evaluator.views)
    s = separate(q, p)
    assert result.loss == pytest.approx(float(robustness_loss(s, 0.5)), abs=1e-6)
    assert result.score == pytest.approx(0.5 - result.loss)
    assert result.margins[1.0] == pytest.approx(float(robustness_loss(s, 1.0)), abs=1e-6)
    assert np.mean(result.per_crop) == pytest.approx(result.loss) and result.shape == (8, 4, 6, 4) and result.n == 6


def test_p13_evaluating_leaves_no_trace(evaluator):
    net = Net()
    net.encoder.stages[1].eval()  # a part that was frozen stays frozen
    net(volumes(2)).sum().backward()
    gradients = [None if p.grad is None else p.grad.clone() for p in net.parameters()]
    modes = [m.training for m in net.modules()]
    torch.manual_seed(5)
    np.random.seed(5)
    states = torch.get_rng_state(), np.random.get_state()[1].copy()
    first, second = evaluator.evaluate(net), evaluator.evaluate(net)
    assert first.metrics() == second.metrics() and first.per_crop == second.per_crop
    assert [m.training for m in net.modules()] == modes
    assert torch.equal(torch.get_rng_state(), states[0]) and (np.random.get_state()[1] == states[1]).all()
    for p, g in zip(net.parameters(), gradients):
        assert (p.grad is None) == (g is None) and (g is None or torch.equal(p.grad, g))
    assert torch.is_grad_enabled()


def test_p13_training_is_the_same_with_and_without(evaluator):
    def losses(watch):
        torch.manual_seed(0)
        net, x = Net(), volumes(4, seed=1)
        optimiser = torch.optim.SGD(net.parameters(), lr=0.1)
        out = []
        for _ in range(4):
            loss = (net(x + 0.1 * torch.randn_like(x)) - 1).square().mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            out.append(float(loss.detach()))
            if watch:
                evaluator.evaluate(net)
                random_baseline(evaluator, Net, k=2)
        return out

    assert losses(True) == losses(False)


def test_p14_bfloat16_features_and_dead_networks(evaluator, caplog):
    def half(x):
        return [x, x.bfloat16()[:, :, ::4, ::4, ::4], x]

    assert math.isfinite(evaluator.evaluate(half).loss)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        net = Net(dropout=0.0)
        inside = evaluator.evaluate(net).loss
    assert inside == evaluator.evaluate(net).loss
    for dead in (lambda x: [0 * x] * 3, lambda x: [x * math.nan] * 3):
        caplog.clear()
        result = RobustnessEvaluator(volumes()).evaluate(dead)
        assert math.isnan(result.loss) and result.degenerate == 6 and result.per_crop == ()
        assert "6 of 6 crops" in caplog.text


def test_p15_affine_views_do_nothing_behind_instance_norm(caplog):
    x = volumes(16)
    torch.manual_seed(0)
    encoder = Encoder(dropout=0.0)
    encoder.stages[0][0] = nn.Conv3d(1, 4, 3, stride=2)  # zero padding is not affine
    weak = RobustnessEvaluator(x)
    weak.views = (x, 1.1 * x + 0.1)
    ours = RobustnessEvaluator(x)
    for stage in encoder.stages:
        stage[1].eps = 1e-12
    assert weak.evaluate(encoder).positive < 1e-6 and "look the same" in caplog.text
    caplog.clear()
    assert ours.evaluate(encoder).positive > 1e-3 and "look the same" not in caplog.text


def test_global_pooling_is_blind_and_the_grid_is_not():
    torch.manual_seed(0)
    net, x = Net(dropout=0.0), volumes(16)
    negative = {
        p: RobustnessEvaluator(x, RobustnessConfig(pooling=p)).evaluate(net).negative for p in ("gap", "grid", "flat")
    }
    assert negative["gap"] < 0.1 * negative["grid"] < 0.1 * negative["flat"]


def test_few_cases_and_bad_input(caplog):
    RobustnessEvaluator(volumes(6))
    assert "6 cases only" in caplog.text
    with pytest.raises(NnsslError, match="at least 2"):
        RobustnessEvaluator(volumes(1))
    broken = volumes(4)
    broken[1, 0, 3, 3, 3] = math.inf
    with pytest.raises(NnsslError, match="infinite"):
        RobustnessEvaluator(broken)
    with pytest.raises(NnsslError, match="3 stages only"):
        RobustnessEvaluator(volumes(), RobustnessConfig(level=-4)).evaluate(Net())


def test_crops_of_one_case_are_not_compared():
    x = volumes(4)
    result = RobustnessEvaluator(x, groups=["a", "a", "b", "b"]).evaluate(Net())
    assert len(result.per_crop) == 4
    with pytest.raises(NnsslError, match="one case"):
        RobustnessEvaluator(x, groups=["a"] * 4).evaluate(Net())


@pytest.mark.parametrize("family", ["gamma", "bias", "window", "blur", "lowres", "noise"])
def test_each_family_changes_each_volume_by_its_own_draw(family):
    x = volumes(4, channels=2, size=(8, 12, 10))
    a, b = (photometric_view(x, 0, v, families=[family]) for v in (0, 1))
    assert a.shape == x.shape and a.dtype == torch.float32 and torch.isfinite(a).all()
    for i in range(4):
        change = (a[i] - x[i]).abs().mean()
        assert 1e-4 < change < 0.8 * x[i].std(), family
        assert not torch.equal(a[i], b[i])
    assert torch.equal(a, photometric_view(x, 0, 0, families=[family]))
    assert torch.equal(a[:2], photometric_view(x[:2], 0, 0, families=[family]))
    same = photometric_view(x[:1].repeat(2, 1, 1, 1, 1), 0, 0, families=[family])
    assert not torch.equal(same[0], same[1])


def test_views_in_2d_and_on_thick_slices():
    x = volumes(3, size=(16, 12, 8))[:, :, 0]
    assert photometric_view(x, 0, 0).shape == x.shape
    thick = volumes(2, size=(4, 16, 12))
    for family in ("blur", "lowres"):
        thin = photometric_view(thick, 0, 0, families=[family], spacing=(5, 1, 1))
        flat = photometric_view(thick[:, :, 1], 0, 0, families=[family], spacing=(1, 1))
        torch.testing.assert_close(thin[:, :, 1], flat)  # nothing leaks along the thick axis


def test_families_follow_the_modality_and_leave_out_what_training_uses():
    assert "window" in choose_families("ct") and "gamma" not in choose_families("ct")
    assert choose_families("mr", exclude=("gamma", "noise", "blur")) == ("bias", "lowres")
    assert choose_families("mr", exclude=("gamma", "bias", "blur", "lowres", "noise")) == ("window",)
    with pytest.raises(NnsslError, match="none is left"):
        choose_families("ct", exclude=("window", "blur", "lowres", "noise"))
    with pytest.raises(NnsslError, match="Did you mean 'gamma'"):
        choose_families("mr", exclude=("gama",))


# --- schedule ---------------------------------------------------------------------------------------------------------


def test_schedule_of_a_usual_run_keeps_the_budget():
    s = plan_schedule(200, 250 * 8, available=40)
    assert (s.crops, s.every) == (40, 5) and s.share <= 0.03
    assert [e for e in range(41) if s.due(e)] == [0, 1, 2, 5, 10, 15, 20, 25, 30, 35, 40] and s.due(200)
    assert s == Schedule.from_dict(json.loads(json.dumps(s.to_dict())))
    assert plan_schedule(200, 250 * 8, available=1000).crops == 64
    assert plan_schedule(2000, 2000, available=65).every == 40


def test_schedule_of_short_runs():
    for per_epoch in (100, 200, 400, 800, 1600):
        s = plan_schedule(10, per_epoch, available=100)
        if s is not None:
            assert s.share <= 0.03 and s.evaluations >= 3 and s.crops >= 8
    assert plan_schedule(2, 16, available=100) is None
    assert plan_schedule(100, 2000, available=1) is None
    asked = plan_schedule(4, 16, available=100, every=1)
    assert asked.evaluations == 5 and asked.crops == 16 and asked.share > 0.03
    with pytest.raises(NnsslError, match="at least 1"):
        plan_schedule(4, 16, available=100, every=0)


# --- verdict ----------------------------------------------------------------------------------------------------------


def baseline(mean=0.4, sd=0.01, n=20, k=5, seed=0):
    rng = np.random.default_rng(seed)
    crops = rng.normal(0, 0.05, n)
    inits = np.linspace(-1, 1, k) * sd
    rows = tuple(tuple(mean + crops + i) for i in inits)
    return Baseline(tuple(float(np.mean(r)) for r in rows), rows)


def test_verdicts():
    b = baseline()
    for shift, kind in ((-0.2, "pretraining_supported"), (0.0, "no_evidence"), (0.2, "worse_than_init")):
        crops = [v + shift + 0.02 * (-1) ** i for i, v in enumerate(b.per_crop[2])]
        v = judge(b, float(np.mean(crops)), crops, epoch=7)
        assert v.kind == kind and v.gain == pytest.approx(-shift, abs=1e-6) and v.low < v.gain < v.high
        assert "after epoch 7" in v.sentence and "no proof" in v.sentence and "5 random" in v.sentence
    assert "20 cases" not in judge(b, 0.1, crops, epoch=1).sentence
    assert "4 cases are few" in judge(baseline(n=4), 0.1, [0.1] * 4, epoch=1).sentence
    assert "by construction" in judge(b, 0.1, crops, epoch=1, coupled=True).sentence
    assert judge(b, math.nan, (), epoch=1).kind == "unknown"
    noisy = [v + (-0.5 if i == 0 else 0.0) for i, v in enumerate(b.per_crop[2])]  # one case alone is no evidence
    assert judge(baseline(sd=1e-3), float(np.mean(noisy)), noisy, epoch=1).kind == "no_evidence"


def test_bootstrap_interval_against_scipy():
    stats = pytest.importorskip("scipy.stats")
    b = baseline(n=30)
    crops = np.random.default_rng(3).normal(0.3, 0.05, 30)
    v = judge(b, float(crops.mean()), crops, epoch=1)
    difference = np.mean(b.per_crop, axis=0) - crops
    ours = stats.bootstrap((difference,), np.mean, method="percentile", random_state=0).confidence_interval
    assert (v.low, v.high) == pytest.approx((ours.low, ours.high), abs=5e-3)


# --- monitor ----------------------------------------------------------------------------------------------------------


def result(loss, n=20, seconds=0.1):
    crops = tuple([loss] * n) if math.isfinite(loss) else ()
    return RobustnessResult(loss, 0.5 - loss, 0.1, 0.3, crops, {0.5: loss}, 0.0, loss, n, (8, 4, 4, 4), 0, seconds)


def monitor(patience=2, stop=True, n=20, epochs=10):
    evaluator = RobustnessEvaluator(volumes(n, size=(8, 16, 8)))
    return RobustnessMonitor(evaluator, Schedule(epochs, 1, n), Stopper(patience=patience, warmup=1), stop=stop)


def test_monitor_from_start_to_verdict():
    m = monitor()
    m.measure_baseline(Net, k=5)
    net = Net()
    assert m.due(0) and set(m.evaluate(net, 0)) >= {"loss", "score"} and not m.improved and not m.due(0)
    for epoch, value in enumerate((0.3, 0.1, 0.2, 0.15), start=1):
        m.record(epoch, result(value))
    assert m.best_epoch == 2 and m.stop_now() and "supports" in m.verdict()
    took = sum(r["seconds"] for r in m.trace) + m.state_dict()["baseline_seconds"]
    assert m.share(100) == pytest.approx(took / 100) and m.share(0) == 0
    summary = json.loads(json.dumps(m.summary()))
    assert [row["epoch"] for row in summary["trace"]] == [0, 1, 2, 3, 4] and len(summary["baseline"]) == 5
    from matplotlib.figure import Figure

    ax = Figure().subplots()
    m.plot(ax)
    assert len(ax.lines) == 3 and len(ax.patches) == 1


def test_monitor_resumes_to_the_same_decision():
    trace = (0.4, 0.3, 0.2, math.nan, 0.25, 0.21)
    whole = monitor()
    for epoch, value in enumerate(trace):
        whole.record(epoch, result(value))
    for cut in range(1, len(trace)):
        first, second = monitor(), monitor()
        for epoch, value in enumerate(trace[:cut]):
            first.record(epoch, result(value))
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert not second.due(cut - 1) and second.due(cut)
        for epoch, value in enumerate(trace[cut:], start=cut):
            second.record(epoch, result(value))
        assert second.stop_now() and whole.stop_now()
        assert json.dumps(second.state_dict()) == json.dumps(whole.state_dict())
    other = RobustnessMonitor(RobustnessEvaluator(volumes(20, seed=9, size=(8, 16, 8))), Schedule(10, 1, 20))
    with pytest.raises(NnsslError, match="other crops"):
        other.load_state_dict(whole.state_dict())


def test_monitor_does_not_stop_on_few_cases_or_unasked():
    for m in (monitor(n=6), monitor(stop=False)):
        for epoch in range(6):
            m.record(epoch, result(0.1 + epoch))
        assert m.stopper.stop and not m.stop_now()
    assert "no usable evaluation" in monitor().verdict()


def test_monitor_slows_down_where_the_budget_is_exceeded():
    m = monitor(epochs=100)
    m.record(0, result(0.4, seconds=1.0))
    assert not m.calibrate(epoch_seconds=40.0)
    assert m.calibrate(epoch_seconds=10.0)  # 3 % of 1000 s pay for 30 measurements, 5 of them random initialisations
    assert 5 <= m.schedule.every <= 6 and m.schedule.evaluations + 5 <= 30
    assert m.calibrate(epoch_seconds=1e-3) and m.schedule.due(100)


def test_measured_with_the_padding_of_fine_tuning(evaluator):
    """Whatever a pretraining pads with, the numbers are those of the network as nnU-Net builds it from the file."""
    torch.manual_seed(0)
    network = Net(dropout=0.0)
    expected = evaluator.evaluate(network).metrics()
    set_padding(network, "replicate")
    assert evaluator.evaluate(network).metrics() == expected
    assert {m.padding_mode for m in network.modules() if isinstance(m, nn.Conv3d)} == {"replicate"}
