"""The mean teacher as a trainer: its two stages, its files, what it tells, its control and its refusals."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform

from nnssl import checkpoint
from nnssl.errors import NnsslError
from nnssl.networks import canonical_state_dict
from nnssl.plans.figures import FineTuningConfig
from nnssl.teacher.averaging import averaging_momentum
from nnssl.trainers import (
    nnUNetTrainerMeanTeacher,
    nnUNetTrainerPretrained,
    nnUNetTrainerPretrainedScratch,
)
from nnssl.trainers.mean_teacher import TEACHER
from nnssl.trainers.pool import UnlabelledDataset


def test_from_random_weights_it_is_not_called_the_control(few, build, start):
    plans = few()
    own, control = (start(build(cls, plans)) for cls in (nnUNetTrainerMeanTeacher, nnUNetTrainerPretrainedScratch))
    assert "nnssl: random weights. " in Path(own.log_file).read_text()
    assert "nnssl: random weights (the control without pretraining). " in Path(control.log_file).read_text()


def run_epoch(trainer):
    trainer.on_epoch_start()
    trainer.on_train_epoch_start()
    outputs = [trainer.train_step(next(trainer.dataloader_train)) for _ in range(trainer.num_iterations_per_epoch)]
    trainer.on_train_epoch_end(outputs)
    with torch.no_grad():
        trainer.on_validation_epoch_start()
        trainer.on_validation_epoch_end([trainer.validation_step(next(trainer.dataloader_val))])
    trainer.on_epoch_end()


def state(module):
    return {k: v.clone() for k, v in canonical_state_dict(module).items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_two_stages(few, started):
    trainer = started(few(schedule="mean-teacher", epochs=3, iterations=3))
    assert (trainer.first_epochs, trainer.figures.optimizer, trainer.initial_lr) == (1, "adam", 2e-3)
    assert len(trainer.pool.cases) == 3  # fold 0: four training cases, one labelled, one case validates
    run_epoch(trainer)
    assert trainer.teacher is None and not trainer.trace
    learnt = state(trainer.network)
    old = next(iter(trainer.optimizer.state.values()))["step"]
    trainer.on_train_epoch_start()  # of epoch 1: the teacher is a copy, the optimiser forgets
    assert same(state(trainer.teacher.module), learnt) and old == 3 and not trainer.optimizer.state
    assert trainer.teacher.module.decoder.deep_supervision is False and trainer.network.decoder.deep_supervision is True
    assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(2e-3)  # six steps, of which less than one warms up
    expected = {k: v.double() for k, v in learnt.items()}
    for step in range(3):
        batch = next(trainer.dataloader_train)
        assert batch["data"].shape[0] == 1 and batch["views"].shape[:2] == (1, 2)
        assert np.isfinite(trainer.train_step(batch)["loss"])
        m = averaging_momentum(step)
        expected = {k: m * v + (1 - m) * state(trainer.network)[k].double() for k, v in expected.items()}
    got = state(trainer.teacher.module)
    assert all(torch.allclose(got[k].double(), v, atol=1e-6) for k, v in expected.items())
    assert not same(got, state(trainer.network))
    assert trainer.teacher.training is False and not any(p.requires_grad for p in trainer.teacher.parameters())


def test_without_a_second_stage_it_learns_from_the_labels_alone_and_needs_no_pool(few, started):
    """``labelled_first=1``: the control with the same changes of labelled patches; the rate follows one schedule."""
    trainer = started(few(schedule="mean-teacher", epochs=2, iterations=2, figures={"labelled_first": 1.0}))
    assert trainer.first_epochs == 2 and trainer.pool is None
    assert any(isinstance(t, SpatialTransform) and hasattr(t, "shift") for t in trainer._transforms.transforms)
    for _ in range(2):
        run_epoch(trainer)
        assert trainer.teacher is None and trainer.dataloader_unlabelled is None
    assert "no second stage (labelled_first)" in Path(trainer.log_file).read_text()
    short = started(few("short", schedule="mean-teacher", epochs=1, iterations=1))
    assert "no second stage (a single epoch)" in Path(short.log_file).read_text()


def test_labels_beside_the_pool_are_never_learnt_from(few, monkeypatch, started):
    """Another label map beside each image of the pool changes nothing."""
    plans = few(schedule="mean-teacher", epochs=2, iterations=2)
    losses = []
    for value in (None, 2):
        trainer = started(plans)
        if value is not None:
            load = UnlabelledDataset.load_case

            def other(self, key, load=load, value=value):
                data, seg, previous, properties = load(self, key)
                return data, np.where(np.asarray(seg[:]) < 0, -1, value).astype(np.int16), previous, properties

            monkeypatch.setattr(UnlabelledDataset, "load_case", other)
        trainer.current_epoch = 1
        trainer.on_train_epoch_start()
        np.random.seed(3)
        torch.manual_seed(3)
        losses.append([next(trainer.dataloader_unlabelled)["target"].sum().item() for _ in range(4)])
    assert losses[0] == losses[1]


def test_a_continued_training_keeps_teacher_stage_and_step(few, build, dataset, started):
    plans = few(schedule="mean-teacher", epochs=4, iterations=2)
    trainer = started(plans)
    for _ in range(3):
        run_epoch(trainer)
    file = f"{trainer.output_folder}/checkpoint_latest.pth"
    trainer.save_checkpoint(file)
    content = checkpoint.load(file).content  # read without running code
    assert content["trainer_name"] == "nnUNetTrainer" and content[TEACHER]["followed"] == 4
    again = build(nnUNetTrainerMeanTeacher, plans, resume=True)
    again.load_checkpoint(file)
    assert same(state(again.teacher.module), state(trainer.teacher.module)) and again._followed == 4
    assert again.trace == trainer.trace and [r["epoch"] for r in again.trace] == [1, 2]
    again.on_train_start()
    before, steps = state(again.teacher.module), again.optimizer.state_dict()["state"][0]["step"]
    again.on_train_epoch_start()
    assert same(state(again.teacher.module), before) and int(steps) == 4  # neither starts again
    again.train_step(next(again.dataloader_train))
    m = averaging_momentum(4)
    new, net = state(again.teacher.module), state(again.network)
    assert all(torch.allclose(new[k], m * before[k] + (1 - m) * net[k], atol=1e-6) for k in new)


def test_without_the_teacher_of_a_continued_training_it_starts_again_and_says_so(few, started):
    plans = few(schedule="mean-teacher", epochs=4, iterations=2)
    trainer = started(plans)
    for _ in range(3):
        run_epoch(trainer)
    content = {TEACHER: {k: v for k, v in trainer.extra_content(False)[TEACHER].items() if k != "teacher"}}
    again = started(plans)
    again.current_epoch = 3
    again.take_extra_content(content)
    again.optimizer.state["kept"] = {}
    again.on_train_epoch_start()
    assert "WARNING: the checkpoint held no teacher; it starts again as the network" in Path(again.log_file).read_text()
    assert "kept" in again.optimizer.state and same(state(again.teacher.module), state(again.network))


def test_a_continued_training_keeps_the_changes_that_it_began_with(few, build, started, transforms_of):
    """Of a version whose patches were changed by nnU-Net and not moved, and whose checkpoints do not name these figures."""
    plans = few(schedule="mean-teacher", epochs=4, iterations=2)
    trainer = started(plans)
    file = f"{trainer.output_folder}/checkpoint_latest.pth"
    trainer.save_checkpoint(file)
    again = build(nnUNetTrainerMeanTeacher, plans, resume=True)
    again.load_checkpoint(file)
    assert again.figures == trainer.figures and "began with" not in Path(again.log_file).read_text()
    content = checkpoint.load(file).content
    begun = content["nnssl_finetuning"]
    begun.update(strength=1.0, momentum=0.9)
    for figure in ("intensities", "labelled_intensities", "shift", "weight"):
        del begun[figure]
    checkpoint.save(file, content)
    older = build(nnUNetTrainerMeanTeacher, plans, resume=True)
    older.load_checkpoint(file)
    changed = {
        "intensities": "nnunet",
        "labelled_intensities": "nnunet",
        "shift": 0.0,
        "strength": 1.0,
        "momentum": 0.9,
    }
    wanted = replace(trainer.figures, **changed)
    assert older.figures == wanted and type(transforms_of(older).transforms[0]) is SpatialTransform
    text = Path(older.log_file).read_text()
    assert (
        "keeps what it began with" in text
        and "intensities nnunet (now strong), labelled_intensities nnunet (now strong), strength 1.0 (now 2.0), shift 0.0"
        in text
    )
    assert "WARNING: the plan has changed" not in text


@pytest.mark.parametrize("labels, strength, weight, intensities", [(1, 2.0, 0.5, "strong"), (3, 1.0, 0.25, "nnunet")])
def test_what_goes_by_the_labelled_cases_and_stays(few, build, labels, strength, weight, intensities, started):
    """A checkpoint of a version with strength 2 and half the loss for all goes on with it."""
    plans = few(schedule="mean-teacher", epochs=4, iterations=2, labels=labels)
    trainer = started(plans)
    assert trainer.figures.strength == strength and trainer.provenance["labelled_cases"] == labels
    assert (trainer.figures.weight, trainer.figures.labelled_intensities) == (weight, intensities)
    text = Path(trainer.log_file).read_text()
    assert f"strong changes, strength {strength:g}; of labelled patches: {intensities}" in text
    assert f"weight of patches without labels in the loss: {weight:g}" in text
    file = f"{trainer.output_folder}/checkpoint_latest.pth"
    trainer.save_checkpoint(file)
    content = checkpoint.load(file).content
    begun = content["nnssl_finetuning"]
    assert (begun["weight"], begun["labelled_intensities"]) == (weight, intensities)
    for figure in ("labelled_cases", "weight", "labelled_intensities"):
        del begun[figure]
    begun["strength"] = 2.0
    checkpoint.save(file, content)
    older = build(nnUNetTrainerMeanTeacher, plans, resume=True)
    older.load_checkpoint(file)
    assert (older.figures.strength, older.figures.weight, older.figures.labelled_intensities) == (2.0, 0.5, "strong")
    for changed in ("strength 2.0 (now 1.0)", "weight 0.5 (now 0.25)", "labelled_intensities strong (now nnunet)"):
        assert (changed in Path(older.log_file).read_text()) is (labels == 3)


def test_a_plan_that_was_changed_after_the_start_is_told(few, build, started):
    trainer = started(few(schedule="mean-teacher", epochs=4, iterations=2))
    trainer.save_checkpoint(f"{trainer.output_folder}/checkpoint_latest.pth")
    changed = build(
        nnUNetTrainerMeanTeacher, few("other", schedule="mean-teacher", epochs=4, iterations=2, figures={"shift": 0.2})
    )
    changed.load_checkpoint(f"{trainer.output_folder}/checkpoint_latest.pth")
    assert changed.figures.shift == 0.2
    assert (
        "WARNING: the plan has changed since this training began: shift 0.1 -> 0.2"
        in Path(changed.log_file).read_text()
    )


def test_the_final_file_has_no_teacher_and_predicts_as_stock(few, tmp_path, started):
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    trainer = started(few(schedule="mean-teacher", epochs=2, iterations=1))
    run_epoch(trainer)
    run_epoch(trainer)
    labelled = trainer._labelled_loader
    trainer.on_train_end()
    assert trainer.dataloader_train is labelled, "nnU-Net ends its own processes"
    content = checkpoint.load(f"{trainer.output_folder}/checkpoint_final.pth").content
    assert "teacher" not in content[TEACHER] and content[TEACHER]["followed"] == 1
    predictor = nnUNetPredictor(device=torch.device("cpu"), perform_everything_on_device=False, allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(trainer.output_folder_base, (0,), "checkpoint_final.pth")
    assert type(predictor.network).__name__ == "PlainConvUNet"


def test_log_and_picture_tell_of_the_pool(few, started):
    trainer = started(few(schedule="mean-teacher", epochs=2, iterations=2))
    run_epoch(trainer)
    run_epoch(trainer)
    (row,) = trainer.trace
    assert 0 <= row["agreement"] <= 1 and 0 <= row["foreground"] <= 1 and 0 < row["labelled_foreground"] < 1
    text = Path(trainer.log_file).read_text()
    assert "3 images without labels" in text and "teacher and student agree on the pool by Dice" in text
    assert "stage 2 begins" in text


def test_a_collapse_is_named(few, started):
    trainer = started(few(schedule="mean-teacher", epochs=2, iterations=1))
    trainer.current_epoch = 1
    trainer.on_train_epoch_start()
    trainer._sums = torch.tensor([0, 10, 1, 100, 1000, 1000], dtype=torch.float64)
    trainer.on_train_epoch_end([{"loss": np.array(1.0)}])
    assert "pseudo-labels have collapsed" in Path(trainer.log_file).read_text()


def test_the_control_has_one_schedule_over_as_many_steps():
    plans = {"plans_name": "p", "nnssl": {"schedule": "mean_teacher", "epochs": 9, "iterations": 10}}
    figures = FineTuningConfig.from_plans(plans, "mean_teacher", "nnUNetTrainerMeanTeacher")
    assert (figures.stages.first, figures.optimizer, figures.peak_lr) == (3, "adam", 2e-3)
    settled = [figures.with_labels(n) for n in (1, 2, 3, 40)]
    assert [f.strength for f in settled] == [2.0, 2.0, 1.0, 1.0] and [f.weight for f in settled] == [
        0.5,
        0.5,
        0.25,
        0.25,
    ]
    assert [f.labelled_intensities for f in settled] == ["strong", "strong", "nnunet", "nnunet"]
    named = FineTuningConfig.from_plans(
        {"plans_name": "p", "nnssl": {"strength": 1.5, "weight": 0.1, "labelled_intensities": "strong"}},
        "mean_teacher",
        "nnUNetTrainerMeanTeacher",
    )
    assert named.with_labels(1) == named.with_labels(9) == named
    long = {"plans_name": "p", "nnssl": {"schedule": "mean_teacher"}}
    figures = FineTuningConfig.from_plans(long, "mean_teacher", "nnUNetTrainerMeanTeacher")
    assert (figures.optimizer, figures.peak_lr, figures.epochs) == ("sgd", 1e-2, 1000)  # nnU-Net's own


def test_scratch_on_the_same_plans_learns_from_labels_only(few, build, start):
    plans = few(schedule="mean-teacher", epochs=6, iterations=2)
    control = start(build(nnUNetTrainerPretrainedScratch, plans))
    rates = [control.lr_scheduler.rates.at(step, control.lr_scheduler.rates.groups[0]) for step in range(12)]
    assert np.argmax(rates) == 0 and rates == sorted(rates, reverse=True) and rates[0] == pytest.approx(2e-3)
    with pytest.raises(NnsslError, match="use -tr nnUNetTrainerPretrainedMeanTeacher or -tr nnUNetTrainerMeanTeacher"):
        build(nnUNetTrainerPretrained, plans)


def test_the_second_stage_of_a_cascade_is_refused(dataset):
    plans = json.loads((dataset / "nnUNetPlans.json").read_text())
    plans["configurations"]["3d_cascade_fullres"] = {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"}
    plans["continue_training"] = False
    info = json.loads((dataset / "dataset.json").read_text())
    with pytest.raises(NnsslError, match="cannot train 3d_cascade_fullres.*3d_lowres"):
        nnUNetTrainerMeanTeacher(plans, "3d_cascade_fullres", 0, info, torch.device("cpu"))
