"""A tiny dataset to fine-tune on, pretrainings for it, and trainers as ``nnUNetv2_train`` builds them."""

import json

import pytest
import torch

from nnssl import checkpoint
from nnssl.networks import build_network
from nnssl.plans import load_plan
from nnssl.results import output_folder
from nnssl.trainers import nnUNetTrainerMeanTeacher, nnUNetTrainerPretrained
from nnssl.weights import write_variant

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

    def make(name=None, finished=True, plans="nnUNetPlans", decoder_stages=(0, 1), seed=7, method="macl"):
        plan = load_plan(901, plans_name=plans)
        folder = output_folder(plan, method.capitalize(), [901], name)
        folder.mkdir(parents=True)
        torch.manual_seed(seed)
        network = build_network(plan)
        payload = checkpoint.build_payload(
            network,
            plan,
            method=method,
            config={},
            crop_size=plan.patch_size,
            pretrained_parts={"encoder": True, "decoder_stages": list(decoder_stages)},
            data={},
        )
        file = folder / ("checkpoint_final.pth" if finished else "checkpoint_latest.pth")
        checkpoint.save(file, payload)
        described = {"method": method, "sources": ["Dataset901_Tiny"], "architecture_hash": plan.architecture_hash}
        described |= {"base_plans": plan.base_plans, "plans_name": plan.plans_name, "configuration": plan.configuration}
        (folder / "config.json").write_text(json.dumps(described))
        return file

    return make


@pytest.fixture
def build(dataset):
    """``build(cls=nnUNetTrainerPretrained, plans="nnUNetPlans", resume=False, folder=dataset)``: before anything is loaded."""

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


@pytest.fixture
def few(dataset):
    """``few(name="few", labels=1, **told)``: a few-label variant; returns the plans' name."""

    def make(name="few", labels=1, **told):
        write_variant(load_plan(901), name, labels=labels, **told)
        return f"nnUNetPlans_{name}"

    return make


@pytest.fixture
def started(build):
    """``started(plans, cls=nnUNetTrainerMeanTeacher)``: a trainer with its loaders, before the first epoch."""

    def make(plans, cls=nnUNetTrainerMeanTeacher):
        trainer = build(cls, plans)
        trainer.on_train_start()
        return trainer

    return make


@pytest.fixture
def transforms_of():
    """``transforms_of(trainer)``: its augmentation as nnU-Net asks for it."""

    def make(trainer):
        rotation, dummy, _, mirror = trainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        manager, config = trainer.label_manager, trainer.configuration_manager
        return trainer.get_training_transforms(
            config.patch_size, rotation, trainer._get_deep_supervision_scales(), mirror, dummy,
            use_mask_for_norm=config.use_mask_for_norm, foreground_labels=manager.foreground_labels,
            regions=manager.foreground_regions if manager.has_regions else None, ignore_label=manager.ignore_label,
        )  # fmt: skip

    return make


@pytest.fixture
def one_rank(tmp_path):
    """A process group of one."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()
