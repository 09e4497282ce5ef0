"""Measures one network: linear layers on its frozen features, fitted and scored over the folds of labelled cases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

from nnssl.plans import Plan
from nnssl.probe.cases import Case, Classes, Fold
from nnssl.probe.features import Extractor, Stages, collect, stages_of
from nnssl.probe.linear import fit

ROWS = 100_000
"""Voxels that a linear layer is fitted on, at most."""
PER_LABEL = 2_000
"""Of these, of one label of one case, at most."""


@dataclass(frozen=True, eq=False)
class Setup:
    """What every network is measured with.

    Attributes:
        plan: whose network it is.
        classes: what is segmented.
        cases: by name.
        folds: which of them are fitted on and scored.
        device: where.
        step: distance of the pieces that a case is computed in, as a share of their size.
        seed: of the voxels.
    """

    plan: Plan
    classes: Classes
    cases: Mapping[str, Case]
    folds: Sequence[Fold]
    device: torch.device = torch.device("cpu")
    step: float = 0.75
    seed: int = 0

    @property
    def scored(self) -> list[str]:
        """The scored cases, sorted."""
        return sorted({name for f in self.folds for name in f.score})

    @property
    def fitted(self) -> list[str]:
        """The cases that any layer is fitted on, sorted."""
        return sorted({name for f in self.folds for name in f.fit})

    @property
    def per_label(self) -> int:
        """Voxels that are drawn of each label of each case."""
        values = len({v for m in self.classes.members for v in m}) + 1
        return max(20, min(PER_LABEL, ROWS // (values * len(self.fitted))))


@dataclass(frozen=True, eq=False)
class Scores:
    """What a linear layer on some stages of one network makes of the scored cases.

    Attributes:
        stages: what it sees.
        dice: ``(cases, classes)`` in 0 to 1, NaN where neither reference nor prediction holds the class.
        slices: case -> ``(classes, Y, X)`` bool on the slice of :func:`best_slice`.
    """

    stages: Stages
    dice: np.ndarray
    slices: dict[str, np.ndarray] = field(default_factory=dict)


def best_slice(case: Case, classes: Classes) -> int:
    """The slice with the most foreground; the middle one without any."""
    area = classes.masks(case.labels).any(0).sum((1, 2))
    return int(area.argmax()) if area.any() else case.labels.shape[0] // 2


def measure(network: nn.Module, setup: Setup, decoders: Sequence[int]) -> list[Scores]:
    """Fit and score.

    Args:
        network: the plan's network; frozen and moved to the device.
        setup: cases and folds.
        decoders: for each layer, how many decoder stages it sees beside all encoder stages.

    Returns:
        One for each of ``decoders``; cases in the order of ``setup.scored``.
    """
    plan, classes = setup.plan, setup.classes
    stages = [stages_of(plan, n) for n in decoders]
    extractor = Extractor(network, plan, max(decoders), setup.device, setup.step)
    samples = collect(extractor, setup.cases, setup.fitted, setup.per_label, setup.seed)
    names = setup.scored
    dice = np.full((len(stages), len(names), len(classes.names)), np.nan)
    slices: list[dict[str, np.ndarray]] = [{} for _ in stages]
    for fold in setup.folds:
        own = [samples[name] for name in fold.fit if name in samples]
        layers = [fit(own, classes, s.columns, setup.device) for s in stages]
        for name in fold.score:
            case = setup.cases[name]
            z = best_slice(case, classes)
            for i, mask in enumerate(extractor.predict(case, layers, classes)):
                dice[i, names.index(name)] = dice_of(mask, case, classes)
                slices[i][name] = mask[:, z]
    return [Scores(s, d, m) for s, d, m in zip(stages, dice, slices)]


def dice_of(mask: np.ndarray, case: Case, classes: Classes) -> np.ndarray:
    """Dice of each class ``(classes,)`` of a prediction ``(classes, Z, Y, X)`` bool, over voxels that are not ignored."""
    looked_at = case.labels >= 0
    true, said = classes.masks(case.labels), mask & looked_at
    sizes = (true.sum((1, 2, 3)) + said.sum((1, 2, 3))).astype(float)
    both = 2.0 * (true & said).sum((1, 2, 3))
    return np.divide(both, sizes, out=np.full(len(sizes), np.nan), where=sizes > 0)
