"""nnU-Net's side of benchmarks/peers.py: supervised training with its own loader, transforms and trainer."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from loader import Stock

from sides.serve import timed, worker_memory


class Side:
    """See sides/serve.py."""

    def __init__(self, settings: dict[str, Any]) -> None:
        from nnssl.plans import load_plan

        self.settings, self.plan = settings, load_plan(settings["id"])
        self._loaders: dict[int, Stock] = {}
        self._trainer: Any = None

    def _loader(self, edge: int) -> Stock:
        if edge not in self._loaders:
            self._loaders[edge] = Stock(self.plan, (edge,) * 3)
        return self._loaders[edge]

    def loader(self, edge: int, crops: int) -> float:
        """See loader.py."""
        return self._loader(edge).cost(crops)

    def preprocess(self, index: int) -> float:
        """Its default preprocessor, image and label, written as it does."""
        from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor

        raw = Path(os.environ["nnUNet_raw"]) / self.settings["unequal"]
        out = Path(os.environ["nnUNet_preprocessed"]) / "one"
        out.mkdir(exist_ok=True)
        case = f"case_{index:06d}"
        files = [str(raw / "imagesTr" / f"{case}_0000.nii.gz")], str(raw / "labelsTr" / f"{case}.nii.gz")
        config = self.plan.manager.get_configuration("3d_fullres")
        preprocessor = DefaultPreprocessor(verbose=False)
        arguments = (str(out / case), *files, self.plan.manager, config, self.plan.dataset_json)
        return timed(lambda: preprocessor.run_case_save(*arguments))

    @property
    def trainer(self) -> Any:
        """A trainer of the small plan, and one of its batches."""
        if self._trainer is None:
            import torch
            from nnunetv2.run.run_training import get_trainer_from_args

            names = (str(self.settings["id"]), "3d_fullres", 0, "nnUNetTrainer", self.settings["small"])
            trainer = get_trainer_from_args(*names, device=torch.device("cpu"))
            trainer.initialize()
            trainer.dataloader_train, _ = trainer.get_dataloaders()
            self._trainer = trainer, next(trainer.dataloader_train)
            self.step()
        return self._trainer

    def step(self) -> float:
        """Its training step: no augmentation in it, which its loader has made."""
        trainer, batch = self.trainer
        return timed(lambda: trainer.train_step(batch))

    def bare(self) -> float:
        """Forward, loss and backward."""
        trainer, batch = self.trainer
        trainer.optimizer.zero_grad(set_to_none=True)
        return timed(lambda: trainer.loss(trainer.network(batch["data"]), batch["target"]).backward())

    def memory(self, edge: int, crops: int) -> float:
        """Of a process of its augmenter."""
        from batchgenerators.dataloading.nondet_multi_threaded_augmenter import NonDetMultiThreadedAugmenter

        loader = Stock(self.plan, (edge,) * 3).loader
        return worker_memory(NonDetMultiThreadedAugmenter(loader, None, 1, 2, pin_memory=False), crops, 2)


def first_step(settings: dict[str, Any], done: Callable[[], None]) -> None:
    """``nnUNetv2_train``."""
    import sys

    from nnunetv2.run.run_training import run_training_entry
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    step: Any = nnUNetTrainer.train_step

    def stepped(*args: Any, **kwargs: Any) -> Any:
        found = step(*args, **kwargs)
        done()
        return found

    nnUNetTrainer.train_step = stepped
    sys.argv = ["nnUNetv2_train", str(settings["id"]), "3d_fullres", "0", "-p", settings["small"], "-device", "cpu"]
    run_training_entry()
