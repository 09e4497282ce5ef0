"""Fine-tuning keeps the heads of a pretraining that has learnt the same label set, and starts new ones for another."""

import json
from pathlib import Path

import pytest
import torch

from nnssl import checkpoint
from nnssl.errors import NnsslError
from nnssl.networks import canonical_state_dict
from nnssl.plans import load_plan
from nnssl.trainers import (
    nnUNetTrainerPretrained,
    nnUNetTrainerPretrainedFreezeUnfreeze,
    nnUNetTrainerPretrainedScratch,
)
from nnssl.trainers.mean_teacher import nnUNetTrainerPretrainedMeanTeacher
from nnssl.weights import label_set, write_variant


@pytest.mark.parametrize("cls", [nnUNetTrainerPretrained, nnUNetTrainerPretrainedMeanTeacher])
@pytest.mark.parametrize("same", [True, False])
def test_heads_of_the_same_label_set_are_kept_and_told(pretraining, build, start, cls, same):
    file = pretraining()
    content = torch.load(file, weights_only=True)
    heads = label_set(load_plan(901).dataset_json)
    content["nnssl"]["heads"] = heads if same else heads | {"labels": heads["labels"] | {"more": 3}}
    checkpoint.save(file, content)
    plans = "nnUNetPlans"
    if cls is nnUNetTrainerPretrainedMeanTeacher:
        write_variant(load_plan(901), "few", labels=1)
        plans = "nnUNetPlans_few"
    trainer = start(build(cls, plans))
    report = json.loads(Path(trainer.output_folder, "transfer_report.json").read_text())["report"]
    given, found = content["network_weights"], canonical_state_dict(trainer.network)
    names = [n for n in found if ".seg_layers." in n and n.endswith("weight")]
    assert names and all(torch.equal(found[n], given[n]) is same for n in names)
    assert report["parts"]["seg_layers"]["percent"] == (100 if same else 0)
    said = [n for n in report["notes"] if "heads" in n]
    assert len(said) == 1 and said[0].startswith("heads kept" if same else "new heads: those of the checkpoint")
    assert said[0] in Path(trainer.log_file).read_text()


def test_kept_heads_are_no_backbone_that_freezes(pretraining, build, start):
    file = pretraining()
    content = torch.load(file, weights_only=True)
    content["nnssl"]["heads"] = label_set(load_plan(901).dataset_json)
    checkpoint.save(file, content)
    trainer = start(build(nnUNetTrainerPretrainedFreezeUnfreeze))
    assert "seg_layers" not in trainer.lr_scheduler.rates.backbone and trainer.lr_scheduler.rates.backbone


def _zero_epochs(decoder_stages, heads, pretraining):
    """A variant without epochs, and the pretraining that it starts from."""
    file = pretraining(decoder_stages=decoder_stages)
    content = torch.load(file, weights_only=True)
    if heads:
        content["nnssl"]["heads"] = label_set(load_plan(901).dataset_json)
        checkpoint.save(file, content)
    write_variant(load_plan(901), "asis", epochs=0, checkpoint=str(file))
    return content


def test_zero_epochs_make_a_model_of_the_weights_as_they_are(pretraining, build):
    """What a pretraining with labels has learnt is evaluated by itself: nnU-Net's own loop, no step."""
    given = _zero_epochs((0, 1), True, pretraining)["network_weights"]
    trainer = build(plans="nnUNetPlans_asis")
    trainer.get_dataloaders = lambda: (None, None)
    trainer.run_training()
    found = torch.load(Path(trainer.output_folder, "checkpoint_final.pth"), weights_only=True)
    assert found["network_weights"].keys() == given.keys()
    assert all(torch.equal(found["network_weights"][n], given[n]) for n in given)
    assert found["trainer_name"] == "nnUNetTrainer" and found["current_epoch"] == 0


@pytest.mark.parametrize(
    ("decoder_stages", "heads", "left"), [((0, 1), False, "seg_layers"), ((0,), True, "decoder stage 1")]
)
def test_zero_epochs_are_refused_where_something_would_stay_random(
    pretraining, build, start, decoder_stages, heads, left
):
    _zero_epochs(decoder_stages, heads, pretraining)
    with pytest.raises(NnsslError, match=f"0 epochs.*leaves random: .*{left}"):
        start(build(plans="nnUNetPlans_asis"))
    with pytest.raises(NnsslError, match=r"0 epochs.*random weights"):
        start(build(nnUNetTrainerPretrainedScratch, plans="nnUNetPlans_asis"))


def test_zero_epochs_are_refused_where_given_weights_leave_heads_random(pretraining, build, start):
    """nnU-Net's own ``-pretrained_weights`` never fills the heads."""
    from nnunetv2.run.run_training import maybe_load_checkpoint

    given = pretraining(name="other")
    _zero_epochs((0, 1), True, pretraining)
    trainer = build(plans="nnUNetPlans_asis")
    maybe_load_checkpoint(trainer, False, False, str(given))
    with pytest.raises(NnsslError, match=r"0 epochs.*-pretrained_weights has left \d+ tensors random"):
        start(trainer)


def test_zero_epochs_are_for_the_default_schedule_alone(dataset):
    with pytest.raises(
        NnsslError, match=r"0 epochs keep the weights as they are: for the schedule 'warmup-poly' alone"
    ):
        write_variant(load_plan(901), "asis", epochs=0, schedule="mean_teacher")
    with pytest.raises(NnsslError, match=r"--epochs -1: at least 0"):
        write_variant(load_plan(901), "asis", epochs=-1)
