"""Any objective with segmentation beside it: the omni-supervised framework of VoCo as a layer over a :class:`Method`.

Wu, Zhuang, Chen 2024, "Large-Scale 3D Medical Image Pre-training with Geometric Context Priors", arXiv:2410.09890. Stage 1: the
method's own loss on unlabelled crops plus nnU-Net's loss on labelled patches, in one optimiser step. Stage 2: besides, nnU-Net's
loss on unlabelled patches against pseudo-labels.

Differs from the released code, and why: docs/methods/omni.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nnssl.ema import EMA
from nnssl.networks import encoder_module, unwrap
from nnssl.plans import Plan
from nnssl.pretrain.augment import StepRNG
from nnssl.pretrain.augment.nnunet import (
    TrainingAugmentation,
    augment_intensity,
    augment_strongly,
    draw_grid,
    middle_label,
    move_label,
)
from nnssl.pretrain.augment.spatial import central_crop, warp
from nnssl.pretrain.methods.base import Method, whole_network
from nnssl.pretrain.omni.auxiliary import OmniCrops
from nnssl.pretrain.omni.config import OmniConfig
from nnssl.pretrain.omni.loss import SegmentationLoss, deep_weights, ignore_value, segment
from nnssl.pretrain.omni.patches import Patches
from nnssl.pretrain.omni.pictures import PSEUDO, dice_tags, omni_columns
from nnssl.pretrain.types import Batch, CropRequest, Curve, Picture, Progress
from nnssl.teacher.averaging import averaging_momentum
from nnssl.teacher.components import Class
from nnssl.teacher.pseudo_labels import confidence, labels_of, pseudo_label
from nnssl.teacher.stages import Stages


def running_momentum(step: int, most: float) -> float:
    """Momentum of ``teacher=running`` after ``step`` steps of the run: ``min(most, (1 + t) / (10 + t))``."""
    return min(most, (1 + step) / (10 + step))


class OmniMixin(Method):
    """Stands before a method in the bases of the class that :func:`make_omni` makes; all of its own state is named ``omni_*``.

    Attributes:
        omni: the options.
        omni_base: the method itself.
        omni_varied: whether labelled cases differ in what is annotated.
        omni_largest: classes of which pseudo-labels keep the largest component.
        omni_loss, omni_semi_loss: on labels and on pseudo-labels, whose doubtful voxels are ignored.
        omni_teacher: the moving average, or the snapshot; a copy of the network from the switch on (``running``: from the start).
        omni_begun: whether there is a teacher.
        omni_followed: optimiser steps that it has followed.
    """

    omni: ClassVar[OmniConfig]
    omni_base: ClassVar[type[Method]]
    omni_varied: ClassVar[bool] = False
    omni_largest: ClassVar[Sequence[Class]] = ()
    default_transfer: ClassVar[str] = "all"
    transfer_reason: ClassVar[str] = ""

    def __init__(self, network: nn.Module, plan: Plan, request: CropRequest, config: Any) -> None:
        super().__init__(network, plan, request, config)
        manager = plan.manager.get_label_manager(plan.dataset_json)
        self.omni_ignore = ignore_value(plan)
        self.omni_augmentation = TrainingAugmentation.of(plan, self.omni.patch or plan.patch_size, self.omni.mirror)
        self.omni_loss = SegmentationLoss(plan, manager.ignore_label, varied=self.omni_varied)
        self.omni_semi_loss = SegmentationLoss(plan, self.omni_ignore)
        self.omni_order = [int(c) for c in manager.regions_class_order] if manager.has_regions else None
        self.omni_teacher = EMA(network)
        self.omni_begun, self.omni_followed = self.omni.teacher == "running", 0
        inner: Any = unwrap(network).requires_grad_(True)
        heads = inner.decoder.seg_layers
        for head, weight in zip(reversed(heads), deep_weights(len(heads))):
            head.requires_grad_(weight > 0)  # nnU-Net gives the lowest output no weight: its head would get no gradient

    # ---- batches -------------------------------------------------------------------------------------------------

    def views(self, crops: Any, rng: StepRNG) -> Batch:
        """The method's own batch, and patches as the network is to see them.

        Returns:
            ``ssl``: the method's batch; ``labelled`` (``data``, ``targets``, ``annotated``) and, in the second stage, ``semi``
            (``data``, ``clean``, and how the view lies in the window) where there are such patches.
        """
        found: OmniCrops = crops
        batch: Batch = {"ssl": self.omni_base.views(self, found.ssl, rng)}
        if found.labelled is not None:
            batch["labelled"] = self._labelled(found.labelled, rng)
        if found.unlabelled is not None:
            self._begin_teacher()
            batch["semi"] = self._semi(found.unlabelled, rng)
        return batch

    def images(self, crops: Any) -> Tensor:
        """Those of the method's own crops."""
        found: OmniCrops = crops
        return super().images(found.ssl)

    def _labelled(self, patches: Patches, rng: StepRNG) -> Batch:
        how = self.omni_augmentation
        if patches.label is None:
            raise ValueError("labelled patches without labels")
        if patches.augment:
            own = rng.fork(patches.total, patches.first, len(patches))
            grid = draw_grid(own, how, patches.data.shape[2:])
            data = self._changed(warp(patches.data, grid), own, 1.0)
            label = move_label(patches.label, grid, outside=0)
        else:
            data, label = _middle(patches.data, how.size), middle_label(patches.label, how.size, outside=0)
        return {"data": data, "label": label, "targets": self.omni_loss.targets(label), "annotated": patches.annotated}

    def _semi(self, patches: Patches, rng: StepRNG) -> Batch:
        how = self.omni_augmentation
        clean = _middle(patches.data, how.size)
        batch: Batch = {
            "data": clean,
            "moved": clean,
            "clean": clean,
            "grid": None,
            "window": tuple(patches.data.shape[2:]),
        }
        if patches.augment:
            own = rng.fork(patches.total, patches.first, len(patches))
            batch["grid"] = draw_grid(own, how, patches.data.shape[2:])
            batch["moved"] = warp(patches.data, batch["grid"])
            batch["data"] = self._changed(batch["moved"], own, self.omni.strength)
        return batch

    def _changed(self, x: Tensor, rng: StepRNG, strength: float) -> Tensor:
        """Patches with other intensities."""
        masked = self.omni_augmentation.masked
        if self.omni.intensities == "strong":
            return augment_strongly(x, rng, masked, strength)
        return augment_intensity(x, rng, masked)

    # ---- the teacher ---------------------------------------------------------------------------------------------

    def omni_network(self) -> nn.Module:
        """The network that would make pseudo-labels now: the teacher, or before there is one the student."""
        return self.omni_teacher.module if self.omni_begun else self.network

    def _begin_teacher(self) -> None:
        """At the switch the teacher is a copy of the network."""
        if not self.omni_begun:
            self.omni_teacher.update(self.network, 0.0)
            self.omni_begun = True

    def after_step(self, progress: Progress) -> None:
        """The method's own, and the moving average."""
        super().after_step(progress)
        if not self.omni_begun or self.omni.teacher == "snapshot":
            return
        running, most = self.omni.teacher == "running", self.omni.momentum
        momentum = running_momentum(progress.step, most) if running else averaging_momentum(self.omni_followed, most)
        self.omni_teacher.update(self.network, momentum)
        self.omni_followed += 1

    def get_extra_state(self) -> Tensor:
        """``[begun, followed]`` of the teacher: plain numbers in a run, so that no step waits for the device."""
        return torch.tensor([int(self.omni_begun), self.omni_followed])

    def set_extra_state(self, state: Tensor) -> None:
        """Take back :meth:`get_extra_state`."""
        begun, followed = state.tolist()
        self.omni_begun, self.omni_followed = bool(begun), int(followed)

    @torch.no_grad()
    def omni_logits(self, x: Tensor, network: nn.Module | None = None) -> Tensor:
        """What the teacher (or another network) makes of clean patches: logits ``(B, K, *size)`` float32."""
        network = self.omni_network() if network is None else network
        return segment(network, encoder_module(network)(x), deep=False)[0].float()

    def omni_labels(self, logits: Tensor) -> Tensor:
        """Logits -> label map ``(B, 1, *size)`` int64, as nnU-Net writes it."""
        return labels_of(logits, self.omni_order)

    def omni_confidence(self, logits: Tensor) -> Tensor:
        """Logits -> probability of the label that :meth:`omni_labels` gives, ``(B, 1, *size)``."""
        return confidence(logits, regions=self.omni_order is not None)

    # ---- losses --------------------------------------------------------------------------------------------------

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """The method's own loss, plus segmentation.

        Returns:
            ``total = ssl_weight ssl + seg_weight seg + semi_weight semi``; ``ssl``, the method's own total, and its terms;
            ``seg`` and ``semi``, nnU-Net's loss, with their ``_dice`` and ``_ce``; ``confident``, the share of voxels that
            pseudo-labels teach, and ``foreground``, that of their classes; ``stage``, 1 or 2.
        """
        own = self.omni_base.loss(self, batch["ssl"])
        total = self.omni.ssl_weight * own["total"]
        terms = {"ssl": own["total"].detach()}
        zero = torch.zeros((), device=total.device)
        if "labelled" in batch:
            part = batch["labelled"]
            outputs = segment(self.network, encoder_module(self.network)(part["data"]))
            dice, ce = self.omni_loss(outputs, part["targets"], part["annotated"])
            total = total + self.omni.seg_weight * (dice + ce)
            terms.update(seg=(dice + ce).detach(), seg_dice=dice.detach(), seg_ce=ce.detach())
        if "semi" in batch:
            dice, ce, shares = self._semi_loss(batch["semi"])
            total = total + self.omni.semi_weight * (dice + ce)
            terms.update(semi=(dice + ce).detach(), semi_dice=dice.detach(), semi_ce=ce.detach(), **shares)
        elif self.training:
            terms.update(dict.fromkeys(("semi", "semi_dice", "semi_ce", "confident", "foreground"), zero))
        if self.training:
            terms["stage"] = zero + (2.0 if "semi" in batch else 1.0)
        return {"total": total, **terms, **{k: v for k, v in own.items() if k != "total"}}

    def _semi_loss(self, part: Batch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Dice, cross-entropy, and the shares of voxels that count and that show a class."""
        target = self._pseudo(part)
        with torch.set_grad_enabled(self.omni.semi_through_encoder and torch.is_grad_enabled()):
            skips = encoder_module(self.network)(part["data"])
        dice, ce = self.omni_semi_loss(segment(self.network, skips), self.omni_semi_loss.targets(target))
        known = target != self.omni_ignore
        return dice, ce, {"confident": known.float().mean(), "foreground": (known & (target > 0)).float().mean()}

    @torch.no_grad()
    def _pseudo(self, part: Batch) -> Tensor:
        """Pseudo-labels where the student's view shows them: ``(B, 1, *size)`` int64."""
        shown = {"augmented": "data"}.get(self.omni.pseudo_from, self.omni.pseudo_from)
        logits = self.omni_logits(part[shown], self.omni_teacher.module)
        made = pseudo_label(logits, self.omni.threshold, self.omni_ignore, self.omni_order, self.omni_largest)
        if shown != "clean" or part["grid"] is None:
            return made
        margin = [(w - s) // 2 for w, s in zip(part["window"], made.shape[2:])]
        rest = [w - s - m for w, s, m in zip(part["window"], made.shape[2:], margin)]
        pad = [n for pair in reversed(list(zip(margin, rest))) for n in pair]
        return move_label(F.pad(made, pad, value=-1), part["grid"], outside=self.omni_ignore)

    # ---- what the engine asks ------------------------------------------------------------------------------------

    def lr_factor(self, step: int, steps: int) -> float:
        """A rise and a fall in each stage, of the method's peak rate; or the method's own over both."""
        if self.omni.schedule == "method":
            return super().lr_factor(step, steps)
        return Stages.split(steps, self.omni.switch).factor(step, self.omni.warmup)

    def restarts(self, step: int, steps: int) -> bool:
        """At the switch, with a schedule for each stage."""
        return self.omni.schedule == "stages" and Stages.split(steps, self.omni.switch).begins_second(step)

    def pretrained_parts(self) -> dict[str, Any]:
        """The encoder and all decoder stages."""
        return whole_network(self.plan)

    def optimiser(self) -> torch.optim.Optimizer:
        """The method's own, over what it trains and the rest of the network."""
        optimiser = super().optimiser()
        known = {id(p) for group in optimiser.param_groups for p in group["params"]}
        rest = [p for p in self.parameters() if p.requires_grad and id(p) not in known]
        if rest:
            optimiser.add_param_group({"params": rest})
        return optimiser

    def embed(self, batch: Batch) -> Tensor | None:
        """The method's own."""
        return super().embed(batch["ssl"])

    def pictures(self, batch: Batch) -> Picture | None:
        """The method's own columns, then held-out patches with their labels and what the teacher makes of them."""
        own = super().pictures(batch["ssl"]) or Picture({})
        if "labelled" not in batch:
            return own if own.columns else None
        part = batch["labelled"]
        made = self.omni_labels(self.omni_logits(part["data"]))
        columns = own.columns | omni_columns(part["data"], part["label"], made)
        note = f"{own.note} The network's labels, one colour for each, should become those of the expert."
        tags = own.tags | {PSEUDO: dice_tags(part["label"], made)}
        return replace(own, columns=columns, note=note.strip(), tags=tags)

    def curves(self) -> list[Curve]:
        """The segmentation of held-out labelled cases and the pseudo-labels, then the method's own."""
        own = super().curves()[0]
        own = replace(own, lines={"ssl" if k == "total" else k: v for k, v in own.lines.items()})
        unit = "nnU-Net's loss, Dice + cross-entropy\n(-1: perfect)"
        labels = Curve("How well are labelled cases segmented?", unit, {"seg": ""}, hint="lower is better")
        unit = "nnU-Net's loss against labels\nthat the network has made itself"
        pseudo = Curve("Are its own labels learnt? (second stage)", unit, {"semi": ""}, hint="lower is better")
        return [own, labels, pseudo]

    def verdict(self, first: dict[str, float], last: dict[str, float]) -> tuple[bool, str]:
        """The method's own, on its own loss."""
        own = [{**terms, "total": terms["ssl"]} if "ssl" in terms else terms for terms in (first, last)]
        return super().verdict(*own)


def _middle(x: Tensor, size: Sequence[int]) -> Tensor:
    return central_crop(x, size).contiguous()


def make_omni(
    base: type[Method], config: OmniConfig, varied: bool = False, largest: Sequence[Class] = ()
) -> type[Method]:
    """A method that learns from labels and pseudo-labels beside ``base``, whose options stay its own. It is not registered.

    Args:
        varied: whether labelled cases differ in what is annotated.
        largest: classes of which pseudo-labels keep the largest component.
    """
    own = {
        "name": f"{base.name}Omni",
        "omni": config,
        "omni_base": base,
        "omni_varied": varied,
        "__doc__": base.__doc__,
    }
    own["omni_largest"] = tuple(largest)
    return type(f"Omni{base.__name__}", (OmniMixin, base), own)


def omni_of(method: Method) -> OmniMixin:
    """The method of a run with ``--labelled``, which :func:`make_omni` has made."""
    if not isinstance(method, OmniMixin):
        raise TypeError(f"{method.name} has no labelled stages")
    return method
