"""Freeze-then-unfreeze, sawtooth, frozen encoder, head only, layer-wise decay: values by hand, groups, and what stays frozen."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.image import imread

from nnssl import checkpoint, trainers
from nnssl.errors import NnsslError
from nnssl.networks import build_network, canonical_state_dict
from nnssl.plans import Plan, load_plan
from nnssl.plans.figures import SCHEDULES, FineTuningConfig, check_options, schedule_name
from nnssl.trainers import learning_rates, nnUNetTrainerPretrainedScratch
from nnssl.trainers.groups import backbone_groups, build_optimizer, group_of, hold_statistics, parameter_groups
from nnssl.trainers.learning_rates import describe_rates, draw_rates, merge_names
from nnssl.trainers.schedule import LearningRates, StepSchedule, freeze_unfreeze, sawtooth
from nnssl.weights import part_of, write_variant

NEW = {
    "freeze_unfreeze": trainers.nnUNetTrainerPretrainedFreezeUnfreeze,
    "sawtooth": trainers.nnUNetTrainerPretrainedSawtooth,
    "encoder_frozen": trainers.nnUNetTrainerPretrainedFrozen,
    "head_only": trainers.nnUNetTrainerPretrainedHeadOnly,
}
ALL_BUT_HEADS = ("encoder", "decoder stage 0", "decoder stage 1")


# --------------------------------------------------------------------------------------------- pure functions


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


# ------------------------------------------------------------------------------------------------------ groups


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


# -------------------------------------------------------------------------------------------------- the record


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


def frozen_then_not():
    figures = FineTuningConfig(epochs=4, iterations=10, peak_lr=1e-3, frozen=0.375, ramp=0.1)
    return LearningRates("freeze_unfreeze", figures, ("seg_layers", "encoder stage 0"), ("encoder stage 0",))


def test_a_jump_of_the_learning_rate_is_drawn_as_one():
    """Frozen for 15 of 40 steps: the rate changes within the second epoch, in one step."""
    from matplotlib.figure import Figure as Canvas

    ax = Canvas().subplots()
    learning_rates._draw(frozen_then_not(), 2, ax)
    line = next(line for line in ax.get_lines() if line.get_label() == "encoder stage 0")
    assert line.get_drawstyle() == "steps-post"
    drawn = {round(x * 10): y for x, y in line.get_xydata()}
    assert drawn[14] == 0 and drawn[15] == pytest.approx(1e-4) and max(drawn) == 20
    assert "10 optimiser steps" in ax.get_xlabel()


def test_the_figure_gets_a_panel_below_nnunets(tmp_path):
    from matplotlib.image import imsave

    path = tmp_path / "progress.png"
    imsave(path, np.full((300, 1200, 4), 0.5, np.float32))
    draw_rates(frozen_then_not(), 2, path)
    image = imread(path)
    assert image.shape == (1700, 1200, 3)
    assert np.allclose(image[:300], 0.5, atol=0.01) and image[300:].std() > 0.05
    assert [p.name for p in tmp_path.iterdir()] == ["progress.png"]


# -------------------------------------------------------------------------------------------------- the trainers


def snapshot(trainer):
    return {name: tensor.clone() for name, tensor in canonical_state_dict(trainer.network).items()}


def moved(trainer, before):
    """The parts in which any tensor is not bit-identical any more."""
    now = canonical_state_dict(trainer.network)
    return {part_of(n) for n in before if not torch.equal(before[n], now[n])}


def a_batch(trainer, seed=0):
    generator = torch.Generator().manual_seed(seed)
    data = torch.randn(2, 1, 16, 16, 16, generator=generator)
    target = [torch.randint(0, 3, (2, 1, n, n, n), generator=generator).float() for n in (16, 8)]
    return {"data": data, "target": target}


def run_epoch(trainer, seed=0):
    """The training part of an epoch on random batches; returns the parts that moved at each step."""
    trainer.on_train_epoch_start()
    parts = []
    for i in range(trainer.num_iterations_per_epoch):
        before = snapshot(trainer)
        trainer.train_step(a_batch(trainer, seed + i))
        parts.append(moved(trainer, before))
    trainer.current_epoch += 1
    return parts


def variant(dataset, name, **told):
    """A plans file with other figures."""
    plans = json.loads((dataset / "nnUNetPlans.json").read_text())
    plans["plans_name"] = f"nnUNetPlans_{name}"
    plans["nnssl"] = {**plans["nnssl"], "base_plans": "nnUNetPlans", **told}
    (dataset / f"nnUNetPlans_{name}.json").write_text(json.dumps(plans))
    return f"nnUNetPlans_{name}"


EVERYTHING = {*ALL_BUT_HEADS, "seg_layers"}
MOVES = {
    "freeze_unfreeze": [{"seg_layers"}, {"seg_layers"}, EVERYTHING, EVERYTHING, EVERYTHING, EVERYTHING],
    "sawtooth": [EVERYTHING - {"encoder"}] * 2 + [EVERYTHING] * 4,
    "encoder_frozen": [EVERYTHING - {"encoder"}] * 6,
    "head_only": [{"seg_layers"}] * 6,
}


@pytest.mark.parametrize("schedule", sorted(NEW))
def test_frozen_parts_are_bit_identical_until_they_are_thawed(schedule, dataset, pretraining, build, start):
    pretraining()
    plans = variant(dataset, "x", epochs=3, iterations=2, schedule=schedule)
    trainer = start(build(NEW[schedule], plans))
    steps = [parts for _ in range(3) for parts in run_epoch(trainer)]
    assert steps == MOVES[schedule]
    assert [row["epoch"] for row in trainer.rates] == [0, 1, 2]
    assert trainer.logger.get_value("lrs", step=None)[0] > 0, "nnU-Net's own log shows the heads' rate"
    log = Path(trainer.log_file).read_text()
    assert "nnssl: learning rates seg_layers" in log and "frozen" in log
    assert trainer.provenance["schedule"] == schedule
    assert SCHEDULES[schedule][0] == type(trainer).__name__


@pytest.mark.parametrize("schedule", sorted(NEW))
def test_what_never_learns_needs_no_gradient(schedule, dataset, pretraining, build, start):
    """And what is frozen for a time does: DDP is told once which parameters there are."""
    pretraining()
    trainer = start(build(NEW[schedule], variant(dataset, "x", epochs=3, schedule=schedule)))
    encoder = {"encoder stage 0", "encoder stage 1", "encoder stage 2"}
    never = {"encoder_frozen": encoder, "head_only": {*encoder, "decoder stage 0", "decoder stage 1"}}.get(
        schedule, set()
    )
    for group in trainer.optimizer.param_groups:
        assert {p.requires_grad for p in group["params"]} == {group["name"] not in never}


def test_frozen_batch_normalisations_keep_their_statistics_in_each_epoch(dataset, pretraining, build, start):
    """nnU-Net puts the whole network into training mode at each epoch's start."""
    file = dataset / "nnUNetPlans.json"
    file.write_text(file.read_text().replace("instancenorm.InstanceNorm3d", "batchnorm.BatchNorm3d"))
    pretraining()
    trainer = start(build(NEW["sawtooth"], variant(dataset, "x", epochs=3, iterations=1, schedule="sawtooth")))
    for held in (True, False):
        trainer.on_train_epoch_start()
        norms = {name: m.training for name, m in trainer.network.named_modules() if isinstance(m, torch.nn.BatchNorm3d)}
        assert {on for name, on in norms.items() if name.startswith("encoder")} == {not held}
        assert {on for name, on in norms.items() if name.startswith("decoder.stages")} == {True}
        trainer.current_epoch += 1


def test_parts_that_did_not_come_pretrained_are_not_frozen(dataset, pretraining, build, start):
    pretraining(decoder_stages=(0,))
    plans = variant(dataset, "x", epochs=3, schedule="freeze_unfreeze")
    trainer = start(build(NEW["freeze_unfreeze"], plans))
    assert trainer.provenance["backbone"] == ["encoder", "decoder stage 0"]
    assert run_epoch(trainer) == [{"seg_layers", "decoder stage 1"}] * 2
    frozen = {"encoder stage 0", "encoder stage 1", "encoder stage 2", "decoder stage 0"}
    assert {g for g, lr in trainer.rates[0]["last"].items() if lr == 0} == frozen


def test_continued_in_the_middle_of_a_ramp(dataset, pretraining, build, start):
    """Straight, and stopped after one of three epochs: same rates and bit-identical weights; the file need not be there."""
    file = pretraining(decoder_stages=(0,))
    plans = variant(dataset, "x", epochs=3, iterations=3, schedule="freeze_unfreeze", frozen=0.2, ramp=0.5)
    straight = start(build(NEW["freeze_unfreeze"], plans))
    first = snapshot(straight)
    for epoch in range(3):
        run_epoch(straight, 10 * epoch)
    rates = [row["last"]["encoder stage 0"] for row in straight.rates]
    assert 0 < rates[0] < rates[1] < rates[2] == 3e-4

    stopped = start(build(NEW["freeze_unfreeze"], plans))
    stopped.network.load_state_dict(first, strict=False)
    for part in (stopped.network.encoder, stopped.network.decoder.seg_layers):  # the same random heads
        names = {id(p): n for n, p in stopped.network.named_parameters()}
        with torch.no_grad():
            for p in part.parameters():
                p.copy_(first[names[id(p)]])
    for name, tensor in canonical_state_dict(stopped.network).items():
        tensor.copy_(first[name])
    run_epoch(stopped, 0)
    target = str(Path(stopped.output_folder, "checkpoint_latest.pth"))
    stopped.current_epoch -= 1  # as nnU-Net's on_epoch_end: it saves before it counts
    stopped.save_checkpoint(target)
    file.unlink()
    again = build(NEW["freeze_unfreeze"], plans, resume=True)
    again.load_checkpoint(target)
    assert again.provenance["backbone"] == ["encoder", "decoder stage 0"] and len(again.rates) == 1
    start(again)
    for epoch in (1, 2):
        run_epoch(again, 10 * epoch)
    assert again.rates == straight.rates
    want = canonical_state_dict(straight.network)
    assert all(torch.equal(t, want[n]) for n, t in canonical_state_dict(again.network).items())


def test_the_control_follows_the_plans_schedule(dataset, pretraining, build, start):
    plans = variant(dataset, "x", epochs=3, schedule="freeze_unfreeze", backbone=["encoder"])
    control = start(build(nnUNetTrainerPretrainedScratch, plans))
    assert control.followed_schedule == "freeze_unfreeze" and control.provenance["weights"] == "random"
    pretraining()
    pretrained = start(build(NEW["freeze_unfreeze"], plans))
    names = [g["name"] for g in pretrained.optimizer.param_groups]
    assert [g["name"] for g in control.optimizer.param_groups] == names
    assert type(control.optimizer) is type(pretrained.optimizer) is torch.optim.Adam
    assert control.lr_scheduler.rates.backbone == tuple(n for n in names if n.startswith("encoder"))


def test_pretrained_weights_of_the_command_line_are_the_backbone(dataset, pretraining, build, start):
    from nnunetv2.run.run_training import maybe_load_checkpoint

    given = pretraining(name="other")
    plans = variant(dataset, "x", schedule="freeze_unfreeze")
    trainer = build(NEW["freeze_unfreeze"], plans)
    maybe_load_checkpoint(trainer, False, False, str(given))
    start(trainer)
    assert trainer.provenance["backbone"] == list(ALL_BUT_HEADS)


def test_layer_decay_in_training(dataset, pretraining, build, start):
    pretraining()
    plans = variant(dataset, "x", layer_decay=0.5, warmup=0.0, optimizer="sgd")
    trainer = start(build(plans=plans))
    rates = [g["lr"] for g in trainer.optimizer.param_groups]
    assert rates == pytest.approx([1e-2 * 0.5**i for i in range(6)])
    assert isinstance(trainer.optimizer, torch.optim.SGD)
    assert run_epoch(trainer) == [EVERYTHING] * 2


@pytest.fixture
def one_rank(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("wrap", ["compile", "ddp"])
@pytest.mark.parametrize("schedule", ["freeze_unfreeze", "head_only"])
def test_wrapped_networks(wrap, schedule, dataset, pretraining, build, start, request, monkeypatch):
    pretraining()
    trainer = build(NEW[schedule], variant(dataset, "x", epochs=3, iterations=1, schedule=schedule))
    if wrap == "compile":
        trainer._do_i_compile = lambda: True
        compiled = torch.compile
        monkeypatch.setattr(torch, "compile", lambda model: compiled(model, backend="eager"))
    trainer.initialize()
    if wrap == "ddp":
        request.getfixturevalue("one_rank")
        trainer.network = torch.nn.parallel.DistributedDataParallel(trainer.network)
        trainer.is_ddp = True
        trainer.loss = trainer._build_loss()  # under DDP nnU-Net gives the lowest output a weight
    start(trainer)
    steps = [parts for _ in range(3) for parts in run_epoch(trainer)]
    assert steps == [MOVES[schedule][i] for i in (0, 2, 3)]


@pytest.mark.parametrize("schedule", sorted(NEW))
def test_stock_nnunet_takes_the_checkpoint(schedule, dataset, pretraining, build, start):
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    pretraining()
    trainer = start(build(NEW[schedule], variant(dataset, "x", schedule=schedule)))
    run_epoch(trainer)
    trainer.save_checkpoint(str(Path(trainer.output_folder) / "checkpoint_final.pth"))
    assert checkpoint.load(Path(trainer.output_folder) / "checkpoint_final.pth").content["nnssl_learning_rates"]
    predictor = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(trainer.output_folder_base, (0,))
    assert predictor.trainer_name == "nnUNetTrainer"
    ours, theirs = canonical_state_dict(trainer.network), canonical_state_dict(predictor.network)
    assert all(torch.equal(ours[n], theirs[n]) for n in ours)


@pytest.mark.slow
def test_one_whole_training_draws_the_rates(dataset, pretraining, build):
    pretraining()
    trainer = build(NEW["sawtooth"], variant(dataset, "x", epochs=2, iterations=1, schedule="sawtooth"))
    trainer.run_training()
    folder = Path(trainer.output_folder)
    assert imread(folder / "progress.png").shape[0] > 6000
    rows = torch.load(folder / "checkpoint_final.pth", weights_only=True)["nnssl_learning_rates"]
    assert [row["first"]["encoder stage 0"] for row in rows] == pytest.approx([0, 1e-2])
    assert set(trainer.logger.get_checkpoint()) == {
        *("mean_fg_dice", "ema_fg_dice", "dice_per_class_or_region", "train_losses", "val_losses", "lrs"),
        *("epoch_start_timestamps", "epoch_end_timestamps"),
    }


def test_the_variant_names_the_backbone_and_the_trainer(dataset, pretraining, build, start, capsys):
    from nnssl.plan_command import main

    file = pretraining(decoder_stages=(0,))
    arguments = ["-d", "901", "--checkpoint", str(file), "--schedule", "freeze-unfreeze", "--name", "fu"]
    assert main([*arguments, "-o", "frozen=0.5", "-o", "optimizer=sgd", "--epochs", "4"]) == 0
    assert "-tr nnUNetTrainerPretrainedFreezeUnfreeze" in capsys.readouterr().out
    told = load_plan(901, plans_name="nnUNetPlans_fu").nnssl
    assert (told["schedule"], told["frozen"], told["optimizer"]) == ("freeze_unfreeze", 0.5, "sgd")
    assert told["backbone"] == ["encoder", "decoder stage 0"]
    trainer = start(build(NEW["freeze_unfreeze"], "nnUNetPlans_fu"))
    assert trainer.figures.frozen == 0.5 and isinstance(trainer.optimizer, torch.optim.SGD)
    with pytest.raises(NnsslError, match="use -tr nnUNetTrainerPretrainedFreezeUnfreeze"):
        build(plans="nnUNetPlans_fu")
    write_variant(load_plan(901, plans_name="nnUNetPlans_fu"), "st", schedule="sawtooth", epochs=5)
    told = load_plan(901, plans_name="nnUNetPlans_fu_st").nnssl
    assert told["schedule"] == "sawtooth" and told["epochs"] == 5 and told["checkpoint"]
    assert not {"frozen", "optimizer", "backbone"} & set(told), "figures of the other schedule have left"
    for wrong, text in (
        ("-o warmup=0.1", "'warmup' is no option of the schedule freeze-unfreeze"),
        ("-o frozen=2", "'frozen' must be a number in [0, 1), not '2'"),
    ):
        assert main(["-d", "901", "--schedule", "freeze-unfreeze", "--name", "y", *wrong.split()]) == 1
        assert text in capsys.readouterr().err


def test_with_a_gradient_scaler(dataset, pretraining, build, start):
    """As on GPUs: gradients are unscaled, clipped without the frozen parts, and applied; the same steps without one."""
    pretraining()
    plans = variant(dataset, "x", epochs=3, schedule="freeze_unfreeze")
    plain, scaled = (start(build(NEW["freeze_unfreeze"], plans)) for _ in range(2))
    for ours, theirs in zip(scaled.network.parameters(), plain.network.parameters()):
        ours.data.copy_(theirs.data)
    scaled.grad_scaler = torch.GradScaler("cpu", init_scale=2.0**10)
    steps = [run_epoch(trainer) + run_epoch(trainer) for trainer in (plain, scaled)]
    assert steps[0] == steps[1] == MOVES["freeze_unfreeze"][:4]
    want = canonical_state_dict(plain.network)
    assert all(torch.allclose(t, want[n], atol=1e-5) for n, t in canonical_state_dict(scaled.network).items())


def test_frozen_gradients_do_not_count_in_the_norm(dataset, pretraining, build, start, monkeypatch):
    pretraining()
    trainer = start(build(NEW["freeze_unfreeze"], variant(dataset, "x", epochs=3, schedule="freeze_unfreeze")))
    clip, seen = torch.nn.utils.clip_grad_norm_, []

    def spy(parameters, norm):
        parameters = list(parameters)
        seen.append(({id(p) for p in parameters if p.grad is not None}, norm))
        return clip(parameters, norm)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", spy)
    run_epoch(trainer)
    heads = {id(p) for p in trainer.network.decoder.seg_layers.parameters()}
    assert all(with_gradient <= heads and norm == 12 for with_gradient, norm in seen) and len(seen) == 2


def planned(schedule, dataset):
    """Steps of our own with a schedule, nnU-Net's without."""
    if schedule is None:
        return trainers.nnUNetTrainerPretrained, "nnUNetPlans"
    return NEW[schedule], variant(dataset, "x", schedule=schedule)


@pytest.mark.parametrize("schedule", [None, "sawtooth"])
def test_on_a_cpu_in_bfloat16_where_told(schedule, dataset, pretraining, build, start, monkeypatch):
    pretraining()
    cls, plans = planned(schedule, dataset)
    losses, seen = {}, {}
    for told in ("0", "1"):
        monkeypatch.setenv("nnssl_cpu_bf16", told)
        torch.manual_seed(0)
        trainer = start(build(cls, plans))
        conv = next(m for m in trainer.network.modules() if isinstance(m, torch.nn.Conv3d))
        conv.register_forward_hook(lambda module, x, y, told=told: seen.setdefault(told, set()).add(y.dtype))
        trainer.on_train_epoch_start()
        trained = [float(trainer.train_step(a_batch(trainer, i))["loss"]) for i in range(2)]
        trainer.on_validation_epoch_start()
        checked = trainer.validation_step(a_batch(trainer, 5))
        losses[told] = [*trained, float(checked["loss"]), *checked["tp_hard"]]
        assert {t.dtype for t in trainer.network.parameters()} == {torch.float32}
        assert not trainer.network._forward_hooks
    assert seen == {"0": {torch.float32}, "1": {torch.bfloat16}}
    assert losses["0"][:3] != losses["1"][:3]
    np.testing.assert_allclose(losses["1"][:3], losses["0"][:3], atol=0.02)


@pytest.mark.parametrize("schedule", [None, "sawtooth"])
def test_on_a_cpu_in_float32_where_bfloat16_would_be_wrong(
    schedule, dataset, pretraining, build, start, monkeypatch, capsys
):
    """torch 2.14 spoils the weights' gradient of maps that are two voxels deep; here of the deepest maps."""
    pretraining()
    cls, plans = planned(schedule, dataset)
    deepest = {}

    def forward(self, x):
        weight = self.weight
        if torch.is_autocast_enabled("cpu") and tuple(x.shape[2:]) == deepest.get("size") and torch.is_grad_enabled():
            weight = weight.clone()
            weight.register_hook(lambda gradient: gradient * torch.nan)
        return self._conv_forward(x, weight, self.bias)

    monkeypatch.setattr(torch.nn.Conv3d, "forward", forward)
    losses = {}
    for told in ("0", "1"):
        monkeypatch.setenv("nnssl_cpu_bf16", told)
        torch.manual_seed(0)
        trainer = start(build(cls, plans))
        strides = np.prod(trainer.configuration_manager.pool_op_kernel_sizes, axis=0)
        deepest["size"] = tuple(int(n) for n in np.array(trainer.configuration_manager.patch_size) // strides)
        trainer.on_train_epoch_start()
        losses[told] = [float(trainer.train_step(a_batch(trainer, i))["loss"]) for i in range(2)]
        trainer.on_validation_epoch_start()
        losses[told].append(float(trainer.validation_step(a_batch(trainer, 5))["loss"]))
    assert losses["0"] == losses["1"]
    assert capsys.readouterr().out.count("nnssl: float32 in place of bfloat16") == 1
