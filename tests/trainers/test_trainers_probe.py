"""The linear probe: its network by hand, its plans, its training, and plain nnU-Net predicting with it."""

import json
import pydoc
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from nnssl.errors import NnsslError
from nnssl.networks import canonical_state_dict, forward_features
from nnssl.networks.probe import LinearProbe
from nnssl.plans import Plan, load_plan
from nnssl.plans.probe import CLASS, from_probe, to_probe
from nnssl.trainers import nnUNetTrainerLinearProbe

ANISOTROPIC = {"strides": ((1, 1, 1), (1, 2, 2), (2, 2, 1)), "kernels": ((1, 3, 3), (3, 3, 3), (3, 3, 3))}


def build_probe(plans, configuration, channels, classes):
    """As nnU-Net builds it from plans."""
    from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

    told = plans["configurations"][configuration]["architecture"]
    return get_network_from_plans(
        told["network_class_name"],
        told["arch_kwargs"],
        told["_kw_requires_import"],
        channels,
        classes,
        True,
        deep_supervision=True,
    )


@pytest.mark.parametrize("levels", ["decoder", "encoder"])
@pytest.mark.parametrize(("arch", "dim"), [("plain", 3), ("resenc", 3), ("plain", 2)])
def test_it_is_the_sum_of_upsampled_linear_maps(arch, dim, levels, tiny_plans, tiny_dataset_json):
    configuration = "2d" if dim == 2 else "3d_fullres"
    plan = Plan.from_dicts(tiny_plans(dim, arch, 2, **ANISOTROPIC), configuration, tiny_dataset_json(2))
    probe = build_probe(to_probe(plan, levels), configuration, 2, 5)
    x = torch.randn(2, 2, *(4, 8, 12)[-dim:])
    assert not probe(x).any(), "the heads start at 0"
    with torch.no_grad():
        for p in probe.heads.parameters():
            p.normal_()
        seen = forward_features(probe.backbone, x)
        maps = seen.levels if levels == "decoder" else seen.skips[::-1]
        want = sum(
            functional.interpolate(
                torch.einsum("bc...,kc->bk...", m, h.weight.flatten(1)), size=x.shape[2:], mode="nearest"
            )
            for m, h in zip(maps, probe.heads, strict=True)
        ) + probe.heads[-1].bias.reshape(1, -1, *[1] * dim)
    assert torch.allclose(probe(x), want, atol=1e-4)
    assert [h.bias is not None for h in probe.heads] == [False, False, True]


def test_the_backbone_learns_nothing(tiny_plans, tiny_dataset_json):
    plan = Plan.from_dicts(tiny_plans(), "3d_fullres", tiny_dataset_json())
    probe = build_probe(to_probe(plan, "decoder"), "3d_fullres", 1, 3).train()
    assert probe.training and probe.heads.training and not any(m.training for m in probe.backbone.modules())
    probe(torch.randn(1, 1, 8, 8, 8)).sum().backward()
    assert {n.split(".")[0] for n, p in probe.named_parameters() if p.grad is not None} == {"heads"}
    with pytest.raises(ValueError, match="levels is 'all'"):
        LinearProbe(1, 2, backbone="x", levels="all", conv_op=torch.nn.Conv3d)
    with pytest.raises(ImportError, match="the backbone no.such"):
        LinearProbe(1, 2, backbone="no.such", levels="decoder", conv_op=torch.nn.Conv3d)


def test_plans_there_and_back(tiny_plans, tiny_dataset_json):
    plans = tiny_plans(both=True)
    plans["configurations"]["3d_b9"] = {"inherits_from": "3d_fullres", "batch_size": 9}
    plan = Plan.from_dicts(plans, "3d_fullres", tiny_dataset_json())
    before = json.dumps(plans)
    probe = to_probe(plan, "encoder")
    assert json.dumps(plans) == before
    assert pydoc.locate(probe["configurations"]["3d_fullres"]["architecture"]["network_class_name"]) is LinearProbe
    assert CLASS not in json.dumps([probe["configurations"][c] for c in ("2d", "3d_b9")])
    back = from_probe(json.loads(json.dumps(probe)), "3d_fullres")
    assert Plan.from_dicts(back, "3d_fullres", tiny_dataset_json()).architecture_hash == plan.architecture_hash
    assert from_probe(plans, "3d_fullres") is plans


def a_step(trainer):
    trainer.on_train_epoch_start()
    batch = {"data": torch.randn(2, 1, 16, 16, 16), "target": torch.randint(0, 3, (2, 1, 16, 16, 16)).float()}
    return trainer.train_step(batch)["loss"]


def test_it_probes_the_pretrained_network(dataset, pretraining, build, start):
    from nnssl import checkpoint

    file = pretraining()
    trainer = start(build(nnUNetTrainerLinearProbe))
    given, before = checkpoint.load(file).weights, {n: t.clone() for n, t in trainer.network.state_dict().items()}
    backbone = canonical_state_dict(trainer.network.backbone)
    assert all(torch.equal(t, given[n]) for n, t in backbone.items() if "seg_layers" not in n)
    losses = [float(a_step(trainer)) for _ in range(3)]
    assert all(map(torch.isfinite, map(torch.tensor, losses)))
    moved = {n.split(".")[0] for n, t in trainer.network.state_dict().items() if not torch.equal(t, before[n])}
    assert moved == {"heads"}
    assert isinstance(trainer.optimizer, torch.optim.Adam) and trainer.optimizer.param_groups[0]["lr"] == 3e-4
    assert trainer.provenance["method"] == "macl" and trainer.provenance["schedule"] == "linear_probe"
    plans = json.loads((Path(trainer.output_folder_base) / "plans.json").read_text())
    assert plans["configurations"]["3d_fullres"]["architecture"]["network_class_name"] == CLASS
    assert CLASS not in (dataset / "nnUNetPlans.json").read_text()
    log = Path(trainer.log_file).read_text()
    assert "predicts only where nnssl is installed" in log and "nnUNetv2_export_model_to_zip" in log
    trainer.on_train_end()  # said last too, where a person looks for what to do next
    assert Path(trainer.log_file).read_text().count("predicts only where nnssl is installed") == 2


def test_continued(dataset, pretraining, build, start):
    file = pretraining()
    trainer = start(build(nnUNetTrainerLinearProbe))
    a_step(trainer)
    target = str(Path(trainer.output_folder, "checkpoint_latest.pth"))
    trainer.save_checkpoint(target)
    saved = torch.load(target, weights_only=True)
    assert [group["name"] for group in saved["optimizer_state"]["param_groups"]] == ["seg_layers"]
    file.unlink()
    again = build(nnUNetTrainerLinearProbe, resume=True)
    again.load_checkpoint(target)
    start(again)
    want = trainer.network.state_dict()
    assert all(torch.equal(t, want[n]) for n, t in again.network.state_dict().items())


def test_random_stages_are_not_probed(dataset, pretraining, build, start, capsys):
    from nnssl.plan_command import main

    file = pretraining(decoder_stages=(0,))
    with pytest.raises(NnsslError, match="no weights for decoder stage 1.*--schedule linear-probe -o levels=encoder"):
        start(build(nnUNetTrainerLinearProbe))
    assert main(["-d", "901", "--checkpoint", str(file), "--schedule", "linear-probe", "--name", "lp"]) == 0
    assert "-tr nnUNetTrainerLinearProbe" in capsys.readouterr().out
    assert load_plan(901, plans_name="nnUNetPlans_lp").nnssl["levels"] == "encoder"
    trainer = start(build(nnUNetTrainerLinearProbe, "nnUNetPlans_lp"))
    assert trainer.network.levels == "encoder"
    a_step(trainer)


def test_few_labels(dataset, pretraining, build, start):
    from nnssl.weights import write_variant

    write_variant(load_plan(901), "few", checkpoint=pretraining(), labels=1, schedule="linear_probe")
    trainer = start(build(nnUNetTrainerLinearProbe, "nnUNetPlans_few"))
    assert trainer.do_split()[0] == load_plan(901, plans_name="nnUNetPlans_few").nnssl["train_cases"]["0"]


def test_plain_nnunet_loads_it(dataset, pretraining, build, start):
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    pretraining()
    trainer = start(build(nnUNetTrainerLinearProbe))
    a_step(trainer)
    trainer.save_checkpoint(str(Path(trainer.output_folder) / "checkpoint_final.pth"))
    predictor = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False, use_mirroring=False)
    predictor.initialize_from_trained_model_folder(trainer.output_folder_base, (0,))
    assert predictor.trainer_name == "nnUNetTrainer" and type(predictor.network) is LinearProbe
    x = torch.randn(1, 16, 16, 16)
    logits = predictor.predict_logits_from_preprocessed_data(x)
    trainer.network.eval()
    with torch.no_grad():
        want = trainer.network(x[None])[0]
    assert logits.any() and torch.allclose(logits.float(), want, atol=0.02)


@pytest.mark.slow
def test_nnunets_own_training_and_validation(dataset, pretraining, build):
    pretraining()
    trainer = build(nnUNetTrainerLinearProbe)
    trainer.run_training()
    trainer.perform_actual_validation()
    assert (Path(trainer.output_folder) / "validation" / "summary.json").is_file()


def test_it_learns_what_is_linear_in_the_features(tiny_plans, tiny_dataset_json):
    """Labels are the threshold of one feature of a random network: the probe must find it."""
    plan = Plan.from_dicts(tiny_plans(), "3d_fullres", tiny_dataset_json())
    probe = build_probe(to_probe(plan, "decoder"), "3d_fullres", 1, 2)
    x = torch.randn(2, 1, 16, 16, 16)
    finest = probe.features(x)[-1][:, 0]
    target = (finest > finest.median()).long()
    optimizer = torch.optim.Adam([p for p in probe.parameters() if p.requires_grad], 0.05)
    for _ in range(150):
        optimizer.zero_grad()
        loss = functional.cross_entropy(probe(x), target)
        loss.backward()
        optimizer.step()
    assert (probe(x).argmax(1) == target).float().mean() > 0.9
