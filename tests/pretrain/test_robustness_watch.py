"""Robustness inside a pretraining: trace, best checkpoint, stop, verdict, resume; training is not touched."""

import json
import logging

import pytest
import torch

from nnssl import checkpoint
from nnssl.errors import NnsslError
from nnssl.pretrain import run
from nnssl.pretrain.engine import watch
from nnssl.pretrain.engine.hooks import Hook
from nnssl.pretrain.engine.watch import RobustnessHook
from nnssl.transferability import RobustnessResult, Stopper

SMALL = {"workers": 0, "held_out_batches": 0, "batch_size": 4, "log_every": 0}


@pytest.fixture
def dataset(tiny_preprocessed):
    """Unlabelled 500 to learn from, six cases; 501 with the plans."""
    return tiny_preprocessed(501, "Target", 4, plan_options={"features": (4, 4, 8), "patch": (16, 16, 16)})


@pytest.fixture
def go(dataset, tiny_raw_dataset):
    tiny_raw_dataset(500, "Source", 6, labelled=False, shape=(20, 24, 20))

    def start(hook, name=None, **options):
        defaults = {"method": "robust", "target": 501, "device": "cpu", "epochs": 3, "iterations": 2, "processes": 1}
        hooks = [] if hook is None else [hook]
        return run(500, name=name, hooks=hooks, options=SMALL, **{**defaults, **options})

    return start


def rows(result, kind="epoch"):
    lines = (result.folder / "metrics.jsonl").read_text().splitlines()
    return [r for r in map(json.loads, lines) if r["event"] == kind]


def fake(losses):
    """Results in place of measurements: the first ones are the random initialisations'."""
    values = iter(losses)

    def evaluate(self, network):
        loss = next(values)
        return RobustnessResult(
            loss, 0.5 - loss, 0.1, 0.3, (loss,) * 4, {0.5: loss}, 0.0, loss, 4, (8, 4, 4, 4), 0, 0.01
        )

    return evaluate


def test_trace_checkpoint_verdict_and_the_same_training(go, caplog):
    caplog.set_level(logging.INFO, "nnssl")
    hook = RobustnessHook(every=1)
    watched = go(hook, "watched")
    plain = go(None, "plain")
    trace = [r["robustness/loss"] for r in rows(watched)]
    assert len(trace) == 3 and all(0 < v < 2 for v in trace)
    zero = rows(watched, "robustness")[0]
    assert zero["epoch"] == 0 and len(zero["random_inits"]) == 5 and zero["loss"] > 0
    assert [r["train/total"] for r in rows(watched)] == [r["train/total"] for r in rows(plain)]
    a, b = checkpoint.load(watched.checkpoint), checkpoint.load(plain.checkpoint)
    assert all(torch.equal(a.weights[k], b.weights[k]) for k in b.weights)
    kept = a.nnssl["robustness"]
    assert [r["epoch"] for r in kept["trace"]] == [0, 1, 2, 3] and kept["crops"]["n"] == 4
    assert not any("case_" in json.dumps(v) for v in (kept, zero))
    assert callable(hook.panel()) and RobustnessHook().panel() is None
    best = checkpoint.load(watched.folder / watch.ROBUST_CHECKPOINT)
    assert best.nnssl["step"] == 2 * kept["best_epoch"] and best.training is None
    assert min(r["loss"] for r in kept["trace"][1:]) == kept["trace"][kept["best_epoch"]]["loss"]
    assert "Robustness" in watched.sentence and "by construction" in watched.sentence and "%" in watched.sentence
    assert "images of Dataset501_Target" in caplog.text and "views by bias, lowres" in caplog.text
    assert "robustness" not in b.nnssl and not (plain.folder / watch.ROBUST_CHECKPOINT).exists()


def test_held_out_cases_where_the_target_itself_is_learnt_from(go, caplog):
    caplog.set_level(logging.INFO, "nnssl")
    result = run(501, method="robust", device="cpu", epochs=1, iterations=1, options=SMALL, hooks=[RobustnessHook()])
    assert result.finished and "Robustness is not measured" in caplog.text  # one held-out case
    with pytest.raises(NnsslError, match="--stop robustness"):
        run(
            501,
            method="robust",
            device="cpu",
            epochs=1,
            iterations=1,
            options=SMALL,
            name="s",
            hooks=[RobustnessHook(stop=True)],
        )


def test_a_short_run_is_not_measured_unless_asked(go, caplog):
    caplog.set_level(logging.INFO, "nnssl")
    result = go(RobustnessHook())
    assert (
        "too short" in caplog.text and "robustness/loss" not in rows(result)[0] and "Robustness" not in result.sentence
    )


def test_stop(go, monkeypatch):
    monkeypatch.setattr(watch.RobustnessEvaluator, "evaluate", fake([0.4] * 5 + [0.4, 0.3, 0.2, 0.25, 0.26, 0.1]))
    monkeypatch.setattr(watch, "PATIENCE", 2)
    monkeypatch.setattr(watch, "FEW_CASES", 2)
    monkeypatch.setattr("nnssl.transferability.monitor.FEW_CASES", 2)
    result = go(RobustnessHook(every=1, stop=True), epochs=9)
    assert len(rows(result)) == 4 and result.finished and result.checkpoint.exists()
    assert checkpoint.load(result.checkpoint).nnssl["step"] == 8
    assert checkpoint.load(result.folder / watch.ROBUST_CHECKPOINT).nnssl["step"] == 4
    assert "epoch 2 is checkpoint_robust.pth" in result.sentence


def test_few_cases_do_not_stop_a_run(go, monkeypatch, caplog):
    monkeypatch.setattr(watch.RobustnessEvaluator, "evaluate", fake([0.4] * 5 + [0.4, 0.2, 0.3, 0.3, 0.3, 0.3, 0.3]))
    monkeypatch.setattr(watch, "PATIENCE", 1)
    result = go(RobustnessHook(every=1, stop=True), epochs=4)
    assert len(rows(result)) == 4 and "will not stop this run" in caplog.text


class Kill(Hook):
    """Ends a run after an epoch as a signal would, once its checkpoint is there."""

    name = "kill"

    def __init__(self, after):
        self.after = after

    def after_epoch(self, engine, row):
        if row["epoch"] == self.after + 1:
            raise KeyboardInterrupt


def test_a_continued_run_goes_on_with_its_trace(go):
    straight = go(RobustnessHook(every=1), "straight", epochs=4)
    with pytest.raises(KeyboardInterrupt):
        run(
            500, method="robust", target=501, device="cpu", epochs=4, iterations=2, options=SMALL, name="broken",
            hooks=[Kill(1), RobustnessHook(every=1)],
        )  # fmt: skip
    hook = RobustnessHook()  # --c alone keeps what the run began with
    resumed = run(
        500, method="robust", target=501, device="cpu", continue_run=True, name="broken", hooks=[Kill(9), hook]
    )
    assert hook.every == 1
    ours, theirs = (checkpoint.load(r.checkpoint).nnssl["robustness"] for r in (straight, resumed))
    for row in (*ours["trace"], *theirs["trace"]):
        row.pop("seconds")
    assert ours == theirs
    robust = [checkpoint.load(r.folder / watch.ROBUST_CHECKPOINT).weights for r in (straight, resumed)]
    assert all(torch.equal(robust[0][k], robust[1][k]) for k in robust[0])


def test_settings(monkeypatch):
    with pytest.raises(NnsslError, match="-1"):
        RobustnessHook(every=-1)
    with pytest.raises(NnsslError, match="--stop robustness needs"):
        RobustnessHook(every=0, stop=True)
    hook = RobustnessHook(stop=False)
    hook.load_state_dict({"every": 7, "stop": True})
    monkeypatch.setattr(watch, "rank", lambda: 1)  # which measures nothing
    hook.start(None)
    assert (hook.every, hook.stop) == (7, False)
    assert RobustnessHook().state_dict() == {"every": None, "stop": None} and RobustnessHook().checkpoint_info() == {}
    assert Stopper().patience == watch.PATIENCE
