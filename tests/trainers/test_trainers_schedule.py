"""The learning rate as a pure function of the epoch, with values worked out by hand, and the figures of a plan."""

import numpy as np
import pytest
import torch
from PIL import Image

from nnssl.errors import NnsslError
from nnssl.trainers.learning_rates import draw_below
from nnssl.trainers.schedule import EpochSchedule, FineTuningConfig, warmup_poly

FAMILY, NAME = "warmup_poly", "nnUNetTrainerPretrained"


def figures(**nnssl):
    return FineTuningConfig.from_plans({"plans_name": "nnUNetPlans_x", "nnssl": nnssl}, FAMILY, NAME)


def test_defaults_are_nnunets_lengths():
    assert FineTuningConfig.from_plans({"plans_name": "nnUNetPlans"}, FAMILY, NAME) == FineTuningConfig(
        1000, 250, 50, 1e-3, 0.05
    )
    assert FineTuningConfig().warmup_epochs == 50


def test_short_runs_have_adam_unless_the_plan_says_otherwise():
    def chosen(**named):
        figures_ = figures(iterations=250, **named)
        return figures_.optimizer, figures_.peak_lr

    assert chosen(epochs=100) == ("sgd", 1e-3) and chosen(epochs=99) == ("adam", 2e-3)
    assert chosen(epochs=99, optimizer="sgd") == ("sgd", 1e-2), "nnU-Net's own rate"
    assert chosen(epochs=99, peak_lr=5e-3) == ("sgd", 5e-3), "a rate that is named is SGD's"
    assert chosen(epochs=99, optimizer="adam") == ("adam", 1e-3)


@pytest.mark.parametrize(
    ("schedule", "trainer", "want"),
    [
        ("sawtooth", NAME, ("sgd", 1e-2)),
        ("freeze_unfreeze", NAME, ("adam", 3e-4)),
        ("mean_teacher", NAME, ("adam", 2e-3)),
        (FAMILY, "nnUNetTrainerPretrainedPrimus", ("adamw", 1e-4)),
    ],
)
def test_short_runs_of_other_schedules_and_networks(schedule, trainer, want):
    other = {"plans_name": "x", "nnssl": {"epochs": 10, "schedule": schedule}}
    made = FineTuningConfig.from_plans(other, schedule, trainer)
    assert (made.optimizer, made.peak_lr) == want


def test_figures_come_from_the_plan():
    got = figures(
        schema=1, schedule=FAMILY, epochs=20, iterations=3, val_iterations=2, peak_lr=0.01, warmup=0.2, base_plans="b"
    )
    assert got == FineTuningConfig(20, 3, 2, 0.01, 0.2)
    assert got.warmup_epochs == 4
    assert figures(epochs=None) == FineTuningConfig()


@pytest.mark.parametrize(("epochs", "warmup", "expected"), [(1, 0.05, 0), (2, 0.05, 1), (30, 0.05, 2), (50, 0.0, 0)])
def test_warmup_epochs(epochs, warmup, expected):
    assert FineTuningConfig(epochs=epochs, warmup=warmup).warmup_epochs == expected


@pytest.mark.parametrize(
    ("bad", "text"),
    [
        ({"epochs": -1}, "nnssl: 'epochs' must be a whole number of at least 0, not -1"),
        ({"epochs": 2.5}, "whole number"),
        ({"iterations": True}, "'iterations' must be .*not True"),
        ({"val_iterations": "5"}, "'val_iterations' must be .*not '5'"),
        ({"peak_lr": 0}, "a number above 0, not 0"),
        ({"peak_lr": float("nan")}, "a number above 0, not nan"),
        ({"warmup": 1.0}, r"a number in \[0, 1\)"),
        ({"schema": 2}, "update nnssl"),
        ({"train_cases": {"0": []}}, "train_cases"),
        ({"train_cases": ["a"]}, "train_cases"),
        ({"optimizer": "lamb"}, "'sgd' or 'adam'"),
        ({"layer_decay": 0}, r"a number in \(0, 1\]"),
        ({"ramp": 0}, r"a number in \(0, 1\)"),
    ],
)
def test_illegal_figures_are_named(bad, text):
    with pytest.raises(NnsslError, match=text) as error:
        figures(**bad)
    assert "nnUNetPlans_x" in str(error.value)


def test_all_problems_at_once():
    with pytest.raises(NnsslError, match="found 2 problems"):
        figures(epochs=-1, iterations=0)


def test_another_family_names_the_trainer_to_use():
    with pytest.raises(NnsslError, match="this version knows warmup_poly"):
        figures(schedule="cosine")
    with pytest.raises(NnsslError, match="use -tr nnUNetTrainerPretrainedSawtooth or"):
        figures(schedule="sawtooth")
    with pytest.raises(NnsslError, match="'warmup_poly' .*use -tr nnUNetTrainerPretrained or"):
        FineTuningConfig.from_plans(
            {"plans_name": "p", "nnssl": {"schedule": FAMILY}}, "sawtooth", "nnUNetTrainerSawtooth"
        )


def test_factor_by_hand():
    # 4 epochs of warm-up of 20: 1/5, 2/5, 3/5, 4/5, then 1, (15/16)^.9, ... (1/16)^.9
    expected = {0: 0.2, 1: 0.4, 3: 0.8, 4: 1.0, 12: 0.5358867312681466, 19: 0.08246924442330589}
    assert {e: warmup_poly(e, 20, 4) for e in expected} == pytest.approx(expected, rel=1e-12)
    assert warmup_poly(20, 20, 4) == 0 and warmup_poly(0, 1, 0) == 1


def test_without_warmup_it_is_nnunets_poly():
    from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-2)
    theirs = PolyLRScheduler(optimizer, 1e-2, 10)
    for epoch in range(10):
        theirs.step(epoch)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-2 * warmup_poly(epoch, 10, 0), rel=1e-12)


def test_groups_keep_their_ratio_and_zero_stays_frozen():
    parameters = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": lr} for lr in (1e-3, 1e-2, 0.0)]
    optimizer = torch.optim.SGD(parameters, lr=1.0)
    schedule = EpochSchedule(optimizer, 20, 4)
    for epoch in (7, 3, 7):
        schedule.step(epoch)
        factor = warmup_poly(epoch, 20, 4)
        assert [g["lr"] for g in optimizer.param_groups] == [1e-3 * factor, 1e-2 * factor, 0.0]


def test_a_loaded_optimizer_changes_nothing():
    def build():
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
        return optimizer, EpochSchedule(optimizer, 20, 4)

    (first, straight), (second, resumed) = build(), build()
    straight.step(2)
    second.load_state_dict(first.state_dict())
    for schedule in (straight, resumed):
        schedule.step(9)
    assert first.param_groups[0]["lr"] == second.param_groups[0]["lr"] == 1e-3 * (11 / 16) ** 0.9


def test_a_panel_is_drawn_below_a_figure_that_stays_as_it_was(tmp_path):
    before = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 640, 3), dtype=np.uint8))
    before.save(tmp_path / "progress.png")
    draw_below(tmp_path / "progress.png", lambda ax: ax.figure.set_facecolor("black"))
    after = np.asarray(Image.open(tmp_path / "progress.png"))
    assert np.array_equal(after[:30], np.asarray(before)) and after.shape[1:] == (640, 3)
    below = after[30:]
    assert len(below) == 1400 and not below[[0, -1]].any() and not below[:, [0, -1]].any() and below[700, 320].any()
    assert [p.name for p in tmp_path.iterdir()] == ["progress.png"]
