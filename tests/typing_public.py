"""Public calls as users write them, for mypy and pyright; nothing here is run. ``test_types.py`` holds what they must refuse."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from nnssl import checkpoint, networks, plans, transfer
from nnssl.pretrain import RunResult, preprocess, run
from nnssl.pretrain.methods import Batch, CropRequest, Crops, Method, get_method, list_methods, option
from nnssl.trainers import nnUNetTrainerPretrained
from nnssl.weights import Checkpoint, TransferReport, write_variant


def pretrain_and_transfer() -> TransferReport:
    result: RunResult = run(500, method="macl", target=501, device="cpu", epochs=1, iterations=2, options={"lr": 1e-3})
    weights: Path | None = result.checkpoint
    assert weights is not None
    plan: plans.Plan = plans.load_plan(501)
    network: nn.Module = networks.build_network(plan)
    loaded: Checkpoint = checkpoint.load(weights)
    return transfer.apply(network, loaded)


def prepare() -> int:
    return preprocess([500, 501], part="1/2", processes=4).cases


def variant(plan: plans.Plan) -> Path:
    return write_variant(plan, "few", checkpoint="weights.pth", labels="25%", epochs=100)


def methods() -> list[type[Method]]:
    return [get_method("mae"), *list_methods().values()]


def trainer(plan: dict, dataset: dict) -> nnUNetTrainerPretrained:
    return nnUNetTrainerPretrained(plan, "3d_fullres", 0, dataset, torch.device("cpu"))


class Objective(Method):
    lr: float = option(1e-3, "learning rate", low=0)

    @classmethod
    def crops(cls, plan, stats, config, size=None) -> CropRequest:  # type: ignore[no-untyped-def]
        return CropRequest(size=(16, 16, 16), read_size=(16, 16, 16))

    def views(self, crops: Crops, rng: object) -> Batch:
        return {"image": crops.data}

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        return {"total": batch["image"].mean()}

    def pretrained_parts(self) -> dict[str, object]:
        return {"encoder": True, "decoder_stages": []}
