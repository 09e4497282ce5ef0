"""The trainer for Primus: pretrained weights, every schedule, and checkpoints that plain nnU-Net predicts with."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nnssl import checkpoint
from nnssl.errors import NnsslError
from nnssl.networks import canonical_state_dict
from nnssl.plans import load_plan
from nnssl.plans.figures import PRIMUS_SCHEDULES
from nnssl.trainers import (
    nnUNetTrainerLinearProbe,
    nnUNetTrainerPretrained,
    nnUNetTrainerPretrainedPrimus,
    nnUNetTrainerPretrainedPrimusScratch,
    nnUNetTrainerPretrainedScratch,
)
from nnssl.weights import write_variant

PLANS = "nnUNetPlans_primus"
LENGTH = {"epochs": 2, "iterations": 2, "val_iterations": 1}


@pytest.fixture
def primus(dataset):
    """Dataset901_Tiny with plans whose network is a tiny Primus."""
    write_variant(load_plan(901), "primus", network="primus:24,2,2")
    return dataset


@pytest.fixture
def weights(primus, pretraining):
    """``weights(plans=PLANS) -> Path``: a finished pretraining by mae."""
    return lambda plans=PLANS: pretraining(plans=plans, decoder_stages=(), method="mae")


@pytest.fixture
def make_trainer(build):
    return lambda cls=nnUNetTrainerPretrainedPrimus, plans=PLANS: build(cls, plans)


def test_starts_from_the_pretraining_made_for_its_plans(primus, weights, start, make_trainer):
    file = weights()
    trainer = start(make_trainer())
    stored, own = checkpoint.load(file).weights, canonical_state_dict(trainer.network)
    same = {n for n in own if own[n].shape == stored[n].shape and torch.equal(own[n], stored[n])}
    assert {n for n in own if n.startswith(("eva.", "down_projection."))} <= same
    assert "up_projection.decode.0.0.weight" not in same
    report = Path(trainer.output_folder, "transfer_report.txt").read_text()
    assert "up_projection" in report and "never transferred" in report
    assert isinstance(trainer.optimizer, torch.optim.AdamW)
    group = trainer.optimizer.param_groups[0]
    assert (group["weight_decay"], group["betas"], trainer.initial_lr) == (5e-2, (0.9, 0.98), 1e-4)
    assert trainer.enable_deep_supervision is False and trainer.num_epochs == 2


def test_trains_and_is_saved_under_its_own_name_where_nnunet_has_no_such_size(primus, weights, make_trainer):
    weights()
    trainer = make_trainer()
    trainer.run_training()
    final = torch.load(Path(trainer.output_folder) / "checkpoint_final.pth", weights_only=True)
    assert final["trainer_name"] == "nnUNetTrainerPretrainedPrimus" and final["nnssl_finetuning"]["method"] == "mae"


@pytest.mark.parametrize("schedule", PRIMUS_SCHEDULES)
def test_every_schedule(primus, weights, start, schedule, make_trainer):
    write_variant(load_plan(901, plans_name=PLANS), schedule, checkpoint=weights(), schedule=schedule, **LENGTH)
    trainer = start(make_trainer(plans=f"{PLANS}_{schedule}"))
    trainer.on_epoch_start = trainer.on_train_epoch_start
    data = {"data": torch.randn(2, 1, 16, 16, 16), "target": torch.randint(0, 3, (2, 1, 16, 16, 16)).float()}
    before = {n: p.detach().clone() for n, p in trainer.network.named_parameters()}
    trainer.on_train_epoch_start()
    assert torch.isfinite(torch.as_tensor(trainer.train_step(data)["loss"]))
    moved = {n for n, p in trainer.network.named_parameters() if not torch.equal(p, before[n])}
    encoder = {n for n in before if n.startswith(("eva.", "down_projection."))}
    heads = {n for n in before if n.startswith("up_projection.")}
    assert moved & heads
    assert bool(moved & encoder) == (schedule == "warmup_poly"), schedule
    names = [g.get("name") for g in trainer.optimizer.param_groups]
    if schedule != "warmup_poly":
        assert names == ["up_projection", "encoder norm", "encoder stage 2", "encoder stage 1", "encoder stage 0"]


def test_gradients_are_clipped_at_one(primus, weights, start, monkeypatch, make_trainer):
    weights()
    trainer, norms = start(make_trainer()), []
    clip = torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda p, most: norms.append(most) or clip(p, most))
    data = {"data": torch.randn(2, 1, 16, 16, 16), "target": torch.randint(0, 3, (2, 1, 16, 16, 16)).float()}
    trainer.train_step(data)
    assert norms == [1.0]


def test_the_wrong_trainer_names_the_right_one(primus, make_trainer):
    wanted = {
        nnUNetTrainerPretrained: "nnUNetTrainerPretrainedPrimus",
        nnUNetTrainerPretrainedScratch: "nnUNetTrainerPretrainedPrimusScratch",
        nnUNetTrainerLinearProbe: "nnUNetTrainerPretrainedPrimus",
    }
    for cls, name in wanted.items():
        with pytest.raises(NnsslError, match=f"hold a Primus, .*use -tr {name}\\."):
            make_trainer(cls)
    with pytest.raises(NnsslError, match="hold no Primus.*use -tr nnUNetTrainerPretrained, or .*nnssl_plan --network"):
        make_trainer(plans="nnUNetPlans")
    with pytest.raises(NnsslError, match="use -tr nnUNetTrainerPretrainedScratch, or"):
        make_trainer(nnUNetTrainerPretrainedPrimusScratch, "nnUNetPlans")


def test_the_control_and_what_is_missing(primus, weights, start, make_trainer):
    with pytest.raises(NnsslError, match="-p nnUNetPlans_primus(.|\n)*-tr nnUNetTrainerPretrainedPrimusScratch"):
        start(make_trainer())
    control = start(make_trainer(nnUNetTrainerPretrainedPrimusScratch))
    assert control.provenance["weights"] == "random" and isinstance(control.optimizer, torch.optim.AdamW)


def test_a_named_checkpoint_of_another_patch_is_interpolated(primus, weights, start, make_trainer):
    plan = load_plan(901, plans_name=PLANS)
    assert plan.patch_size == (16, 16, 16)
    write_variant(plan, "wide", checkpoint=weights(), patch=(16, 24, 16))
    with pytest.raises(NnsslError, match="No finished pretraining fits"):  # without naming it: another network
        write_variant(plan, "wide0", patch=(16, 24, 16))
        start(make_trainer(plans=f"{PLANS}_wide0"))
    trainer = start(make_trainer(plans=f"{PLANS}_wide"))
    assert "positions of 2x2x2 tokens -> 2x3x2" in Path(trainer.output_folder, "transfer_report.txt").read_text()


def test_nnunets_own_primus_trainer_takes_the_weights_and_reads_the_checkpoints(dataset, weights, start, make_trainer):
    """Primus-S on a patch of eight tokens: its pretraining loads with -pretrained_weights, ours saves under its name."""
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
    from nnunetv2.run.load_pretrained_weights import load_pretrained_weights

    plans = "nnUNetPlans_S"
    write_variant(load_plan(901), "S", network="primus-s")
    file = weights(plans)
    stock = importlib.import_module("nnunetv2.training.nnUNetTrainer.primus.primus_trainers").nnUNet_Primus_S_Trainer
    plan = load_plan(901, plans_name=plans)
    network = stock.build_network_architecture(plan.manager, plan.config, 1, plan.n_classes)
    load_pretrained_weights(network, str(file))
    stored = checkpoint.load(file).weights
    assert all(torch.equal(t, stored[n]) for n, t in network.state_dict().items())

    trainer = start(make_trainer(plans=plans))
    trainer.inference_allowed_mirroring_axes = (0, 1, 2)
    trainer.save_checkpoint(str(Path(trainer.output_folder) / "checkpoint_final.pth"))
    predictor = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(trainer.output_folder_base, (0,))
    assert predictor.trainer_name == "nnUNet_Primus_S_Trainer"
    ours, theirs = canonical_state_dict(trainer.network), canonical_state_dict(predictor.network)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)


@pytest.mark.slow
def test_from_pretraining_to_prediction_by_commands(dataset, nnunet_env, tmp_path):
    """nnssl_plan, nnssl_pretrain, nnUNetv2_train with our trainer, nnUNetv2_predict without it."""
    from nnssl.trainers.discovery import shim_folder

    env = {**os.environ, "nnUNet_extTrainer": shim_folder(), "OMP_NUM_THREADS": "1", "nnUNet_n_proc_DA": "0"}
    env |= {"nnUNet_def_n_proc": "1"}
    folder = Path(sys.executable).parent

    def call(command, *arguments, **changed):
        run = [str(folder / command), *map(str, arguments)]
        done = subprocess.run(run, env={**env, **changed}, capture_output=True, text=True, check=False, cwd=tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    call("nnssl_plan", "-d", 901, "--network", "primus-s", "--name", "primusS", "--epochs", 1, "--iterations", 2)
    plans = ["-p", "nnUNetPlans_primusS"]
    told = call(
        *("nnssl_pretrain", "-d", 901, *plans, "-m", "mae", "-device", "cpu", "--epochs", 1, "--iterations", 2),
        *("--robustness-every", 0, "-o", "batch_size=2", "workers=0"),
    )
    assert "-tr nnUNetTrainerPretrainedPrimus -p nnUNetPlans_primusS" in told
    trainer = "nnUNetTrainerPretrainedPrimus"
    told = call("nnUNetv2_train", 901, "3d_fullres", 0, *plans, "-tr", trainer, "-device", "cpu")
    assert "Transfer report" in told and "Mean Validation Dice" in told
    out = tmp_path / "out"
    call(
        *("nnUNetv2_predict", "-d", 901, "-c", "3d_fullres", "-f", 0, *plans, "-tr", trainer, "-device", "cpu"),
        *("-i", nnunet_env.raw / "Dataset901_Tiny" / "imagesTr", "-o", out, "-npp", 1, "-nps", 1, "--disable_tta"),
        nnUNet_extTrainer="",
    )
    assert len(list(out.glob("*.nii.gz"))) == 5
