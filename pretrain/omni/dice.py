"""Dice of label maps by class or region."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from nnssl.distributed import is_distributed
from nnssl.plans import Plan
from nnssl.pretrain.omni.cases import head_names
from nnssl.pretrain.omni.loss import to_regions


class Counts:
    """True positives, false positives and false negatives by class, over patches and ranks."""

    def __init__(self, names: list[str], device: torch.device) -> None:
        self.names = names
        self.values = torch.zeros(len(names) + 1, 3, dtype=torch.float64, device=device)

    def add(self, made: Tensor, label: Tensor, counted: Tensor) -> None:
        """Count voxels of masks ``(B, R, *size)`` bool where ``counted``, ``(B, R or 1, *size)`` bool."""
        axes = [0, *range(2, made.ndim)]
        for i, x in enumerate((made & label, made & ~label, ~made & label)):
            self.values[:-1, i] += (x & counted).sum(axes).double()

    def add_share(self, part: Tensor, whole: int) -> None:
        """Count voxels of any kind against a whole, kept apart from the classes."""
        self.values[-1, 0] += part.double()
        self.values[-1, 1] += whole

    def reduce(self) -> None:
        """Sum over ranks, which all must call it."""
        if is_distributed():
            dist.all_reduce(self.values)

    def dice(self) -> dict[str, float]:
        """Dice by class; a class that is nowhere, in labels or pseudo-labels, is left out."""
        values = self.values[:-1].tolist()
        return {n: 2 * tp / (2 * tp + fp + fn) for n, (tp, fp, fn) in zip(self.names, values) if tp + fp + fn > 0}

    def share(self) -> float:
        """Of :meth:`add_share`."""
        return float(self.values[-1, 0] / self.values[-1, 1].clamp_min(1))


def class_masks(plan: Plan, label: Tensor) -> Tensor:
    """``(B, 1, *size)`` labels -> ``(B, R, *size)`` bool: foreground classes, or regions."""
    manager = plan.manager.get_label_manager(plan.dataset_json)
    return to_regions(label, manager.foreground_regions if manager.has_regions else [*head_names(plan).values()], None)


def mean_dice(values: dict[str, float]) -> float:
    """Mean over classes; 0 without any."""
    return sum(values.values()) / max(1, len(values))
