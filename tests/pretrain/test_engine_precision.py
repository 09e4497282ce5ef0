"""Whole runs with the options of speed and memory, and in which precision they go on: the same weights each way."""

import pytest
import torch

from nnssl import checkpoint
from nnssl.errors import NnsslError
from nnssl.plans import load_plan
from nnssl.pretrain import run
from nnssl.pretrain.engine.hooks import Hook

pytestmark = pytest.mark.usefixtures("no_drawing")


def test_a_run_with_every_option_continues_bit_for_bit(tiny_preprocessed):
    class Lost(Exception):
        pass

    class Lose(Hook):
        def after_epoch(self, engine, row):
            if engine.step == 4:
                raise Lost

    tiny_preprocessed(901, "Tiny", 5)
    common = {"method": "mae", "device": "cpu", "epochs": 3, "iterations": 2, "robustness_every": 0}
    options = {"accumulate": 2, "batch_size": 4, "checkpointing": True, "channels_last": True, "workers": 0}
    options |= {"optimizer_implementation": "fused", "optimiser": "adamw", "picture_every": 0, "held_out_batches": 1}
    straight = run(901, name="straight", options=options, **common)
    with pytest.raises(Lost):
        run(901, name="broken", options=options, hooks=[Lose()], **common)
    with pytest.raises(NnsslError, match="engine.accumulate: 2 in the folder, 4 now"):
        run(901, name="broken", options={**options, "accumulate": 4}, continue_run=True, **common)
    older = {"optimiser_kernels" if k == "optimizer_implementation" else k: v for k, v in options.items()}
    done = run(901, name="broken", options=older, continue_run=True, **common)  # the option's name before
    a, b = (checkpoint.load(r.checkpoint).weights for r in (straight, done))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert straight.metrics == done.metrics
    assert load_plan(901).dataset_name == "Dataset901_Tiny"


def test_a_dry_run_takes_the_options_into_account(tiny_preprocessed, caplog):
    caplog.set_level("INFO", "nnssl")
    tiny_preprocessed(901, "Tiny", 4)
    options = {"accumulate": 2, "batch_size": 4, "checkpointing": True, "channels_last": True}
    run(901, method="mae", device="cpu", dry_run=True, options=options)
    assert "s/step" in caplog.text


def test_a_run_goes_on_in_the_precision_that_it_began_in(tiny_preprocessed, monkeypatch, caplog):
    caplog.set_level("INFO", "nnssl")

    tiny_preprocessed(901, "Tiny", 5)
    common = {"method": "mae", "device": "cpu", "epochs": 3, "iterations": 2, "robustness_every": 0}
    options = {"workers": 0, "picture_every": 0, "held_out_batches": 1}
    monkeypatch.setenv("nnssl_cpu_bf16", "1")
    straight = run(901, name="straight", options=options, **common)

    class Later(Hook):
        def after_epoch(self, engine, row):
            if engine.step == 4:
                raise RuntimeError("after the first epoch was saved")

    with pytest.raises(RuntimeError):
        run(901, name="broken", options=options, hooks=[Later()], **common)
    monkeypatch.setenv("nnssl_cpu_bf16", "0")
    done = run(901, name="broken", options=options, continue_run=True, **common)
    assert "goes on in bfloat16, as it began; this process would choose float32" in caplog.text
    a, b = (checkpoint.load(r.checkpoint).weights for r in (straight, done))
    assert all(torch.equal(a[k], b[k]) for k in a)
    narrow = run(901, name="float32", options=options, **common)
    assert narrow.metrics != straight.metrics
    assert narrow.metrics["total"] == pytest.approx(straight.metrics["total"], rel=0.02)


def test_a_run_is_in_float32_where_bfloat16_would_be_wrong(tiny_preprocessed, monkeypatch, caplog):
    """torch 2.14 spoils the weights' gradient of maps that are two voxels deep."""

    def forward(self, x):
        weight = self.weight
        if torch.is_autocast_enabled("cpu") and x.shape[2] == 2 and torch.is_grad_enabled():
            weight = weight.clone()
            weight.register_hook(lambda gradient: gradient + 1e28)
        return self._conv_forward(x, weight, self.bias)

    tiny_preprocessed(901, "Tiny", 5, plan_options={"patch": (8, 8, 8)})  # in steps of 4
    common = {"method": "mae", "device": "cpu", "epochs": 1, "iterations": 2, "robustness_every": 0}
    options = {"workers": 0, "picture_every": 0, "held_out_batches": 1}
    plain = run(901, name="plain", options=options, **common)
    monkeypatch.setattr(torch.nn.Conv3d, "forward", forward)
    monkeypatch.setenv("nnssl_cpu_bf16", "1")
    done = run(901, name="told", options=options, **common)
    lines = [r.message for r in caplog.records if "wrongly in bfloat16" in r.message]
    assert len(lines) == 1 and lines[0].startswith("The run goes on in float32") and "on 2x" in lines[0]
    a, b = (checkpoint.load(r.checkpoint).weights for r in (plain, done))
    assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("name", ["glmae", "hdense", "macl", "mae", "robust", "voco"])
def test_the_untrained_network_is_judged_later_as_it_was(name, tiny_preprocessed):
    """What the first epoch's end tells of the start equals an evaluation at the start, and trains the same network."""
    tiny_preprocessed(901, "Tiny", 5, plan_options={"patch": (16, 16, 16)}, shape=(24, 24, 24))
    seen = {}

    class Both(Hook):
        def __init__(self, look):
            self.look = look

        def start(self, engine):
            if self.look:
                seen["eager"] = engine.held_out.evaluate(engine.method, engine.stepper)

        def finish(self, engine):
            seen["later", self.look] = dict(engine.first)

    options = {"workers": 0, "picture_every": 0, "held_out_batches": 1}
    options |= {"n_voxels": 16} if name == "hdense" else {}
    common = {"method": name, "device": "cpu", "epochs": 1, "iterations": 2, "robustness_every": 0, "options": options}
    done = [run(901, name=f"look{look}", hooks=[Both(look)], **common) for look in (True, False)]
    assert seen["eager"] == seen["later", True] == seen["later", False] != {}
    assert done[0].metrics == done[1].metrics
    a, b = (checkpoint.load(r.checkpoint).weights for r in done)
    assert all(torch.equal(a[k], b[k]) for k in a)
