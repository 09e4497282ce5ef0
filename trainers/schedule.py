"""The learning rate as a pure function of the step: a factor for each schedule, and the objects that set it.

Nothing here has a state, so that a training continued in the middle of a ramp goes on as if it had never stopped. There is one
optimiser whatever the schedule; a part is frozen by the learning rate 0.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch

from nnssl.parts import ENCODER, Part, is_head
from nnssl.plans.figures import LINEAR_PROBE, MEAN_TEACHER, FineTuningConfig
from nnssl.teacher.stages import Stages


def warmup_poly(epoch: int, epochs: int, warmup_epochs: int, exponent: float = 0.9) -> float:
    """Factor on the peak learning rate: a linear rise, then nnU-Net's polynomial decay. A pure function of the epoch.

    ``(e + 1) / (w + 1)`` for ``e < w``, else ``(1 - (e - w) / (E - w)) ** exponent``, with epoch e from 0, w epochs of
    warm-up and E epochs in all: never 0 at the start, and 1 at epoch w.
    """
    if epoch < warmup_epochs:
        return (epoch + 1) / (warmup_epochs + 1)
    left = 1 - (epoch - warmup_epochs) / (epochs - warmup_epochs)
    return max(0.0, left) ** exponent


def sawtooth(epoch: int, epochs: int, decoder_epochs: int, warmup_epochs: int) -> tuple[float, float]:
    """Two teeth (MIC-DKFZ's nnssl): the decoder alone rises and falls, then the whole network warms up and decays.

    The first tooth is :func:`warmup_poly` over ``decoder_epochs``, half of them rising; the second is it over the others.

    Returns:
        the factors of the encoder (0 during the first tooth) and of everything else.
    """
    if epoch < decoder_epochs:
        return 0.0, warmup_poly(epoch, decoder_epochs, decoder_epochs // 2)
    rest = epochs - decoder_epochs
    factor = warmup_poly(epoch - decoder_epochs, rest, min(warmup_epochs, rest - 1))
    return factor, factor


def freeze_unfreeze(
    step: int, steps: int, frozen: float = 1 / 3, ramp: float = 1200 / 45000, start: float = 0.1
) -> float:
    """Factor of the backbone (Kats et al. 2024): 0, then from ``start`` to 1 exponentially, then 1.

    ``min(1, start ** (1 - (t - t0) / R))`` from step ``t0 = round(frozen * steps)``, with ``R = ramp * steps``: with the
    published figures, of 45,000 steps the first 15,000 are frozen and 3e-5 becomes 3e-4 over 1,200.
    """
    first = round(frozen * steps)
    if step < first:
        return 0.0
    return min(1.0, start ** (1 - (step - first) / (ramp * steps)))


@dataclass(frozen=True)
class LearningRates:
    """The learning rate of each parameter group at each step of a training.

    ``figures`` have the length of this training. ``groups`` go from the heads down to the stem
    (:func:`nnssl.trainers.groups.group_of`); of them ``freeze_unfreeze`` first freezes the ``backbone``, and trains the others at
    the full rate throughout.
    """

    schedule: str
    figures: FineTuningConfig
    groups: tuple[str, ...]
    backbone: Collection[str] = ()

    def at(self, step: int, group: str) -> float:
        """The learning rate of a group at an optimiser step, counted from 0 over the whole training."""
        decay = self.figures.layer_decay ** self.groups.index(group)
        return self.figures.peak_lr * self._factor(step, group) * decay

    def _factor(self, step: int, group: str) -> float:
        f, epoch = self.figures, step // self.figures.iterations
        encoder = Part(group).kind == ENCODER
        if self.schedule == "freeze_unfreeze":
            if group not in self.backbone:
                return 1.0
            return freeze_unfreeze(step, f.steps, f.frozen, f.ramp, f.ramp_start)
        if self.schedule == "sawtooth":
            return sawtooth(epoch, f.epochs, f.decoder_epochs, f.warmup_epochs)[0 if encoder else 1]
        if self.schedule == MEAN_TEACHER:
            stages = Stages(f.stages.first * f.iterations, f.steps)
            return stages.factor(step, f.warmup)
        if self.always_frozen(group):
            return 0.0
        if f.warmup == 0 and self.schedule == LINEAR_PROBE:
            return 1.0
        return warmup_poly(epoch, f.epochs, f.warmup_epochs)

    def always_frozen(self, group: str) -> bool:
        """Whether a group is trained at no step."""
        if self.schedule == "encoder_frozen":
            return Part(group).kind == ENCODER
        return self.schedule == "head_only" and not is_head(group)


class StepSchedule:
    """Sets each group's learning rate for a step; :meth:`step` is what nnU-Net calls before each epoch.

    The optimiser's groups are those of ``rates``, in this order. Unlike with nnU-Net's schedulers, one with the rate 0 is frozen.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, rates: LearningRates) -> None:
        self.optimizer = optimizer
        self.rates = rates

    def step(self, epoch: int) -> None:
        """Set the learning rates of the first step of ``epoch``, counted from 0."""
        self.set(epoch * self.rates.figures.iterations)

    def set(self, step: int) -> None:
        """Set the learning rates of an optimiser step, counted from 0 over the whole training."""
        for name, group in zip(self.rates.groups, self.optimizer.param_groups):
            group["lr"] = self.rates.at(step, name)

    def now(self) -> dict[str, float]:
        """Name of each group -> the learning rate that it has at present."""
        return {name: float(group["lr"]) for name, group in zip(self.rates.groups, self.optimizer.param_groups)}

    def frozen(self) -> list[torch.nn.Parameter]:
        """The parameters that are not trained at present."""
        return [p for group in self.optimizer.param_groups if group["lr"] == 0 for p in group["params"]]
