"""Trainers of the schedules: what stays frozen bit by bit, continued in a ramp, wrapped, scaled, and in bfloat16 on a CPU."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.image import imread

from nnssl import checkpoint, trainers
from nnssl.errors import NnsslError
from nnssl.networks import canonical_state_dict
from nnssl.plans import load_plan
from nnssl.plans.figures import SCHEDULES
from nnssl.trainers import nnUNetTrainerPretrainedScratch
from nnssl.weights import part_of, write_variant

NEW = {
    "freeze_unfreeze": trainers.nnUNetTrainerPretrainedFreezeUnfreeze,
    "sawtooth": trainers.nnUNetTrainerPretrainedSawtooth,
    "encoder_frozen": trainers.nnUNetTrainerPretrainedFrozen,
    "head_only": trainers.nnUNetTrainerPretrainedHeadOnly,
}


ALL_BUT_HEADS = ("encoder", "decoder stage 0", "decoder stage 1")


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
    assert SCHEDULES[schedule] == type(trainer).__name__


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
