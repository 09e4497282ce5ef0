"""From ``--labelled`` to what a run needs: the method, what is read beside its crops, the watcher, and the record."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nnssl.config import config_dict
from nnssl.errors import NnsslError
from nnssl.plans import Plan, dataset_id
from nnssl.plans.labels import ALL, case_order
from nnssl.pretrain.augment.nnunet import TrainingAugmentation
from nnssl.pretrain.data import CaseSet
from nnssl.pretrain.methods.base import Method
from nnssl.pretrain.omni.auxiliary import OmniLoaders
from nnssl.pretrain.omni.cases import LabelledSet, find_labelled, head_names
from nnssl.pretrain.omni.config import OMNI_RUNTIME, OmniConfig, resolve_omni
from nnssl.pretrain.omni.method import make_omni
from nnssl.pretrain.omni.patches import Sizes, read_label
from nnssl.pretrain.omni.pseudo_metrics import PseudoMetricsHook
from nnssl.teacher.components import Class, foreground_classes, one_piece_of_cases
from nnssl.teacher.stages import Stages
from nnssl.words import size_text

log = logging.getLogger("nnssl")

_TEACHERS = {
    "ema": "moving average of the network from there on",
    "running": "moving average of the network",
    "snapshot": "network's snapshot at that step",
}
FOLDER = "Omni"
"""Stands behind the method's name in the output folder."""


@dataclass(frozen=True)
class Omni:
    """The labelled part of a run; pseudo-labels keep the largest component of the classes ``largest``."""

    plan: Plan
    config: OmniConfig
    cases: LabelledSet
    sizes: Sizes
    largest: list[Class] = field(default_factory=list)

    def method(self, base: type[Method]) -> type[Method]:
        """The class that the engine trains."""
        return make_omni(base, self.config, len({c.annotated for c in self.cases.train}) > 1, self.largest)

    def auxiliary(
        self, case_set: CaseSet, seed: int, steps: int, weights: dict[str, float] | None = None
    ) -> OmniLoaders:
        """What reads the patches of a run of that many steps; ``weights`` of the sources, as of the crops."""
        switch, augment = self.switch(steps), self.config.augment
        return OmniLoaders(self.plan, case_set, self.cases, self.sizes, seed, switch, augment, weights)

    def hook(self, auxiliary: OmniLoaders) -> PseudoMetricsHook:
        """The watcher."""
        return PseudoMetricsHook(self.config, auxiliary)

    def switch(self, steps: int) -> int:
        """First step of the second stage; ``steps`` where there is none."""
        return Stages.split(steps, self.config.switch).first

    def identity(self) -> dict[str, Any]:
        """What a continued run must have in common."""
        options = {k: v for k, v in config_dict(self.config).items() if k not in OMNI_RUNTIME}
        return {
            "labelled": self.cases.identity(),
            "options": options,
            "patch": list(self.sizes.size),
            "batch": self.sizes.labelled,
            "unlabelled": self.sizes.unlabelled,
            "largest": [list(c) if isinstance(c, tuple) else c for c in self.largest],
        }

    def _kept(self) -> str:
        """Names of the classes of which the largest component is kept."""
        manager = self.plan.manager.get_label_manager(self.plan.dataset_json)
        regions = foreground_classes(manager) if manager.has_regions else None
        named = {name: regions[head] if regions else head for name, head in head_names(self.plan).items()}
        return ", ".join(name for name, what in named.items() if what in self.largest)

    def introduce(self, steps: int) -> None:
        """Tell what is going to happen, and what the labels that are learnt from mean for an evaluation."""
        c, s, found, switch = self.config, self.sizes, self.cases, self.switch(steps)
        lines = [
            f"Labels: {len(found.train)} cases of {found.dataset} ({found.why}), {len(found.held_out)} labelled cases held out; "
            f"{s.labelled} patches of {size_text(s.size)} a step."
        ]
        if switch < steps:
            ignored = f"voxels below {c.threshold:.2f} are ignored" if c.threshold else "no voxel is ignored"
            lines += [
                f"Pseudo-labels: from step {switch} of {steps} on {s.unlabelled} patches a step, by the {_TEACHERS[c.teacher]}; "
                f"{ignored}.",
                f"Largest component kept of: {self._kept() or 'none'} (omni.largest={c.largest}).",
            ]
            if c.schedule == "stages":
                lines.append(f"Each stage has its own warm-up and decay; the optimiser starts anew at step {switch}.")
        else:
            lines.append(f"Pseudo-labels: none (-o omni.switch={c.switch:g}).")
        if c.fold == ALL or found.why.startswith("listed"):
            what = (
                "a fold that validates on one of these cases has seen its labels: evaluate on images that are in none"
            )
        else:
            what = f"only fold {c.fold} of {dataset_id(found.dataset)} can be fine-tuned and validated with it; for another "
            what += "fold K type -o omni.fold=K --name foldK"
        for line in (*lines, f"The result has learnt from the labels of these cases: {what}."):
            log.info("%s", line)


def prepare_omni(
    plan: Plan,
    given: Mapping[str, Any],
    saved: Mapping[str, Any] | None = None,
    *,
    cases: str | Path | None = None,
    ranks: int = 1,
) -> Omni:
    """Resolve options and choose the labelled cases. Reads no image, but label maps where the largest components are asked for.

    Args:
        plan: of the labelled dataset, which is the target.
        given: options without the prefix ``omni.``.
        saved: ``config.json`` of the run that is continued.
        cases: file of ``--labelled-cases``.
        ranks: number of processes.
    """
    if plan.is_primus:
        raise NnsslError(
            f"--labelled trains a U-Net with its decoder, and the network of plans '{plan.plans_name}' is a {plan.network_class}."
        )
    old = (saved or {}).get("identity", {}).get("omni", {})
    config = resolve_omni(given, old.get("options"))
    found = find_labelled(plan, fold=config.fold, annotated=config.annotated, cases=Path(cases) if cases else None)
    size = tuple(config.patch) or plan.patch_size
    stride = plan.total_stride
    if len(size) != plan.dim or any(n % t for n, t in zip(size, stride)) or all(n == t for n, t in zip(size, stride)):
        raise NnsslError(
            f"-o omni.patch={','.join(map(str, size))}: {plan.dim} multiples of {','.join(map(str, stride))} are wanted, the "
            "total stride of the network, and more than one of them on some axis."
        )
    labelled = _shared(config.batch, -(-plan.batch_size // ranks) * ranks, ranks, "omni.batch")
    unlabelled = _shared(config.unlabelled, labelled, ranks, "omni.unlabelled")
    read_size = TrainingAugmentation.of(plan, size).read_size if config.augment else size
    sizes = Sizes(size, read_size, labelled, unlabelled, config.foreground)
    return Omni(plan, config, found, sizes, _largest(plan, config, found, size))


def _largest(plan: Plan, config: OmniConfig, found: LabelledSet, patch: tuple[int, ...]) -> list[Class]:
    """The classes of which pseudo-labels keep the largest component."""
    classes = foreground_classes(plan.manager.get_label_manager(plan.dataset_json))
    if config.switch >= 1 or config.largest != "auto":
        return classes if config.largest == "always" else []
    names = case_order([c.name for c in found.train], 0)
    return one_piece_of_cases(names, lambda case: read_label(found.folder, case), classes, patch)


def _shared(asked: int | None, default: int, ranks: int, name: str) -> int:
    value = default if asked is None else asked
    if value % ranks:
        raise NnsslError(f"-o {name}={value} cannot be shared by {ranks} processes; use a multiple of {ranks}.")
    return value
