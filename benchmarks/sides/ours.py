"""This project's side of benchmarks/peers.py: masked autoencoding with its default options."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

from loader import Ours

from sides.serve import timed, worker_memory


class Side:
    """See sides/serve.py."""

    def __init__(self, settings: dict[str, Any]) -> None:
        from nnssl.malloc import keep_freed_memory
        from nnssl.plans import load_plan

        keep_freed_memory()  # as a run on a CPU does
        self.settings = settings
        self.plan = load_plan(settings["id"])
        self._loaders: dict[tuple[int, str], Ours] = {}
        self._training: Any = None

    def _loader(self, edge: int, method: str = "mae") -> Ours:
        if (edge, method) not in self._loaders:
            self._loaders[edge, method] = Ours(self.plan, self.settings["source"], method, (edge,) * 3)
        return self._loaders[edge, method]

    def loader(self, edge: int, crops: int, method: str = "mae") -> float:
        """See loader.py."""
        return self._loader(edge, method).cost(crops)

    def about(self, edge: int, crops: int, method: str) -> dict[str, Any]:
        """The crop of an objective, the share of reading, and what the first look at a case costs."""
        ours = self._loader(edge, method)
        row = {"crop": "x".join(map(str, ours.method.request.size)), "share_reading": ours.share_of_reading(crops, 2)}
        return row | {"first_look_ms": 1e3 * ours.first_look()}

    def preprocess(self, index: int) -> float:
        """A source of one image, as ``nnssl_pretrain --preprocess-only`` does it."""
        from nnssl.pretrain.prepare import prepare_sources

        raw = Path(os.environ["nnUNet_raw"])
        name = f"Dataset{970 + index:03d}_One"
        images, source = raw / name / "imagesTr", raw / self.settings["unequal"]
        images.mkdir(parents=True)
        shutil.copy(source / "dataset.json", raw / name)
        os.link(source / "imagesTr" / f"case_{index:06d}_0000.nii.gz", images / "case_0000.nii.gz")
        return timed(lambda: prepare_sources(self.plan, [name], n_processes=1, held_out=0.0))

    @property
    def training(self) -> Any:
        """mae on the small plan, with crops that are read."""
        if self._training is None:
            import torch

            from nnssl.plans import load_plan
            from nnssl.pretrain.engine.stepping import Stepper

            edge = self.settings["edge"]
            small = load_plan(self.settings["id"], plans_name=self.settings["small"])
            ours = Ours(small, self.plan.dataset_name, "mae", (edge,) * 3)
            stepper = Stepper(ours.method, ours.method, torch.device("cpu"), 10_000, 12.0, False)
            self._training = ours, stepper, next(ours.stream)
            self.step()
        return self._training

    def step(self) -> float:
        """Views and a step of the optimiser."""
        import torch

        from nnssl.pretrain.augment import StepRNG
        from nnssl.pretrain.types import Progress

        ours, stepper, crops = self.training

        def body() -> None:
            with torch.no_grad():
                batch = ours.method.views(crops, StepRNG(0, ours.step, ours.total))
            stepper.step(batch, ours.step, crops.case, False)[0].read()
            ours.method.after_step(Progress(ours.step, 10_000, 0, 1))

        ours.step += 1
        return timed(body)

    def bare(self) -> float:
        """Forward, loss and backward."""
        import torch

        from nnssl.pretrain.augment import StepRNG

        ours, _, crops = self.training
        with torch.no_grad():
            batch = ours.method.views(crops, StepRNG(0, ours.step, ours.total))
        for p in ours.method.parameters():
            p.grad = None
        return timed(lambda: ours.method(batch)["total"].backward())

    def memory(self, edge: int, crops: int) -> float:
        """Of a loader process."""
        from nnssl.pretrain.data import SampleStream, make_loader

        ours = self._loader(edge)
        what = ours.case_set, self.plan, ours.method.request, SampleStream(0, 2), range(crops)
        return worker_memory(make_loader(*what, num_workers=1), crops, 2)


def first_step(settings: dict[str, Any], done: Callable[[], None]) -> None:
    """``nnssl_pretrain``."""
    from nnssl.pretrain import cli
    from nnssl.pretrain.engine.stepping import Stepper

    step: Any = Stepper.step

    def stepped(*args: Any, **kwargs: Any) -> Any:
        found = step(*args, **kwargs)
        done()
        return found

    crop = ",".join([str(settings["edge"])] * 3)
    command = ["-d", str(settings["id"]), "-p", settings["small"], "-m", "mae", "-device", "cpu", "--crop", crop]
    with patch.object(Stepper, "step", stepped):
        cli.main([*command, "--epochs", "1", "--iterations", "2", "-o", "batch_size=2", "workers=0"])
