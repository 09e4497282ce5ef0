"""Learning rates as pure functions of the step, by hand; the figures of a plan; parameter groups."""

import pytest
import torch

from nnssl import trainers
from nnssl.errors import NnsslError
from nnssl.networks import build_network
from nnssl.plans import Plan
from nnssl.plans.figures import (
    PRIMUS,
    SCHEDULES,
    SCRATCH,
    TEACHER,
    FineTuningConfig,
    check_options,
    followers,
    schedule_name,
    trainer_for,
)
from nnssl.trainers.groups import backbone_groups, build_optimizer, group_of, hold_statistics, parameter_groups
from nnssl.trainers.learning_rates import describe_rates, merge_names
from nnssl.trainers.schedule import (
    LearningRates,
    StepSchedule,
    freeze_unfreeze,
    sawtooth,
    warmup_poly,
)

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
        ({"train_cases": {}}, "train_cases must be a non-empty list of case names for each fold"),
        ({"unlabelled": []}, "unlabelled must be a non-empty list of dataset names"),
        ({"unlabelled": "Dataset001_A"}, "unlabelled"),
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


def test_trainers_that_follow_a_schedule_are_those_that_say_so():
    """The table that names trainers without importing them, and the classes themselves."""
    classes = [getattr(trainers, name) for name in trainers.TRAINERS]
    own = {cls.schedule: cls.__name__ for cls in classes if cls.pretrained and not cls.primus}
    assert own == SCHEDULES
    for schedule in SCHEDULES:
        plans = {"nnssl": {"schedule": schedule}}
        following = {cls.__name__ for cls in classes if cls.schedule_of(plans) == schedule and not cls.primus}
        assert following == set(followers(schedule))
        assert trainer_for(schedule) == followers(schedule)[0] == SCHEDULES[schedule]
    assert trainer_for("sawtooth", pretrained=False) == trainer_for("head_only", pretrained=False) == SCRATCH
    assert trainer_for("mean_teacher", pretrained=False) == TEACHER
    assert (trainer_for("sawtooth", True), trainer_for("sawtooth", True, False)) == PRIMUS
    assert followers("linear_probe") == ["nnUNetTrainerLinearProbe"] and followers("cosine") == []


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


def test_a_loaded_optimizer_changes_nothing():
    """Its groups have no names: that of nnU-Net's, and of checkpoints with one rate."""
    rates = LearningRates(
        "warmup_poly", FineTuningConfig(epochs=20, iterations=3, peak_lr=1e-3, warmup=0.2), ("network",)
    )

    def build():
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
        return optimizer, StepSchedule(optimizer, rates)

    (first, straight), (second, resumed) = build(), build()
    straight.step(2)
    assert straight.now() == {"network": pytest.approx(0.6e-3)}
    second.load_state_dict(first.state_dict())
    for schedule in (straight, resumed):
        schedule.step(9)
    assert first.param_groups[0]["lr"] == second.param_groups[0]["lr"] == 1e-3 * (11 / 16) ** 0.9


def test_freeze_unfreeze_at_the_published_steps():
    """specs/hdense.md section 7: 3e-5 * 10 ** ((t - 15000) / 1200), capped at 3e-4."""
    want = {
        0: 0,
        14_999: 0,
        15_000: 3e-5,
        15_300: 5.335e-5,
        15_600: 9.487e-5,
        15_900: 1.687e-4,
        16_200: 3e-4,
        44_999: 3e-4,
    }
    got = {t: 3e-4 * freeze_unfreeze(t, 45_000) for t in want}
    assert got == pytest.approx(want, rel=1e-3)
    assert got[15_000] == pytest.approx(3e-5, rel=1e-12) and got[16_200] == pytest.approx(3e-4, rel=1e-12)


def test_freeze_unfreeze_scales_with_the_length():
    for t in (14_999, 15_000, 15_300, 15_900, 30_000):
        assert freeze_unfreeze(10 * t, 450_000) == pytest.approx(freeze_unfreeze(t, 45_000))
    assert [freeze_unfreeze(t, 6) for t in range(6)] == pytest.approx([0, 0, 0.1, 1, 1, 1])
    assert freeze_unfreeze(0, 1, frozen=0) == pytest.approx(0.1)


def test_sawtooth_by_hand():
    # 20 epochs, of which 4 (2 rising) for the decoder, then 16 (2 rising) for everything
    want = {0: (0, 1 / 3), 1: (0, 2 / 3), 2: (0, 1), 3: (0, 0.5**0.9)}
    want |= {e: (f, f) for e, f in {4: 1 / 3, 5: 2 / 3, 6: 1, 13: 0.5**0.9, 19: (1 / 14) ** 0.9}.items()}
    assert {e: sawtooth(e, 20, 4, 2) for e in want} == {e: pytest.approx(v) for e, v in want.items()}
    assert sawtooth(0, 2, 1, 1) == (0.0, 1.0) and sawtooth(1, 2, 1, 1) == (1.0, 1.0)


def test_published_lengths_of_the_sawtooth():
    f = FineTuningConfig()
    assert (f.decoder_epochs, f.warmup_epochs) == (50, 50)
    assert [FineTuningConfig(epochs=n).decoder_epochs for n in (1, 2, 3, 20)] == [0, 1, 1, 1]


def test_defaults_of_the_families():
    plans = {"plans_name": "p"}
    f = FineTuningConfig.from_plans(plans, "freeze_unfreeze", "t")
    assert (f.optimizer, f.peak_lr, f.frozen) == ("adam", 3e-4, 1 / 3)
    told = {**plans, "nnssl": {"schedule": "freeze_unfreeze", "optimizer": "sgd", "peak_lr": 0.01}}
    f = FineTuningConfig.from_plans(told, "freeze_unfreeze", "t")
    assert (f.optimizer, f.peak_lr) == ("sgd", 0.01)
    assert FineTuningConfig.from_plans(plans, "sawtooth", "t") == FineTuningConfig()


def test_names_and_figures_of_schedules():
    assert schedule_name("freeze-unfreeze") == "freeze_unfreeze"
    with pytest.raises(NnsslError, match="Did you mean 'sawtooth'"):
        schedule_name("sawtoth")
    check_options({"warmup": 0.1, "decoder_first": 0.2}, "sawtooth")
    with pytest.raises(NnsslError, match="found 2 problems") as error:
        check_options({"frozn": 0.5, "ramp": 2}, "freeze_unfreeze")
    assert "Did you mean 'frozen'" in str(error.value) and "'ramp' must be a number in (0, 1), not 2" in str(
        error.value
    )


GROUPS = ("seg_layers", "decoder stage 1", "decoder stage 0", "encoder stage 1", "encoder stage 0")


@pytest.mark.parametrize(
    ("schedule", "epoch", "want"),
    [
        ("warmup_poly", 9, [1.0] * 5),
        ("encoder_frozen", 1, [1.0, 1.0, 1.0, 0, 0]),
        ("head_only", 1, [1.0, 0, 0, 0, 0]),
        ("sawtooth", 0, [1.0, 1.0, 1.0, 0, 0]),
        ("sawtooth", 1, [0.5] * 5),
        ("freeze_unfreeze", 6, [1.0, 1.0, 0, 0, 0]),
        ("freeze_unfreeze", 7, [1.0, 1.0, 0.1, 0.1, 0.1]),
    ],
)
def test_rates_of_the_groups(schedule, epoch, want):
    backbone = backbone_groups(["encoder", "decoder stage 0"], GROUPS)
    assert backbone == GROUPS[2:]
    rates = LearningRates(
        schedule, FineTuningConfig(epochs=20, iterations=3, peak_lr=1.0, warmup=0.05), GROUPS, backbone
    )
    if schedule == "warmup_poly":
        rates = LearningRates(schedule, FineTuningConfig(epochs=20, iterations=3, peak_lr=1.0, warmup=0.45), GROUPS)
    if schedule == "freeze_unfreeze":
        rates = LearningRates(schedule, FineTuningConfig(21, 3, peak_lr=1.0), GROUPS, backbone)
    assert [rates.at(3 * epoch, g) for g in GROUPS] == pytest.approx(want)


def test_layer_decay_counts_stages_from_the_heads():
    rates = LearningRates("warmup_poly", FineTuningConfig(epochs=4, peak_lr=1.0, warmup=0, layer_decay=0.5), GROUPS)
    assert [rates.at(0, g) for g in GROUPS] == [1, 0.5, 0.25, 0.125, 0.0625]
    assert rates.at(2 * 250, GROUPS[1]) == pytest.approx(0.5 * 0.5**0.9)


def test_optimisers_are_those_that_are_named():
    made = {k: build_optimizer([torch.nn.Parameter(torch.zeros(1))], k, 0.02, 0.03) for k in ("sgd", "adam", "adamw")}
    figures = {k: o.param_groups[0] for k, o in made.items()}
    assert [type(o) for o in made.values()] == [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW]
    assert [f["lr"] for f in figures.values()] == [0.02] * 3
    assert [f["weight_decay"] for f in figures.values()] == [0.03, 0, 0.03]
    assert figures["sgd"]["momentum"] == 0.99 and figures["sgd"]["nesterov"]
    assert figures["adam"]["betas"] == (0.9, 0.999) and figures["adamw"]["betas"] == (0.9, 0.98)


def test_a_linear_probe_has_one_rate_unless_it_warms_up():
    still, rising = (
        LearningRates("linear_probe", FineTuningConfig(20, 3, peak_lr=1.0, warmup=w), GROUPS) for w in (0, 0.1)
    )
    assert [still.at(step, "seg_layers") for step in (0, 30, 59)] == [1.0, 1.0, 1.0]
    assert rising.at(0, "seg_layers") == pytest.approx(1 / 3) and rising.at(59, "seg_layers") == pytest.approx(
        (1 / 18) ** 0.9
    )


def test_a_schedule_needs_no_state():
    optimizer = torch.optim.SGD([{"params": [torch.nn.Parameter(torch.zeros(1))], "name": g} for g in GROUPS], lr=9.0)
    schedule = StepSchedule(optimizer, LearningRates("sawtooth", FineTuningConfig(20, 3), GROUPS))
    for step in (50, 0, 31, 4):
        schedule.set(step)
        assert schedule.now() == {g: schedule.rates.at(step, g) for g in GROUPS}
    schedule.step(1)
    assert schedule.now() == {g: schedule.rates.at(3, g) for g in GROUPS}


@pytest.mark.parametrize("arch", ["plain", "resenc"])
@pytest.mark.parametrize("dim", [2, 3])
def test_groups_are_disjoint_and_complete(arch, dim, tiny_plans, tiny_dataset_json):
    plan = Plan.from_dicts(tiny_plans(dim, arch), "2d" if dim == 2 else "3d_fullres", tiny_dataset_json())
    network = build_network(plan)
    groups = parameter_groups(network)
    ids = [id(p) for group in groups for p in group["params"]]
    assert len(ids) == len(set(ids)) and set(ids) == {id(p) for p in network.parameters()}
    assert [g["name"] for g in groups] == [
        *("seg_layers", "decoder stage 1", "decoder stage 0"),
        *("encoder stage 2", "encoder stage 1", "encoder stage 0"),
    ]
    encoder = {id(p) for p in network.encoder.parameters()}
    of_encoder = {id(p) for group in groups if group["name"].startswith("encoder") for p in group["params"]}
    assert of_encoder == encoder
    assert encoder < {id(p) for p in network.decoder.parameters()}, "the trap that names avoid"


def test_group_names():
    assert group_of("encoder.stem.convs.0.conv.weight") == "encoder stage 0"
    assert group_of("encoder.stages.3.blocks.0.conv1.conv.weight") == "encoder stage 3"
    assert group_of("decoder.encoder.stages.2.0.convs.0.conv.weight") == "encoder stage 2"
    assert group_of("decoder.transpconvs.1.weight") == "decoder stage 1"
    assert group_of("eva.blocks.0.norm1.weight") == "encoder stage 1"
    assert group_of("eva.pos_embed") == group_of("down_projection.proj.weight") == "encoder stage 0"
    assert group_of("eva.norm.bias") == "encoder norm" and group_of("up_projection.decode.2.bias") == "up_projection"
    assert group_of("something.weight") == "other"


def test_frozen_batch_normalisations_keep_their_statistics():
    net = torch.nn.Sequential(torch.nn.BatchNorm1d(2), torch.nn.BatchNorm1d(2), torch.nn.BatchNorm1d(2, affine=False))
    net.train()
    hold_statistics(net, list(net[0].parameters()))
    assert [m.training for m in net] == [False, True, True]
    hold_statistics(net, [])
    assert [m.training for m in net] == [True, True, True]


def test_names_are_merged_and_described():
    rates = {
        "seg_layers": 3e-4,
        "decoder stage 1": 3e-4,
        "decoder stage 0": 0.0,
        "encoder stage 1": 0.0,
        "encoder stage 0": 0.0,
    }
    assert merge_names(rates) == {"seg_layers, decoder stage 1": 3e-4, "decoder stage 0, encoder stages 1-0": 0.0}
    assert describe_rates(rates) == "seg_layers, decoder stage 1 0.0003, decoder stage 0, encoder stages 1-0 frozen"
