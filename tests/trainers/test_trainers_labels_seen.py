"""A pretraining that has learnt from the labels of a fold's validation cases is told of."""

import json
from pathlib import Path

import pytest
import torch

from nnssl import checkpoint
from nnssl.trainers import nnUNetTrainerPretrained


@pytest.mark.parametrize(
    ("learnt", "dataset_name", "count"), [("val", None, 1), ("train", None, 0), ("val", "Dataset902_B", 0)]
)
def test_trainer_warns_where_it_validates_on_labels_that_were_learnt(
    dataset, pretraining, build, start, learnt, dataset_name, count
):
    file = pretraining()
    content = torch.load(file, weights_only=True)
    cases = json.loads((dataset / "splits_final.json").read_text())[0][learnt]
    content["nnssl"]["omni"] = {
        "labelled": dataset_name or dataset.name,
        "case_hashes": [checkpoint.case_hash(c) for c in cases],
    }
    checkpoint.save(file, content)
    trainer = start(build())
    folder = Path(trainer.output_folder)
    assert json.loads((folder / "transfer_report.json").read_text())["labels_seen"] == count
    log = Path(trainer.log_file).read_text()
    assert ("has learnt from the labels of 1 of this fold's validation cases, first case_000" in log) is (count == 1)
    assert ("-o omni.fold=0" in log) is (count == 1)


def test_a_training_on_all_cases_validates_on_what_it_learns_itself(dataset, pretraining, start):
    """Fold ``all``: nnU-Net validates on the training cases, so that labels of the pretraining are nothing to warn of."""
    file = pretraining()
    content = torch.load(file, weights_only=True)
    cases = [
        checkpoint.case_hash(c)
        for split in json.loads((dataset / "splits_final.json").read_text())
        for c in split["val"]
    ]
    content["nnssl"]["omni"] = {"labelled": dataset.name, "case_hashes": cases}
    checkpoint.save(file, content)
    plans = json.loads((dataset / "nnUNetPlans.json").read_text()) | {"continue_training": False}
    info = json.loads((dataset / "dataset.json").read_text())
    trainer = start(nnUNetTrainerPretrained(plans, "3d_fullres", "all", info, torch.device("cpu")))
    folder = Path(trainer.output_folder)
    assert folder.name == "fold_all" and json.loads((folder / "transfer_report.json").read_text())["labels_seen"] == 0
    assert "has learnt from the labels" not in Path(trainer.log_file).read_text()
