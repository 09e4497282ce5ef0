"""Checkpoints of a training: resumed, lengthened, written whole, read by plain nnU-Net."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from trained import equal_weights, is_constant, log_of

from nnssl.files import sha256_of
from nnssl.networks import canonical_state_dict
from nnssl.plans import load_plan
from nnssl.results import output_folder
from nnssl.trainers import nnUNetTrainerPretrained


def test_trains_from_the_only_pretraining_and_resumes_without_it(dataset, pretraining, build, start):
    file = pretraining()
    trainer = build()
    start(trainer)
    weights = {n for n in canonical_state_dict(trainer.network) if not is_constant(n)}
    assert weights - equal_weights(trainer.network, file) == {n for n in weights if ".seg_layers." in n}

    trainer = build()
    seen = []
    trainer.on_epoch_end = lambda: (
        seen.append(trainer.optimizer.param_groups[0]["lr"]),
        nnUNetTrainer.on_epoch_end(trainer),
    )
    trainer.run_training()
    assert seen == pytest.approx([1e-3, 2e-3])
    folder = Path(trainer.output_folder)
    final = torch.load(folder / "checkpoint_final.pth", weights_only=True)
    assert final["trainer_name"] == "nnUNetTrainer" and final["current_epoch"] == 2
    provenance = final["nnssl_finetuning"]
    assert provenance["sha256"] == sha256_of(file) and provenance["method"] == "macl"
    report = json.loads((folder / "transfer_report.json").read_text())
    assert report["sha256"] == sha256_of(file) and report["source"].startswith(
        "nnUNet_results:Dataset901_Tiny/nnsslMacl__"
    )
    assert (
        report["report"]["parts"]["encoder"]["random"] == 0 and report["report"]["parts"]["seg_layers"]["loaded"] == 0
    )
    assert "decoder stage 1" in (folder / "transfer_report.txt").read_text()
    assert "the only finished pretraining" in log_of(trainer) and "Transfer report" in log_of(trainer)

    # continued to 4 epochs without the pretrained file: no search, the schedule as if it had been 4 from the start
    file.unlink()
    path = dataset / "nnUNetPlans.json"
    path.write_text(
        json.dumps({**json.loads(path.read_text()), "nnssl": {"epochs": 4, "iterations": 2, "val_iterations": 1}})
    )
    again = build(resume=True)
    again.load_checkpoint(str(folder / "checkpoint_final.pth"))
    assert again.current_epoch == 2 and again.provenance == provenance
    again.run_training()
    lrs = again.logger.get_value("lrs", step=None)
    assert lrs == pytest.approx([1e-3, 2e-3, 2e-3 * (2 / 3) ** 0.9, 2e-3 * (1 / 3) ** 0.9])
    assert torch.load(folder / "checkpoint_final.pth", weights_only=True)["nnssl_finetuning"] == provenance


@pytest.mark.parametrize("built", [False, True])
def test_a_training_keeps_the_optimiser_that_it_began_with(pretraining, build, start, dataset, built):
    """Of a version whose short runs had SGD: its momentum is no state of Adam's."""
    pretraining()
    path = dataset / "nnUNetPlans.json"
    plans = path.read_text()
    path.write_text(plans.replace('"nnssl": {', '"nnssl": {"optimizer": "sgd", '))
    trainer = start(build())
    batch = {"data": torch.randn(2, 1, 16, 16, 16), "target": [torch.zeros(2, 1, *[16 // 2**i] * 3) for i in range(2)]}
    trainer.train_step(batch)
    file = str(Path(trainer.output_folder) / "checkpoint_latest.pth")
    trainer.save_checkpoint(file)
    path.write_text(plans)
    again = build(resume=True)
    assert again.figures.optimizer == "adam"
    if built:
        again.initialize()
    again.load_checkpoint(file)
    assert type(again.optimizer) is torch.optim.SGD and again.optimizer is again.lr_scheduler.optimizer
    again.lr_scheduler.step(1)
    assert again.optimizer.param_groups[0]["lr"] == again.initial_lr == again.figures.peak_lr == 1e-2
    states = [each.optimizer.state_dict()["state"] for each in (trainer, again)]
    assert states[0] and all(
        torch.equal(states[1][k]["momentum_buffer"], v["momentum_buffer"]) for k, v in states[0].items()
    )
    assert "keeps what it began with: optimizer sgd (now adam), peak_lr 0.01 (now 0.002)" in log_of(again)


def test_a_plan_that_names_figures_overrules_what_the_training_began_with(build, dataset):
    path = dataset / "nnUNetPlans.json"
    plans = path.read_text()
    began = {"optimizer": "adam", "peak_lr": 2e-3}
    path.write_text(plans.replace('"nnssl": {', '"nnssl": {"peak_lr": 0.005, '))
    trainer = build()
    assert trainer.figures.optimizer == "sgd"
    trainer.keep_begun(began)
    assert (trainer.figures.optimizer, trainer.figures.peak_lr, trainer.initial_lr) == ("adam", 5e-3, 5e-3)
    assert "WARNING" not in log_of(trainer)
    path.write_text(plans.replace('"nnssl": {', '"nnssl": {"optimizer": "sgd", '))
    trainer = build()
    trainer.keep_begun(began)
    assert (trainer.figures.optimizer, trainer.initial_lr) == ("sgd", 1e-2)
    assert "WARNING: the plan has changed since this training began: optimizer adam -> sgd" in log_of(trainer)


def test_stock_nnunet_predicts_with_the_checkpoint(pretraining, build, start):
    """Through the model folder, with the stock class: no trainer of ours is looked up."""
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    pretraining()
    trainer = start(build())
    trainer.inference_allowed_mirroring_axes = (0, 1, 2)
    trainer.save_checkpoint(str(Path(trainer.output_folder) / "checkpoint_final.pth"))
    predictor = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(trainer.output_folder_base, (0,))
    assert predictor.trainer_name == "nnUNetTrainer"
    assert predictor.allowed_mirroring_axes == (0, 1, 2)
    ours, theirs = canonical_state_dict(trainer.network), canonical_state_dict(predictor.network)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)


def test_checkpoint_is_nnunets_own_content(pretraining, build, start):
    """A stock trainer writes the same keys, and its load_checkpoint reads ours."""
    pretraining()
    ours, stock = start(build()), build(nnUNetTrainer)
    stock.initialize()
    folder = Path(ours.output_folder)
    ours.save_checkpoint(str(folder / "a.pth"))
    stock.save_checkpoint(str(folder / "b.pth"))
    a, b = (torch.load(folder / f"{x}.pth", weights_only=False) for x in "ab")
    assert set(a) - {"nnssl_finetuning"} == set(b)
    assert list(a["network_weights"]) == list(b["network_weights"])
    stock.load_checkpoint(str(folder / "a.pth"))
    assert equal_weights(stock.network, folder / "a.pth") == set(canonical_state_dict(stock.network))


def test_an_interrupted_save_leaves_the_old_checkpoint(pretraining, monkeypatch, build, start):
    pretraining()
    trainer = start(build())
    file = Path(trainer.output_folder, "checkpoint_latest.pth")
    trainer.save_checkpoint(str(file))
    before, save = file.read_bytes(), torch.save

    def interrupted(content, target):
        save(content, target)
        target.truncate(1000)
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        trainer.save_checkpoint(str(file))
    assert file.read_bytes() == before
    assert sorted(p.name for p in file.parent.glob("*.pth*")) == [file.name]


def test_content_is_taken_in_memory_and_other_saves_are_not_touched(tmp_path):
    from nnssl.trainers.inspection import content_of

    def save(file):
        torch.save({"other": 1}, tmp_path / "other.pth")
        torch.save({"ours": np.float64(2.0), "weights": torch.arange(3.0)}, file)

    content = content_of(save)
    assert content["ours"] == 2.0 and torch.equal(content["weights"], torch.arange(3.0))
    assert torch.load(tmp_path / "other.pth", weights_only=True) == {"other": 1}
    assert content_of(lambda file: None) is None
    with pytest.raises(ZeroDivisionError):
        content_of(lambda file: 1 / 0)


def test_nothing_is_written_where_checkpoints_are_off_or_by_other_ranks(pretraining, build, start):
    pretraining()
    trainer = start(build())
    file = Path(trainer.output_folder, "checkpoint_latest.pth")
    trainer.disable_checkpointing = True
    trainer.save_checkpoint(str(file))
    trainer.disable_checkpointing, trainer.local_rank = False, 1
    trainer.save_checkpoint(str(file))
    assert not file.exists()


@pytest.mark.parametrize("wrap", ["compile", "ddp"])
def test_wrapped_networks_are_unwrapped(pretraining, wrap, request, build, start):
    """As on GPUs, where nnU-Net wraps in initialize(); its DDP needs CUDA, so the wrapping is done here."""
    file = pretraining()
    trainer = build()
    if wrap == "compile":
        trainer._do_i_compile = lambda: True
    trainer.initialize()
    if wrap == "ddp":
        request.getfixturevalue("one_rank")
        trainer.network, trainer.is_ddp = torch.nn.parallel.DistributedDataParallel(trainer.network), True
    assert type(trainer.network).__name__ == {"compile": "OptimizedModule", "ddp": "DistributedDataParallel"}[wrap]
    start(trainer)
    weights = {n for n in canonical_state_dict(trainer.network) if not is_constant(n) and ".seg_layers." not in n}
    assert weights <= equal_weights(trainer.network, file)
    target = Path(trainer.output_folder, "x.pth")
    trainer.save_checkpoint(str(target))
    names = torch.load(target, weights_only=True)["network_weights"]
    assert not [n for n in names if n.startswith(("_orig_mod", "module"))]
    trainer.provenance = {}
    trainer.load_checkpoint(str(target))
    assert trainer.provenance["method"] == "macl"


def test_a_trainer_with_another_network_keeps_its_name(pretraining, build):
    class nnUNetTrainerOther(nnUNetTrainerPretrained):
        @staticmethod
        def build_network_architecture(*args, **kwargs):
            return nnUNetTrainer.build_network_architecture(*args, **kwargs)

    trainer = build(nnUNetTrainerOther)
    trainer.build_network_architecture = nnUNetTrainer.build_network_architecture
    trainer.initialize()
    file = Path(trainer.output_folder, "x.pth")
    trainer.save_checkpoint(str(file))
    assert torch.load(file, weights_only=True)["trainer_name"] == "nnUNetTrainerOther"


@pytest.mark.slow
def test_nnunets_own_commands_from_training_to_the_best_configuration(pretraining, monkeypatch):
    """Training with validation, --val, the best configuration and prediction; the pretrained file is gone after epoch 0."""
    from nnunetv2.evaluation.find_best_configuration import find_best_configuration
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
    from nnunetv2.run.run_training import run_training

    from nnssl.trainers.discovery import activate

    file = pretraining()
    activate()
    monkeypatch.setattr(
        nnUNetTrainerPretrained, "on_epoch_start", lambda t: (file.unlink(missing_ok=True), epoch_start(t))
    )
    epoch_start = nnUNetTrainer.on_epoch_start
    arguments = ("901", "3d_fullres", 0, "nnUNetTrainerPretrained")
    run_training(*arguments, device=torch.device("cpu"))
    assert not file.exists()
    folder = output_folder(load_plan(901), "x", [901]).parent / "nnUNetTrainerPretrained__nnUNetPlans__3d_fullres"
    summary = folder / "fold_0" / "validation" / "summary.json"
    before = json.loads(summary.read_text())["foreground_mean"]
    summary.unlink()
    monkeypatch.delenv("nnUNet_extTrainer")
    activate()
    run_training(*arguments, device=torch.device("cpu"), only_run_validation=True)
    assert json.loads(summary.read_text())["foreground_mean"] == pytest.approx(before)

    monkeypatch.delenv("nnUNet_extTrainer")
    models = ({"plans": "nnUNetPlans", "configuration": "3d_fullres", "trainer": "nnUNetTrainerPretrained"},)
    best = find_best_configuration(901, models, allow_ensembling=False, num_processes=1, folds=(0,))
    assert best["best_model_or_ensemble"]["selected_model_or_models"][0]["trainer"] == "nnUNetTrainerPretrained"
    predictor = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False, use_mirroring=False)
    predictor.initialize_from_trained_model_folder(str(folder), (0,))
    logits = predictor.predict_logits_from_preprocessed_data(torch.zeros(1, 16, 16, 16))
    assert logits.shape == (3, 16, 16, 16) and bool(logits.isfinite().all())


def test_a_finished_training_is_lengthened(dataset, pretraining, build):
    from nnssl.plan_command import main

    pretraining()
    build().run_training()
    assert main(["-d", "901", "-p", "nnUNetPlans", "--lengthen", "2"]) == 1
    assert main(["-d", "901", "-p", "nnUNetPlans", "--lengthen", "4"]) == 0
    longer = build(resume=True)
    longer.initialize()
    longer.load_checkpoint(str(Path(longer.output_folder) / "checkpoint_final.pth"))
    assert longer.current_epoch == 2
    longer.run_training()
    content = torch.load(Path(longer.output_folder) / "checkpoint_final.pth", weights_only=True)
    assert content["current_epoch"] == 4 and len(content["logging"]["lrs"]) == 4
    assert content["logging"]["lrs"][3] < content["logging"]["lrs"][2], "the decay of the longer schedule"
