"""Fine-tuning keeps the heads of a pretraining that has learnt the same label set, and starts new ones for another."""

import json
from pathlib import Path

import pytest
import torch

from nnssl import checkpoint
from nnssl.networks import canonical_state_dict
from nnssl.plans import load_plan
from nnssl.trainers import nnUNetTrainerPretrained, nnUNetTrainerPretrainedFreezeUnfreeze
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
