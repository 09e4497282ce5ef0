"""nnU-Net's own segmentation loss on the outputs of all decoder stages, for whole and for partial labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from nnunetv2.training.loss.compound_losses import DC_and_BCE_loss, DC_and_CE_loss
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from torch import Tensor, nn

from nnssl.distributed import is_distributed, world_size
from nnssl.networks import partial_decode, unwrap
from nnssl.plans import Plan

Annotated = Sequence["tuple[int, ...] | None"]


def segment(network: nn.Module, skips: Sequence[Tensor], deep: bool = True) -> list[Tensor]:
    """Logits ``(B, K, *size_s)`` of the segmentation heads, highest resolution first, as nnU-Net's decoder gives them.

    Without ``deep`` those of the last decoder stage only.
    """
    decoder: Any = unwrap(network).decoder
    outputs = list(zip(decoder.seg_layers, partial_decode(network, skips)))
    return [head(x) for head, x in (reversed(outputs) if deep else outputs[-1:])]


def deep_weights(n: int) -> list[float]:
    """nnU-Net's weights of ``n`` outputs, highest resolution first: halves, none for the lowest, 1 in sum."""
    weights = np.array([1 / 2**i for i in range(n)])
    if n > 1:
        weights[-1] = 0
    return [float(w) for w in weights / weights.sum()]


def ignore_value(plan: Plan) -> int:
    """The dataset's ignore label, or the value that nnU-Net would have it take: one above all labels."""
    manager = plan.manager.get_label_manager(plan.dataset_json)
    return int(manager.ignore_label) if manager.has_ignore_label else int(max(manager.all_labels)) + 1


def to_regions(label: Tensor, regions: Sequence[Any], ignore: int | None) -> Tensor:
    """``(B, 1, *size)`` labels -> ``(B, R, *size)`` bool, and last the ignored voxels where there is an ignore label."""
    channels = [*regions, *([] if ignore is None else [ignore])]
    parts = [torch.isin(label, torch.tensor(r if isinstance(r, (tuple, list)) else [r]).to(label)) for r in channels]
    return torch.cat(parts, 1)


def restrict_logits(logits: Tensor, heads: Sequence[int]) -> Tensor:
    """Logits ``(B, K, *size)`` of the named classes (ascending, without the background) against everything else.

    ``z_0' = log(exp z_0 + sum over classes that are not annotated of exp z_c)``: the probability of the background becomes that
    of "background or a class that nobody has annotated", so that a voxel of such a class may be called what it is (the marginal
    loss of Fang & Yan 2020 and Shi et al. 2021).
    """
    rest = [c for c in range(logits.shape[1]) if c not in heads]
    return torch.cat([logits[:, rest].logsumexp(1, keepdim=True), logits[:, list(heads)]], 1)


class _Shared(nn.Module):
    """A loss times a factor that is given with each target."""

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, output: Tensor, target: Tensor, factor: Tensor | float) -> Tensor:
        return factor * self.loss(output, target)


class SegmentationLoss(nn.Module):
    """nnU-Net's Dice and cross-entropy under deep supervision, apart from each other; their sum is nnU-Net's loss.

    Differs from nnU-Net only where it must: with voxels that are ignored the cross-entropy is a mean over the voxels of *all*
    processes, and samples in which only some classes are annotated are compared on these.

    Args:
        plan: classes or regions, batch Dice, strides.
        ignore: label of voxels that count for nothing; None: there is none.
        varied: whether samples of a batch may differ in what is annotated. Batch Dice is then that of a process.
    """

    def __init__(self, plan: Plan, ignore: int | None, varied: bool = False) -> None:
        super().__init__()
        manager = plan.manager.get_label_manager(plan.dataset_json)
        self.regions: list[Any] | None = list(manager.foreground_regions) if manager.has_regions else None
        self.ignore = ignore
        strides = np.cumprod(np.vstack(plan.config.pool_op_kernel_sizes), axis=0)
        self.scales = [list(1 / s) for s in strides][:-1]
        self.weights = deep_weights(len(self.scales))
        soft = {"batch_dice": plan.config.batch_dice, "smooth": 1e-5, "ddp": is_distributed() and not varied}

        def build(ce: float, dice: float) -> nn.Module:
            kind = {"weight_ce": ce, "weight_dice": dice, "dice_class": MemoryEfficientSoftDiceLoss}
            if self.regions is not None:
                return DC_and_BCE_loss({}, {**soft, "do_bg": True}, use_ignore_label=ignore is not None, **kind)
            return DC_and_CE_loss({**soft, "do_bg": False}, {}, ignore_label=ignore, **kind)

        self.dice = DeepSupervisionWrapper(_Shared(build(0, 1)), self.weights)
        self.ce = DeepSupervisionWrapper(_Shared(build(1, 0)), self.weights)

    def targets(self, label: Tensor) -> list[Tensor]:
        """Labels ``(B, 1, *size)`` at the resolution of each output, as nnU-Net's transforms make them.

        ``(B, 1, *size_s)`` int64 each; of regions ``(B, R, *size_s)`` bool, with the ignored voxels last where there are any.
        """
        out = []
        for scale in self.scales:
            size = [round(n * s) for n, s in zip(label.shape[2:], scale)]
            small = label if size == list(label.shape[2:]) else _nearest(label, size)
            out.append(small.long() if self.regions is None else to_regions(small, self.regions, self.ignore))
        return out

    def forward(
        self, outputs: Sequence[Tensor], targets: Sequence[Tensor], annotated: Annotated | None = None
    ) -> tuple[Tensor, Tensor]:
        """Dice (negative, as nnU-Net has it) and cross-entropy.

        Args:
            outputs: logits ``(B, K, *size_s)``, highest resolution first.
            targets: from :meth:`targets`.
            annotated: heads that are annotated in each sample (None in a sample: all); None: all in all samples.
        """
        outputs = [o.float() for o in outputs]
        dice, ce = outputs[0].new_zeros(()), outputs[0].new_zeros(())
        groups = _group(annotated, len(outputs[0]))
        valid = torch.stack(
            [torch.stack([self._valid(t[rows]) for t in targets]) for _, rows in groups]
        )  # (groups, scales)
        everywhere = valid.sum(0)
        if is_distributed() and self.ignore is not None:
            everywhere = everywhere.clone()
            dist.all_reduce(everywhere)
            everywhere = everywhere / world_size()
        for (heads, rows), here in zip(groups, valid):
            share = len(rows) / len(outputs[0])
            x, y = [o[rows] for o in outputs], [t[rows] for t in targets]
            if heads is not None:
                x, y = self._restrict(x, y, heads)
            dice = dice + self.dice(x, y, [share] * len(x))
            ce = ce + self.ce(x, y, list(here / everywhere.clamp_min(1)))
        return dice, ce

    def _valid(self, target: Tensor) -> Tensor:
        """Number of voxels that count."""
        if self.ignore is None:
            return torch.tensor(float(target[:, 0].numel()), device=target.device)
        ignored = target[:, -1] if self.regions is not None else target[:, 0] == self.ignore
        return (~ignored).sum().float()

    def _restrict(
        self, x: Sequence[Tensor], y: Sequence[Tensor], heads: tuple[int, ...]
    ) -> tuple[list[Tensor], list[Tensor]]:
        if self.regions is not None:
            kept = [*heads, *([] if self.ignore is None else [len(self.regions)])]
            return [o[:, list(heads)] for o in x], [t[:, kept] for t in y]
        size = max(x[0].shape[1], (self.ignore or 0) + 1)
        table = torch.zeros(size, dtype=torch.long, device=y[0].device)
        table[list(heads)] = torch.arange(1, len(heads) + 1, device=table.device)
        if self.ignore is not None:
            table[self.ignore] = self.ignore
        return [restrict_logits(o, heads) for o in x], [table[t] for t in y]


def _group(annotated: Annotated | None, n: int) -> list[tuple[tuple[int, ...] | None, list[int]]]:
    """Samples by what is annotated in them."""
    if annotated is None or all(a is None for a in annotated):
        return [(None, list(range(n)))]
    groups: dict[tuple[int, ...] | None, list[int]] = {}
    for i, heads in enumerate(annotated):
        groups.setdefault(heads, []).append(i)
    return list(groups.items())


def _nearest(label: Tensor, size: list[int]) -> Tensor:
    return F.interpolate(label.float(), size, mode="nearest-exact").to(label.dtype)
