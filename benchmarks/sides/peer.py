"""MIC-DKFZ's nnssl (``src/nnssl`` of its checkout) as a side of benchmarks/peers.py: its BaseMAETrainer, loader and transforms.

Its trainer builds a ResEnc-L and takes patches of 160^3; here it gets the network and the patch of the other sides.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sides.serve import timed, worker_memory

CONFIGURATION = "onemmiso"


def _modules() -> tuple[Any, Any]:
    from nnssl.training.nnsslTrainer import AbstractTrainer
    from nnssl.training.nnsslTrainer.masked_image_modeling import BaseMAETrainer

    return AbstractTrainer, BaseMAETrainer


def _adapt(settings: dict[str, Any], edge: int) -> Any:
    """Give its trainer the network and patch of the others; returns the trainer's class."""
    from dynamic_network_architectures.architectures.unet import ResidualEncoderUNet
    from torch import nn

    def network(plan: Any, name: str, channels: int, classes: int, *args: Any, **kwargs: Any) -> Any:
        features = settings["features"]
        n = len(features)
        blocks = {"n_blocks_per_stage": [1, 3, 4, 6, 6, 6][:n], "n_conv_per_stage_decoder": [1] * (n - 1)}
        found = ResidualEncoderUNet(
            channels, n, features, nn.Conv3d, 3, [1] + [2] * (n - 1), num_classes=classes, conv_bias=True,
            norm_op=nn.InstanceNorm3d, norm_op_kwargs={"eps": 1e-5, "affine": True}, nonlin=nn.LeakyReLU,
            nonlin_kwargs={"inplace": True}, **blocks,
        )  # fmt: skip
        found.key_to_encoder, found.key_to_stem = "encoder.stages", "encoder.stem"
        return found

    for module in _modules():
        module.get_network_by_name = network
    cls = _modules()[1].BaseMAETrainer
    made = cls.__init__

    def init(self: Any, plan: Any, configuration_name: Any, fold: Any, pretrain_json: Any, device: Any = None) -> None:
        made(self, plan, configuration_name, fold, pretrain_json, device)
        self.config_plan.patch_size = (edge,) * 3

    cls.__init__ = init
    return cls


class Side:
    """See sides/serve.py."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings = settings
        self.base = Path(os.environ["nnssl_preprocessed"]) / settings["dataset"]
        self._made: dict[int, Any] = {}
        self._batch: Any = None
        self._class: Any = None

    def _trainer(self, edge: int) -> Any:
        """A trainer with patches of ``edge``^3 and its loader."""
        if edge not in self._made:
            import torch
            from batchgenerators.utilities.file_and_folder_operations import load_json

            from nnssl.experiment_planning.experiment_planners.plan import Plan

            self._class = self._class or _adapt(self.settings, self.settings["edge"])
            plan = Plan.load_from_file(str(self.base / "nnsslPlans.json"))
            content = load_json(str(self.base / f"pretrain_data__{CONFIGURATION}.json"))
            trainer = self._class(plan, CONFIGURATION, "all", content, torch.device("cpu"))
            trainer.config_plan.patch_size = (edge,) * 3
            trainer.batch_size = 2
            self._made[edge] = trainer, trainer.get_dataloaders()[0]
            next(self._made[edge][1])
        return self._made[edge]

    def prepare(self) -> None:
        """Preprocess the volumes that the other rows read."""
        from nnssl.preprocessing.preprocessors.default_preprocessor import default_preprocess

        default_preprocess(self.settings["dataset"], CONFIGURATION, "nnsslPlans", 0, 1, 1, False)

    def loader(self, edge: int, crops: int) -> float:
        """Its loader and training transforms in this process."""
        loader, steps = self._trainer(edge)[1], -(-crops // 2)
        return timed(lambda: [next(loader) for _ in range(steps)]) / (2 * steps * edge**3) * 1e6

    def preprocess(self, index: int) -> float:
        """Its default preprocessor."""
        from nnssl.data.utils import get_train_collection
        from nnssl.experiment_planning.experiment_planners.plan import Plan
        from nnssl.preprocessing.preprocessors.default_preprocessor import preprocess_and_save

        plan = Plan.load_from_file(str(self.base / "nnsslPlans.json"))
        raw = Path(os.environ["nnssl_raw"]) / self.settings["unequal"]
        image = get_train_collection(str(raw)).to_independent_images()[index]
        out, ok = str(self.base / "one"), []
        seconds = timed(
            lambda: ok.append(preprocess_and_save(image, out, plan, plan.configurations[CONFIGURATION], False))
        )
        if ok != [True]:
            raise RuntimeError("its preprocessing failed; its own message stands above")
        return seconds

    def step(self) -> float:
        """Its training step."""
        trainer, batch = self._training()
        return timed(lambda: trainer.train_step(batch))

    def bare(self) -> float:
        """Forward, loss and backward."""
        trainer, batch = self._training()
        data = batch["data"]
        mask = trainer.mask_creation(trainer.batch_size, trainer.config_plan.patch_size, trainer.mask_percentage)
        for axis in (2, 3, 4):
            mask = mask.repeat_interleave(data.shape[axis] // mask.shape[axis], dim=axis)
        trainer.optimizer.zero_grad(set_to_none=True)
        return timed(lambda: trainer.loss(trainer.network(data * mask), data, mask).backward())

    def _training(self) -> tuple[Any, Any]:
        trainer, loader = self._trainer(self.settings["edge"])
        if not trainer.was_initialized:
            trainer.initialize()
            self._batch = next(loader)
            trainer.train_step(self._batch)
        return trainer, self._batch

    def memory(self, edge: int, crops: int) -> float:
        """Of a process of its augmenter."""
        from batchgenerators.dataloading.nondet_multi_threaded_augmenter import NonDetMultiThreadedAugmenter

        augmenter = self._trainer(edge)[1]
        made = NonDetMultiThreadedAugmenter(augmenter.data_loader, augmenter.transform, 1, 2, pin_memory=False)
        return worker_memory(made, crops, 2)


def describe(name: str, images: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Its ``pretrain_data.json`` of a folder of images, and plans with its default preprocessing at 1 mm."""
    subjects = {}
    for file in sorted(images.iterdir()):
        case, image = (
            file.name.removesuffix("_0000.nii.gz"),
            {"name": file.name, "image_path": str(file), "modality": "MR"},
        )
        image |= {"associated_masks": {"anonymization_mask": None, "anatomy_mask": None}}
        session = {"session_id": "1", "session_info": None, "images": [image]}
        subjects[case] = {"subject_id": case, "sessions": {"1": session}, "subject_info": None}
    number = name[7:10]
    dataset = {"dataset_index": number, "name": name, "dataset_info": None, "subjects": subjects}
    collection = {"collection_index": number, "collection_name": name, "datasets": {number: dataset}}
    resampling = {"order_z": 0, "force_separate_z": None}
    function = "resample_data_or_seg_to_shape"
    configuration = {
        "data_identifier": f"nnsslPlans_{CONFIGURATION}",
        "preprocessor_name": "DefaultPreprocessor",
        "spacing_style": CONFIGURATION,
        "normalization_schemes": ["ZScoreNormalization"],
        "use_mask_for_norm": [False],
        "resampling_fn_data": function,
        "resampling_fn_data_kwargs": {"is_seg": False, "order": 3, **resampling},
        "resampling_fn_mask": function,
        "resampling_fn_mask_kwargs": {"is_seg": True, "order": 1, **resampling},
        "spacing": [1, 1, 1],
        "patch_size": [64, 64, 64],
    }
    plans = {
        "dataset_name": name,
        "plans_name": "nnsslPlans",
        "original_median_spacing_after_transp": [1.0, 1.0, 1.0],
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "configurations": {CONFIGURATION: configuration},
        "experiment_planner_used": "ExperimentPlanner",
    }
    return collection, plans


def first_step(settings: dict[str, Any], done: Callable[[], None]) -> None:
    """``nnssl_train``."""
    import sys

    from nnssl.run.run_training import run_training_entry

    cls = _adapt(settings, settings["edge"])
    step: Any = cls.train_step

    def stepped(*args: Any, **kwargs: Any) -> Any:
        found = step(*args, **kwargs)
        done()
        return found

    cls.train_step = stepped
    sys.argv = ["nnssl_train", str(settings["id"]), CONFIGURATION, "-tr", "BaseMAETrainer", "-device", "cpu"]
    run_training_entry()
