"""The loop, its folder and its resume, with an objective small enough to run in milliseconds."""

import json
import os
import signal
import subprocess
import sys
import textwrap

import pytest
import torch

from nnssl import checkpoint
from nnssl.errors import NnsslError
from nnssl.networks import build_network, canonical_state_dict
from nnssl.plans import load_plan
from nnssl.pretrain import run
from nnssl.pretrain.engine.evaluate import effective_rank, embedding_sd
from nnssl.pretrain.engine.hooks import Hook
from nnssl.pretrain.engine.loop import NonFiniteError
from nnssl.pretrain.methods import registry

TOY = """
from dataclasses import dataclass
import torch
from torch import nn
from nnssl.pretrain.methods import CropRequest, Method, Picture, option, register

@dataclass(frozen=True)
class ToyConfig:
    lr: float = option(1e-2, "learning rate", low=0)
    weight_decay: float = option(0.0, "weight decay", low=0)
    break_at: int = option(-1, "step with a NaN")

@register("toy", config=ToyConfig)
class Toy(Method):
    title = "predicts the mean of a crop from its bottleneck (for tests)"
    citation = ("nobody",)
    presets = {"slow": {"lr": 1e-4}}

    def __init__(self, network, plan, request, config):
        super().__init__(network, plan, request, config)
        self.head = nn.Linear(plan.features[-1], 1)
        self.drop = nn.Dropout(0.2)
        self.register_buffer("steps_seen", torch.zeros((), dtype=torch.int64))
        for name, p in network.named_parameters():
            p.requires_grad = not name.startswith("decoder.") or name.startswith("decoder.encoder")

    @classmethod
    def crops(cls, plan, stats, config, size=None):
        size = size or plan.total_stride
        size = tuple(2 * s if size == plan.total_stride else s for s in size)
        return CropRequest(size=size, read_size=size, batch_size=4, min_batch=2)

    def views(self, crops, rng):
        noise = 0.1 * rng.noise(*crops.data.shape[1:])
        return {"x": crops.data + noise, "y": crops.data.mean(dim=tuple(range(1, crops.data.ndim)))}

    def loss(self, batch):
        z = self.network.encoder(batch["x"])[-1].flatten(2).amax(-1)
        error = (self.head(self.drop(z))[:, 0] - batch["y"]) ** 2
        total = error.mean()
        if int(self.steps_seen) == self.config.break_at:
            total = total * float("nan")
        return {"total": total, "mse": error.mean().detach()}

    def after_step(self, progress):
        self.steps_seen += 1
        assert progress.step == int(self.steps_seen)

    def pretrained_parts(self):
        return {"encoder": True, "decoder_stages": []}

    def embed(self, batch):
        return self.network.encoder(batch["x"])[-1].flatten(2).amax(-1)

    def pictures(self, batch):
        return Picture({"x": batch["x"][:, 0, batch["x"].shape[2] // 2].cpu().numpy()}, "the crop")
"""


@pytest.fixture(autouse=True)
def toy():
    namespace = {"__name__": "toy_method"}
    exec(compile(TOY, "toy_method.py", "exec"), namespace)
    sys.modules["toy_method"] = type(sys)("toy_method")
    vars(sys.modules["toy_method"]).update(namespace)
    yield namespace["Toy"]
    registry._METHODS.pop("toy", None)


@pytest.fixture
def dataset(tiny_preprocessed, no_drawing):
    return tiny_preprocessed(901, "Tiny", 6)


def go(**options):
    defaults = {"method": "toy", "device": "cpu", "epochs": 2, "iterations": 2, "options": {"workers": 0}}
    return run(901, **{**defaults, **options})


def weights(path):
    return checkpoint.load(path).weights


def test_a_run_leaves_what_the_contract_says(tiny_preprocessed, nnunet_env):
    tiny_preprocessed(901, "Tiny", 6)
    result = go(epochs=3, options={"workers": 0, "picture_every": 1, "log_every": 1})
    folder = nnunet_env.results / "Dataset901_Tiny" / "nnsslToy__nnUNetPlans__3d_fullres"
    assert result.folder == folder
    assert result.finished
    names = {p.name for p in folder.iterdir()}
    assert {"checkpoint_latest.pth", "checkpoint_final.pth", "config.json", "progress.png", "metrics.jsonl"} <= names
    assert {f"views_epoch_{i:04d}.png" for i in range(4)} <= names
    assert any(n.startswith("training_log_") for n in names)
    assert not [n for n in names if n.endswith(".tmp")]
    content = torch.load(folder / "checkpoint_final.pth", weights_only=True)
    assert set(content["network_weights"]) == set(build_network(load_plan(901)).state_dict())
    assert "nnssl_training" not in content
    assert content["nnssl"]["method"] == "toy"
    assert content["nnssl"]["pretrained_parts"] == {"encoder": True, "decoder_stages": []}
    assert "case_00" not in str({k: v for k, v in content.items() if k != "network_weights"})
    config = json.loads((folder / "config.json").read_text())
    assert config["identity"]["options"]["lr"] == 1e-2
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [r["event"] for r in rows].count("epoch") == 3
    assert [r["step"] for r in rows if r["event"] == "step"] == list(range(6))
    epoch = [r for r in rows if r["event"] == "epoch"][-1]
    for key in ("train/total", "held_out/total", "lr", "grad_norm", "step_s", "data_wait", "effective_rank"):
        assert key in epoch


def test_the_encoder_learns_and_the_decoder_keeps_its_initial_values(dataset, toy):
    result = go()
    torch.manual_seed(0)
    initial = build_network(load_plan(901))
    initial_state = canonical_state_dict(initial)
    trained = weights(result.checkpoint)
    for name, value in initial_state.items():
        same = torch.equal(trained[name], value)
        if name.startswith("encoder.") and not name.endswith("conv.bias"):
            assert not same, name
        elif name.startswith("decoder."):
            assert same, name


def test_two_plus_two_steps_equal_four_bit_for_bit(dataset):
    straight = go(name="straight", epochs=2)

    class Stop(Exception):
        pass

    class StopAfterOne(Hook):
        def start(self, engine):
            self.old = engine.save

        def after_epoch(self, engine, row):
            if engine.step == 4:
                raise Stop

    with pytest.raises(Stop):
        go(name="broken", hooks=[StopAfterOne()])
    with pytest.raises(NnsslError, match="unfinished. Continue it with --c"):
        go(name="broken")
    resumed = go(name="broken", continue_run=True)
    a, b = weights(straight.checkpoint), weights(resumed.checkpoint)
    assert all(torch.equal(a[k], b[k]) for k in a)
    latest = [checkpoint.load(r.folder / "checkpoint_latest.pth").training for r in (straight, resumed)]
    assert torch.equal(latest[0]["method"]["head.weight"], latest[1]["method"]["head.weight"])
    for x, y in zip(
        latest[0]["stepper"]["optimiser"]["state"].values(), latest[1]["stepper"]["optimiser"]["state"].values()
    ):
        assert torch.equal(x["exp_avg"], y["exp_avg"])
    assert straight.metrics == resumed.metrics


def test_continuing_takes_the_saved_configuration_and_refuses_another(dataset):
    with pytest.raises(NnsslError, match="nothing to continue"):
        go(continue_run=True)
    done = go(seed=3, options={"workers": 0, "lr": "0.02", "preset": "slow"})
    again = run(901, method="toy", device="cpu", continue_run=True)
    assert again.checkpoint == done.checkpoint
    with pytest.raises(NnsslError, match="options.lr: 0.02 in the folder, 0.5 now"):
        run(901, method="toy", device="cpu", continue_run=True, options={"lr": 0.5})
    with pytest.raises(NnsslError, match="another configuration"):
        go()


def test_sigterm_in_the_middle_of_an_epoch_saves_and_the_continued_run_is_the_same(dataset):
    class Terminate(Hook):
        def after_epoch(self, engine, row):
            os.kill(os.getpid(), signal.SIGTERM)

    straight = go(name="straight", iterations=3)
    stopped = go(name="stopped", iterations=3, hooks=[Terminate()])
    assert not stopped.finished
    assert stopped.checkpoint is None
    state = checkpoint.load(stopped.folder / "checkpoint_latest.pth").training
    assert 3 < state["step"] < 6
    resumed = go(name="stopped", iterations=3, continue_run=True)
    a, b = weights(straight.checkpoint), weights(resumed.checkpoint)
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert straight.metrics == resumed.metrics


def test_a_nan_stops_the_run_names_the_cases_and_keeps_the_last_good_checkpoint(dataset):
    with pytest.raises(NonFiniteError, match=r"step 3: total.* is not finite. Cases of the batch: case_00"):
        go(options={"workers": 0, "break_at": 3})
    folder = next(dataset.parent.parent.glob("nnUNet_results/*/nnsslToy*"))
    state = checkpoint.load(folder / "checkpoint_latest.pth")
    assert state.training["step"] == 2
    assert all(torch.isfinite(v).all() for v in state.weights.values())
    assert not (folder / "checkpoint_final.pth").exists()


def test_a_full_disk_while_saving_keeps_the_old_checkpoint(dataset, monkeypatch):
    real = torch.save
    calls = []

    def full(content, file, *args, **kwargs):
        calls.append(1)
        if len(calls) > 2:  # the first is the proof that nnU-Net loads it
            file.write(b"half a checkpoint")
            raise OSError(28, "No space left on device")
        return real(content, file, *args, **kwargs)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(NnsslError, match="No space left on device. The checkpoint saved before is whole"):
        go(epochs=4)
    monkeypatch.undo()


def test_a_hook_ends_the_run_and_has_the_last_word(dataset):
    class Enough(Hook):
        name = "enough"
        seen = 0

        def after_epoch(self, engine, row):
            self.seen += 1
            row["train/seen"] = self.seen
            engine.stop_reason = "enough"

        def state_dict(self):
            return {"seen": self.seen}

        def load_state_dict(self, state):
            self.seen = state.get("seen", 0)

        def checkpoint_info(self):
            return {"seen": self.seen}

        def finish(self, engine):
            return f"Stopped: {engine.stop_reason}."

    result = go(epochs=5, hooks=[Enough()])
    assert result.finished
    assert result.sentence.endswith("Stopped: enough.")
    assert checkpoint.load(result.checkpoint).nnssl["seen"] == 1


def test_the_held_out_loss_leaves_training_alone(dataset):
    a = go(name="with", options={"workers": 0, "held_out_batches": 2})
    b = go(name="without", options={"workers": 0, "held_out_batches": 0})
    x, y = weights(a.checkpoint), weights(b.checkpoint)
    assert all(torch.equal(x[k], y[k]) for k in x)
    assert "No case is held out" in b.sentence


def test_batches_that_cannot_be_are_refused(dataset):
    with pytest.raises(NnsslError, match="batch_size=1: this method needs at least 2"):
        go(options={"batch_size": 1})
    with pytest.raises(NnsslError, match="--epochs 0"):
        go(epochs=0)
    with pytest.raises(NnsslError, match="-o preset=fast: toy has slow"):
        go(options={"preset": "fast"})


def test_a_logger_gets_the_numbers_the_options_and_the_verdict(dataset, monkeypatch):
    pytest.importorskip("mlflow")
    from mlflow.tracking import MlflowClient

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    result = go(logger="mlflow", options={"workers": 0, "log_every": 1})
    client = MlflowClient(tracking_uri=(result.folder / "mlruns").as_uri())
    (run,) = client.search_runs([client.get_experiment_by_name("nnssl").experiment_id])
    history = client.get_metric_history(run.info.run_id, "epoch/held_out/total")
    rows = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
    assert {m.step: m.value for m in history} == {r["step"]: r["held_out/total"] for r in rows if r["event"] == "epoch"}
    assert len(client.get_metric_history(run.info.run_id, "step/total")) == 4 and run.info.status == "FINISHED"
    assert run.data.tags["verdict"] == result.sentence and run.data.metrics["learnt"] == result.learnt
    assert run.data.params["method"] == "toy" and run.data.params["option/lr"] == "0.01"
    assert run.data.params["cases"] == "5" and run.data.params["held_out_cases"] == "1"
    told = "".join(f.read_text(errors="replace") for f in (result.folder / "mlruns").rglob("*") if f.is_file())
    cases = [p.name.removesuffix(".b2nd") for p in dataset.rglob("*.b2nd") if not p.name.endswith("_seg.b2nd")]
    assert cases and not any(case in told for case in cases), "case names stay here"
    with pytest.raises(NnsslError, match="--logger neptune: unknown"):
        go(logger="neptune", name="other")


def test_a_dry_run_writes_nothing(dataset, nnunet_env, caplog):
    caplog.set_level("INFO", "nnssl")
    result = go(dry_run=True)
    assert "s/step" in caplog.text
    assert not result.folder.exists()


def test_embedding_measures():
    torch.manual_seed(0)
    assert embedding_sd(torch.ones(50, 8)) == pytest.approx(0, abs=1e-6)
    assert embedding_sd(torch.randn(5000, 8)) == pytest.approx(1, abs=0.02)
    assert effective_rank(torch.outer(torch.arange(10.0), torch.ones(4))) == pytest.approx(1, abs=1e-4)
    assert effective_rank(torch.cat([torch.eye(4), -torch.eye(4)])) == pytest.approx(4, abs=1e-4)


SCRIPT = TOY + textwrap.dedent("""
    import os, sys
    from nnssl.pretrain import run
    from nnssl.pretrain.engine.hooks import Hook

    class Kill(Hook):
        def after_epoch(self, engine, row):
            if engine.step == 4 and "kill" in sys.argv:
                os.kill(os.getpid(), 9)

    if __name__ == "__main__":
        run(901, method="toy", device="cpu", epochs=3, iterations=2, options={"workers": 0},
            name=sys.argv[1], continue_run="go_on" in sys.argv, hooks=[Kill()])
""")


@pytest.mark.slow
def test_kill_minus_nine_then_continue(dataset, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    assert subprocess.run([sys.executable, script, "a", "kill"]).returncode == -9
    subprocess.run([sys.executable, script, "a", "go_on"], check=True)
    straight = go(name="b", epochs=3)
    a, b = (
        weights(straight.checkpoint),
        weights(straight.folder.parent / "nnsslToy_a__nnUNetPlans__3d_fullres" / "checkpoint_final.pth"),
    )
    assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.slow
def test_two_processes_learn_what_one_does(dataset, tmp_path):
    script = tmp_path / "script.py"
    # AdamW turns the rounding noise of gradients that are truly 0 (biases before InstanceNorm) into whole steps
    sgd = "    def optimiser(self):\n        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], 0.01)\n"
    source = SCRIPT.replace("nn.Dropout(0.2)", "nn.Identity()").replace("    def embed(", sgd + "\n    def embed(")
    script.write_text(source)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--rdzv_backend=c10d"]
    launcher += ["--rdzv_endpoint=localhost:0"]
    subprocess.run([*launcher, script, "two"], check=True)
    subprocess.run([sys.executable, script, "one"], check=True)
    results = next(dataset.parent.parent.glob("nnUNet_results/*"))
    a, b = (
        weights(results / f"nnsslToy_{n}__nnUNetPlans__3d_fullres" / "checkpoint_final.pth") for n in ("one", "two")
    )
    for key in a:
        torch.testing.assert_close(a[key], b[key], atol=1e-5, rtol=1e-4)
