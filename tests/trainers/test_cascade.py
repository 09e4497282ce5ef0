"""Cascades: both stages fine-tune, pretrained and control; a second stage as a source; refusals end in one message."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from nnssl import checkpoint
from nnssl.errors import NnsslError
from nnssl.networks import build_network, canonical_state_dict
from nnssl.plan_command import main as plan_main
from nnssl.plans import Plan, load_plan
from nnssl.trainers import nnUNetTrainerPretrained, nnUNetTrainerPretrainedScratch
from nnssl.weights import Adaptation, apply, convert, describe

STEM = "encoder.stages.0.0.convs.0.conv.weight"


@pytest.fixture
def cascade(dataset):
    """The dataset's plans with a cascade: 3d_lowres, and 3d_cascade_fullres on the data of 3d_fullres."""
    path = dataset / "nnUNetPlans.json"
    plans = json.loads(path.read_text())
    configurations = plans["configurations"]
    configurations["3d_lowres"] = {
        **configurations["3d_fullres"],
        "spacing": [2.0, 2.0, 2.0],
    }
    configurations["3d_lowres"]["next_stage"] = "3d_cascade_fullres"
    configurations["3d_cascade_fullres"] = {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"}
    path.write_text(json.dumps(plans))
    return dataset


def trainer(cls, folder, configuration="3d_cascade_fullres", plans="nnUNetPlans"):
    content = json.loads((folder / f"{plans}.json").read_text()) | {"continue_training": False}
    made = cls(content, configuration, 0, json.loads((folder / "dataset.json").read_text()), torch.device("cpu"))
    made.get_dataloaders = lambda: (None, None)
    return made


def test_a_pretraining_that_is_not_finished_is_no_source_of_the_second_stage(cascade, pretraining):
    pretraining(finished=False)
    with pytest.raises(NnsslError, match=r"(?s)second stage of a cascade.*--checkpoint FILE.*There is none yet"):
        trainer(nnUNetTrainerPretrained, cascade).on_train_start()


def test_the_second_stage_takes_the_image_channels_weights(cascade, pretraining):
    file = pretraining()
    refused = trainer(nnUNetTrainerPretrained, cascade)
    with pytest.raises(
        NnsslError,
        match=r"(?s)second stage of a cascade.*nnssl_plan -d 901 -c 3d_cascade_fullres.*Macl.*-tr \w+Scratch$",
    ):
        refused.on_train_start()
    command = (
        str(next(e for e in [_error(refused)] if e))
        .split("nnssl_plan ")[1]
        .split("\n")[0]
        .replace("--name NAME", "--name casc")
    )
    assert plan_main(command.split()) == 0
    made = trainer(nnUNetTrainerPretrained, cascade, plans="nnUNetPlans_casc")
    made.on_train_start()
    stem, given = canonical_state_dict(made.network)[STEM], checkpoint.load(file).weights[STEM]
    assert stem.shape[1] == 3 and torch.equal(stem[:, :1], given) and not stem[:, 1:].any()
    assert "the segmentation's 2 begin at 0" in Path(made.log_file).read_text()
    loss = made.network(torch.randn(1, 3, 16, 16, 16))[0].square().mean()
    loss.backward()
    gradient = dict(made.network.named_parameters())[STEM].grad
    assert gradient[:, 1:].abs().max() > 0, "it learns to use the segmentation"


def _error(made):
    try:
        made.on_train_start()
    except NnsslError as error:
        return error
    return None


def test_the_control_trains_the_second_stage_too(cascade):
    made = trainer(nnUNetTrainerPretrainedScratch, cascade)
    made.on_train_start()
    assert canonical_state_dict(made.network)[STEM].shape[1] == 3
    assert made.provenance["weights"] == "random"


def test_the_first_stage_is_a_configuration_like_any_other(cascade, tmp_path):
    plan = load_plan(901, "3d_lowres")
    payload = checkpoint.build_payload(
        build_network(plan), plan, method="mae", config={}, crop_size=(8, 8, 8), data={},
        pretrained_parts={"encoder": True, "decoder_stages": [0, 1]},
    )  # fmt: skip
    checkpoint.save(tmp_path / "low.pth", payload)
    assert plan_main(["-d", "901", "-c", "3d_lowres", "--checkpoint", str(tmp_path / "low.pth"), "--name", "low"]) == 0
    made = trainer(nnUNetTrainerPretrained, cascade, "3d_lowres", "nnUNetPlans_low")
    made.on_train_start()
    assert torch.equal(canonical_state_dict(made.network)[STEM], payload["network_weights"][STEM])


def test_one_plan_serves_both_stages(cascade, pretraining):
    file = pretraining()
    command = ["-d", "901", "-c", "3d_cascade_fullres", "--checkpoint", str(file), "--name", "casc"]
    assert plan_main(command) == 0
    first = trainer(nnUNetTrainerPretrained, cascade, "3d_lowres", "nnUNetPlans_casc")
    with pytest.raises(NnsslError, match=r"No finished pretraining fits plans 'nnUNetPlans_casc' \(3d_lowres\)"):
        first.on_train_start()  # it looks for its own, and does not take the second stage's


@pytest.mark.parametrize("cls", [nnUNetTrainerPretrained, nnUNetTrainerPretrainedScratch])
def test_the_second_stage_waits_for_the_first(cls, cascade, pretraining):
    command = ["-d", "901", "-c", "3d_cascade_fullres", "--checkpoint", str(pretraining()), "--name", "casc"]
    assert plan_main(command) == 0

    def start():
        made = trainer(cls, cascade, plans="nnUNetPlans_casc")
        del made.get_dataloaders
        made.on_train_start()
        return made

    typed = f"nnUNetv2_train 901 3d_lowres FOLD -p nnUNetPlans_casc -tr {cls.__name__}"
    with pytest.raises(NnsslError, match=f"(?s)5 of the fold's 5 cases.*3d_lowres.*case_000.*and 1 more.*{typed}"):
        start()
    made = trainer(cls, cascade, plans="nnUNetPlans_casc")
    predicted = Path(made.folder_with_segs_from_previous_stage)
    predicted.mkdir(parents=True)
    for case in range(4):
        (predicted / f"case_{case:03d}.npz").touch()
    with pytest.raises(NnsslError, match=f"(?s)1 of the fold's 5 cases.*: case_004. Train.*{typed}"):
        start()


def test_pretraining_refuses_the_second_stage(cascade):
    with pytest.raises(NnsslError, match="second stage of a cascade.*3d_lowres' or 3d_fullres"):
        load_plan(901, "3d_cascade_fullres")


# ---- a second stage as a source ----------------------------------------------------------------------------------


@pytest.fixture
def second(cascade, tmp_path):
    """A file of nnU-Net's, trained as the second stage of a cascade, and its plan."""
    plan = load_plan(901, "3d_cascade_fullres", second_stage=True)
    network = build_network(plan)
    init = {"plans": plan.plans, "configuration": plan.configuration, "fold": 0, "dataset_json": plan.dataset_json}
    content = {"network_weights": network.state_dict(), "init_args": init, "trainer_name": "nnUNetTrainer"}
    content |= {"_best_ema": np.float32(0.3), "current_epoch": np.int64(8000)}
    torch.save(content, tmp_path / "second.pth")
    return tmp_path / "second.pth", network


def test_a_second_stage_as_a_source_is_recognised(second, tmp_path):
    file, network = second
    assert "second stage of a cascade" in describe(file)["kind"]
    plan = load_plan(901)
    for how in (None, "repeat"):
        with pytest.raises(NnsslError, match="second stage of a cascade: 1 of its 3 input channels.*channels=first"):
            apply(build_network(plan), file, plan, adapt=Adaptation(channels=how))
    target = build_network(plan)
    report = apply(target, file, plan, adapt=Adaptation(channels="first"))
    assert torch.equal(canonical_state_dict(target)[STEM], canonical_state_dict(network)[STEM][:, :1])
    assert "the image's 1 of 3 input channels taken" in str(report) and report.part("encoder").percent == 100
    with pytest.raises(NnsslError, match="second stage of a cascade.*channels=first"):
        convert(file, tmp_path / "x.pth", "nnssl")


def test_from_a_second_stage_to_a_network_of_more_channels_no_segmentation_becomes_an_image(
    second, tiny_plans, tiny_dataset_json
):
    file, network = second
    plan = Plan.from_dicts(
        tiny_plans(channels=2, features=(4, 8, 8), patch=(16, 16, 16)), "3d_fullres", tiny_dataset_json(2)
    )
    target = build_network(plan)
    apply(target, file, plan, adapt=Adaptation(channels="first"))
    stem = canonical_state_dict(target)[STEM]
    assert torch.equal(stem[:, :1], canonical_state_dict(network)[STEM][:, :1]) and not stem[:, 1:].any()


# ---- refusals in one message -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("configuration", "name", "told"),
    [
        ("3d_fullres", "nnUNetTrainerPretrained", "nnssl_pretrain -d 901"),
        ("3d_cascade_fullres", "nnUNetTrainerPretrained", "nnssl_pretrain -d 901"),
        ("3d_cascade_fullres", "nnUNetTrainerPretrainedScratch", "nnUNetv2_train 901 3d_lowres FOLD -p nnUNetPlans"),
    ],
)
def test_a_refusal_inside_nnunets_command_is_one_message(configuration, name, told, cascade, nnunet_env):
    root = Path(__file__).parents[2]
    environment = {
        **os.environ, "PYTHONPATH": str(root), "nnUNet_extTrainer": str(root / "trainers" / "extension"), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    code = "from nnunetv2.run.run_training import run_training_entry; run_training_entry()"
    command = [
        sys.executable,
        "-c",
        code,
        "901",
        configuration,
        "0",
        "-tr",
        name,
        "-device",
        "cpu",
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 1, done.stdout
    assert "Traceback" not in done.stderr and "File " not in done.stderr
    assert "Error: " in done.stderr and told in done.stderr
