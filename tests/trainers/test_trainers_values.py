"""Trainers by hand values: skipped steps, what is drawn and told, and which networks are refused."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from PIL import Image

from nnssl.errors import NnsslError
from nnssl.networks import canonical_state_dict
from nnssl.plans.figures import FineTuningConfig
from nnssl.trainers import learning_rates, mean_teacher, nnUNetTrainerMeanTeacher, refusals, stepwise
from nnssl.trainers.learning_rates import draw_below
from nnssl.trainers.pretrained import check_network
from nnssl.trainers.pseudo_label_trace import draw_trace, trace_lines, trace_row
from nnssl.trainers.schedule import LearningRates


def test_what_follows_a_step_is_left_out_where_it_was_skipped(build):
    """A gradient that is not finite halves the scale and changes nothing; a scale that stays or grows tells of a step."""
    trainer, followed = build(), []
    trainer.initialize()
    trainer.after_step = lambda: followed.append(1)
    trainer.grad_scaler = torch.GradScaler("cpu", init_scale=8.0, growth_interval=2)
    found = []
    for factor in (1.0, torch.inf, 1.0, 1.0, 1.0):
        before = {n: t.clone() for n, t in canonical_state_dict(trainer.network).items()}
        trainer.batch_loss = lambda batch, f=factor: f * sum(p.square().sum() for p in trainer.network.parameters())
        trainer._optimise({}, [])
        moved = any(not torch.equal(before[n], t) for n, t in canonical_state_dict(trainer.network).items())
        found.append((moved, len(followed), trainer.grad_scaler.get_scale()))
    assert found == [(True, 1, 8.0), (False, 1, 4.0), (True, 2, 4.0), (True, 3, 8.0), (True, 4, 8.0)]


def test_on_a_cpu_the_network_lies_as_its_convolutions_are_quickest(build):
    trainer = build()
    trainer.initialize()
    weights = [p for p in trainer.network.parameters() if p.ndim == 5]
    assert weights and all(p.is_contiguous(memory_format=torch.channels_last_3d) for p in weights)


def test_an_epochs_row_by_hand():
    """Overlap twice 2 of 6 voxels, 3 of 4 voxels of the pool, 1 of 5 of the labelled patches."""
    row = trace_row(3, torch.tensor([4.0, 6, 3, 1, 4, 5], dtype=torch.float64))
    assert row == {"epoch": 3, "agreement": 4 / 6, "foreground": 0.75, "labelled_foreground": 0.2}
    (line,) = trace_lines(row)
    assert "by Dice 0.667; foreground 75.00 % of the pool, 20.00 % of the labelled patches" in line
    nothing = trace_row(0, torch.tensor([0.0, 0, 0, 0, 4, 0], dtype=torch.float64))
    assert nothing == {"epoch": 0, "agreement": 1.0, "foreground": 0, "labelled_foreground": 0}


@pytest.mark.parametrize(("foreground", "collapsed"), [(0.05, False), (0.0499, True)])
def test_pseudo_labels_with_less_than_a_tenth_of_the_labels_have_collapsed(foreground, collapsed):
    lines = trace_lines({"agreement": 1.0, "foreground": foreground, "labelled_foreground": 0.5})
    assert any("collapsed" in line for line in lines) is collapsed


def legible(ax):
    """Sizes of nnU-Net's own panels (seaborn's 12 and 11 points at 2.5): all are one picture, 30 inches wide."""
    for label in (ax.xaxis.label, ax.yaxis.label):
        assert not label.get_text() or label.get_fontsize() == 30
    for axis in (ax.xaxis, ax.yaxis):
        assert {tick.label1.get_fontsize() for tick in axis.get_major_ticks()} == {28}
    assert {text.get_fontsize() for text in ax.get_legend().get_texts()} == {26}
    return [(line.get_linestyle(), line.get_linewidth()) for line in ax.get_lines()]


def test_the_panel_has_the_dice_and_both_shares_in_percent():
    from matplotlib.figure import Figure

    figure = Figure()
    ax = figure.subplots()
    trace = [{"epoch": e, "agreement": 0.25 * e, "foreground": 0.02 * e, "labelled_foreground": 0.03} for e in (1, 2)]
    draw_trace(trace, ax)
    left, right = figure.axes
    (dice,) = left.get_lines()
    assert dice.get_xydata().tolist() == [[1, 0.25], [2, 0.5]] and left.get_ylim() == (0, 1)
    assert [line.get_ydata().tolist() for line in right.get_lines()] == [[2, 4], [3, 3]]
    assert [line.get_linestyle() for line in right.get_lines()] == ["-", "--"] and right.get_ylim()[0] == 0
    assert (left.get_xlabel(), left.get_ylabel()) == ("epoch", "Dice between them") and "%" in right.get_ylabel()
    assert legible(left) == [("-", 4)] and legible(right) == [("-", 4), ("--", 4)]


def drawn(rates, epochs):
    """``{label: (solid line, dashed line)}``"""
    from matplotlib.figure import Figure

    ax = Figure().subplots()
    learning_rates.draw_rates(rates, epochs, ax)
    *lines, now = ax.get_lines()
    assert ax.get_ylabel() == "learning rate of each part" and ax.get_xlabel().startswith("epoch (of ")
    assert [text.get_text() for text in ax.get_legend().get_texts()] == [line.get_label() for line in lines[::2]]
    assert now.get_xdata()[0] == epochs
    assert {line.get_drawstyle() for line in lines} == {"steps-post"}, "a jump of the rate is drawn as one"
    assert legible(ax) == [*[("-", 4), ("--", 1.5)] * (len(lines) // 2), ("-", 2)]
    assert ax.yaxis.get_offset_text().get_fontsize() == 28
    assert all(line.get_visible() and line.get_alpha() == 0.4 for line in ax.get_ygridlines())
    return {a.get_label(): (a.get_xydata(), b.get_xydata()) for a, b in zip(lines[::2], lines[1::2])}


def test_rates_are_drawn_step_by_step_up_to_the_end():
    """Of 40 steps each; done is solid, what comes is dashed and goes on from there; the last rate lasts until the end."""
    figures = FineTuningConfig(epochs=4, iterations=10, peak_lr=1e-3, frozen=0.375, ramp=0.1)
    rates = LearningRates("freeze_unfreeze", figures, ("seg_layers", "encoder stage 0"), ("encoder stage 0",))
    lines = drawn(rates, 1)
    assert list(lines) == ["seg_layers", "encoder stage 0"]
    solid, dashed = lines["encoder stage 0"]
    np.testing.assert_allclose(solid[:, 0], np.arange(11) / 10)
    np.testing.assert_allclose(dashed[:, 0], np.arange(10, 41) / 10)
    np.testing.assert_allclose(dashed[:, 1], [rates.at(s, "encoder stage 0") for s in (*range(10, 40), 39)])
    frozen = LearningRates("encoder_frozen", figures, ("seg_layers", "encoder stage 0"))
    assert list(drawn(frozen, 4)) == ["seg_layers", "encoder stage 0 (frozen)"]


def test_a_long_training_is_drawn_at_fewer_steps_and_at_each_epoch():
    """5001 steps: each second one, and the first of each epoch, also where that is an odd one."""
    rates = LearningRates("warmup_poly", FineTuningConfig(epochs=3, iterations=1667, warmup=0.0), ("all",))
    ((solid, dashed),) = drawn(rates, 2).values()
    x = np.concatenate([solid[:-1, 0], dashed[:, 0]]) * 1667
    np.testing.assert_allclose(x, sorted({*range(0, 5001, 2), 1667, 3334}) + [5001])
    assert solid[-1, 0] == dashed[0, 0] == 2


def test_nnunets_own_length_is_drawn_from_left_to_right():
    rates = LearningRates("warmup_poly", FineTuningConfig(), ("all",))
    ((solid, dashed),) = drawn(rates, 400).values()
    x = np.concatenate([solid[:-1, 0], dashed[:, 0]])
    assert len(x) > 1000 and np.all(np.diff(x) > 0) and x[-1] == 1000


@pytest.mark.parametrize(("rank", "told", "drawn"), [(0, True, ["rates", "trace"]), (1, True, []), (0, False, [])])
def test_one_process_draws_the_rates_and_the_pool_after_each_epoch(build, monkeypatch, rank, told, drawn):
    trainer, found = build(nnUNetTrainerMeanTeacher), []
    trainer.initialize()
    monkeypatch.setattr(nnUNetTrainer, "on_epoch_end", lambda self: None)
    monkeypatch.setattr(stepwise, "draw_below", lambda path, draw: found.append(("rates", path.name)))
    monkeypatch.setattr(mean_teacher, "draw_below", lambda path, draw: found.append(("trace", path.name)))
    trainer.local_rank = rank
    trainer.rates, trainer.trace = ([{"epoch": 0}], [{"epoch": 0}]) if told else ([], [])
    trainer.on_epoch_end()
    assert found == [(name, "progress.png") for name in drawn]


def test_a_training_of_4000_steps_is_drawn_at_each_second_one():
    rates = LearningRates("warmup_poly", FineTuningConfig(epochs=2, iterations=2000, warmup=0.0), ("all",))
    ((solid, _),) = drawn(rates, 2).values()
    np.testing.assert_allclose(2000 * solid[:-2, 0], np.arange(0, 4000, 2))


def test_refusals_are_told_briefly_and_every_other_error_as_ever(monkeypatch, capsys):
    """Asked for twice it is done once; with the variable set the traceback comes back."""
    before = []
    monkeypatch.setattr(sys, "excepthook", lambda *error: before.append(error[0]))
    monkeypatch.delenv(refusals.VARIABLE, raising=False)
    refusals.tell_refusals_briefly()
    hook = sys.excepthook
    refusals.tell_refusals_briefly()
    assert sys.excepthook is hook
    hook(NnsslError, NnsslError("no weights"), None)
    assert capsys.readouterr().err == "\nError: no weights\n" and not before
    hook(ValueError, ValueError("other"), None)
    monkeypatch.setenv(refusals.VARIABLE, "1")
    hook(NnsslError, NnsslError("no weights"), None)
    assert before == [ValueError, NnsslError] and capsys.readouterr().err == ""


@pytest.mark.parametrize("configuration", ["3d_fullres", "3d_b9", "3d_b9_again"])
def test_a_configuration_has_the_network_of_the_one_that_it_inherits_from(configuration):
    """A Primus is refused for a trainer of U-Nets, and accepted for its own, however deep it is named."""
    primus = {"architecture": {"network_class_name": "x.y.Primus"}}
    inherited = {"3d_b9": {"inherits_from": "3d_fullres"}, "3d_b9_again": {"inherits_from": "3d_b9"}}
    plans = {"plans_name": "nnUNetPlans", "configurations": {"3d_fullres": primus, **inherited}}
    check_network(nnUNetTrainerMeanTeacher, plans, configuration, primus=True)
    with pytest.raises(NnsslError, match="nnUNetTrainerPretrainedPrimus"):
        check_network(nnUNetTrainerMeanTeacher, plans, configuration, primus=False)
    own = {"inherits_from": configuration, "architecture": {"network_class_name": "x.y.PlainConvUNet"}}
    plans["configurations"]["own"] = own
    check_network(nnUNetTrainerMeanTeacher, plans, "own", primus=False)


def test_rates_are_logged_where_what_is_frozen_changes_and_nowhere_else(monkeypatch):
    """Three steps: frozen, frozen, trained. A rate of exactly 1 is no other than 0.5."""
    held, lines, rates = [], [], {"encoder": 0.0, "heads": 1.0}
    monkeypatch.setattr(stepwise, "hold_statistics", lambda network, frozen: held.append(list(frozen)))

    def to(step):
        rates["encoder"] = 0.0 if step < 12 else 0.5

    schedule = SimpleNamespace(now=lambda: dict(rates), set=to, frozen=lambda: ["w"] if rates["encoder"] == 0 else [])
    trainer = SimpleNamespace(
        current_epoch=2,
        num_iterations_per_epoch=5,
        _iteration=0,
        network=None,
        rates=[{}],
        print_to_log_file=lines.append,
    )
    found = [stepwise.StepwiseTrainer._set_rates(trainer, schedule) for _ in range(3)]
    assert found == [["w"], ["w"], []] and held == [[]]
    assert len(lines) == 1 and lines[0].startswith("nnssl: step 3 of the epoch: ")
    assert trainer.rates[-1]["last"] == {"encoder": 0.5, "heads": 1.0}


def test_a_panel_is_drawn_below_a_figure_that_stays_as_it_was(tmp_path):
    before = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 640, 3), dtype=np.uint8))
    before.save(tmp_path / "progress.png")
    draw_below(tmp_path / "progress.png", lambda ax: ax.figure.set_facecolor("black"))
    after = np.asarray(Image.open(tmp_path / "progress.png"))
    assert np.array_equal(after[:30], np.asarray(before)) and after.shape[1:] == (640, 3)
    below = after[30:]
    assert len(below) == 1400 and not below[[0, -1]].any() and not below[:, [0, -1]].any() and below[700, 320].any()
    assert [p.name for p in tmp_path.iterdir()] == ["progress.png"]
