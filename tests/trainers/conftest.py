"""A tiny dataset to fine-tune on, pretrainings for it, and trainers as ``nnUNetv2_train`` builds them."""

import json

import pytest
import torch

from nnssl import checkpoint
from nnssl.networks import build_network
from nnssl.plans import load_plan
from nnssl.results import output_folder

FIGURES = {"epochs": 2, "iterations": 2, "val_iterations": 1}


@pytest.fixture
def dataset(tiny_preprocessed):
    """Dataset901_Tiny whose plans say 2 epochs of 2 iterations."""
    folder = tiny_preprocessed(plan_options={"features": (4, 8, 8), "patch": (16, 16, 16)})
    path = folder / "nnUNetPlans.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "nnssl": FIGURES}))
    return folder


@pytest.fixture
def pretraining(dataset):
    """``pretraining(name=None, finished=True, plans="nnUNetPlans", decoder_stages=(0, 1))``: writes one, returns its file."""

    def make(name=None, finished=True, plans="nnUNetPlans", decoder_stages=(0, 1), seed=7):
        plan = load_plan(901, plans_name=plans)
        folder = output_folder(plan, "Macl", [901], name)
        folder.mkdir(parents=True)
        torch.manual_seed(seed)
        network = build_network(plan)
        payload = checkpoint.build_payload(
            network,
            plan,
            method="macl",
            config={},
            crop_size=plan.patch_size,
            pretrained_parts={"encoder": True, "decoder_stages": list(decoder_stages)},
            data={},
        )
        file = folder / ("checkpoint_final.pth" if finished else "checkpoint_latest.pth")
        checkpoint.save(file, payload)
        described = {"method": "macl", "sources": ["Dataset901_Tiny"], "architecture_hash": plan.architecture_hash}
        described |= {"base_plans": plan.base_plans, "plans_name": plan.plans_name, "configuration": plan.configuration}
        (folder / "config.json").write_text(json.dumps(described))
        return file

    return make


@pytest.fixture
def build(dataset):
    """``build(cls=nnUNetTrainerPretrained, plans="nnUNetPlans", resume=False, folder=dataset)``: before anything is loaded."""
    from nnssl.trainers import nnUNetTrainerPretrained

    def make(cls=nnUNetTrainerPretrained, plans="nnUNetPlans", resume=False, folder=dataset):
        content = json.loads((folder / f"{plans}.json").read_text())
        content["continue_training"] = resume
        info = json.loads((folder / "dataset.json").read_text())
        return cls(content, "3d_fullres", 0, info, torch.device("cpu"))

    return make


@pytest.fixture
def start():
    """``start(trainer)``: the start of a training without its data loading; returns the trainer."""

    def make(trainer):
        trainer.get_dataloaders = lambda: (None, None)
        trainer.on_train_start()
        return trainer

    return make
