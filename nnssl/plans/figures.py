"""What a plan tells a fine-tuning trainer: the schedule, its figures, and the cases to train on.

A trainer fixes the schedule, the plan gives the figures: ``plans["nnssl"]`` holds them by the names of :class:`FineTuningConfig`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from nnssl.config import option, problems_of
from nnssl.errors import NnsslError, did_you_mean, raise_problems
from nnssl.teacher.stages import Stages

DEFAULT_SCHEDULE = "warmup_poly"
SCRATCH = "nnUNetTrainerPretrainedScratch"
MEAN_TEACHER = "mean_teacher"
"""The schedule of two stages: the labels, then also the pool without labels."""
TEACHER = "nnUNetTrainerMeanTeacher"
"""Its trainer from random weights."""
PRIMUS = ("nnUNetTrainerPretrainedPrimus", "nnUNetTrainerPretrainedPrimusScratch")
"""The trainers for Primus; both follow whatever schedule of :data:`PRIMUS_SCHEDULES` the plan names."""
SCHEDULES: dict[str, tuple[str, ...]] = {
    "warmup_poly": ("nnUNetTrainerPretrained", SCRATCH),
    "freeze_unfreeze": ("nnUNetTrainerPretrainedFreezeUnfreeze", SCRATCH),
    "sawtooth": ("nnUNetTrainerPretrainedSawtooth", SCRATCH),
    "encoder_frozen": ("nnUNetTrainerPretrainedFrozen", SCRATCH),
    "head_only": ("nnUNetTrainerPretrainedHeadOnly", SCRATCH),
    MEAN_TEACHER: ("nnUNetTrainerPretrainedMeanTeacher", TEACHER, SCRATCH),
    "linear_probe": ("nnUNetTrainerLinearProbe",),
}
"""Schedule -> the trainers of U-Nets that follow it. The control without pretraining follows any but the probe's."""
PRIMUS_SCHEDULES = tuple(schedule for schedule in SCHEDULES if schedule not in (MEAN_TEACHER, "linear_probe"))

SCHEMA = 1
_COMMON = ("peak_lr", "optimizer")
USED: dict[str, tuple[str, ...]] = {
    "warmup_poly": (*_COMMON, "warmup", "layer_decay"),
    "freeze_unfreeze": (*_COMMON, "layer_decay", "frozen", "ramp", "ramp_start"),
    "sawtooth": (*_COMMON, "warmup", "layer_decay", "decoder_first"),
    "encoder_frozen": (*_COMMON, "warmup", "layer_decay"),
    "head_only": (*_COMMON, "warmup"),
    MEAN_TEACHER: (*_COMMON, "warmup", "labelled_first", "momentum", "intensities", "strength", "shift", "largest"),
    "linear_probe": (*_COMMON, "warmup", "levels"),
}
"""Schedule -> the figures, besides the lengths, that decide anything there."""

_ADAM = {"optimizer": "adam", "peak_lr": 3e-4, "warmup": 0.0}
_DEFAULTS: dict[str, dict[str, Any]] = {"freeze_unfreeze": _ADAM, "linear_probe": _ADAM}
_PRIMUS = {"optimizer": "adamw", "peak_lr": 1e-4}
SHORT_RUN, SHORT_PEAK_LR = 25_000, 1e-2
"""Below so many optimiser steps nnU-Net's SGD gets its own learning rate as peak, unless the plan names one."""
ADAM_PEAK_LR = 2e-3
"""Adam's, with which runs shorter than :data:`SHORT_RUN` are trained in ``mean_teacher`` and ``warmup_poly`` unless the plan says
otherwise (``docs/fine-tuning.md`` has the figures); longer ones have nnU-Net's SGD."""

VERY_FEW = 2
"""Up to so many labelled cases the student's changes have twice the strength (``docs/fine-tuning.md`` has the figures)."""


@dataclass(frozen=True)
class FineTuningConfig:
    """What ``plans["nnssl"]`` may set for a training; the defaults are nnU-Net's, but for the peak learning rate.

    ``freeze_unfreeze`` and ``linear_probe`` have the defaults of the paper that they come from (Kats et al. 2024, after
    Goncharov et al. 2023): Adam with 3e-4 and no weight decay, the backbone frozen for 15,000 of 45,000 steps and then raised
    from 3e-5 to 3e-4 over 1,200. ``sawtooth`` and ``warmup_poly`` have those of MIC-DKFZ's nnssl (1000 epochs: 50 of warm-up to
    1e-3; before that 50 for the decoder alone). A Primus is trained with AdamW and 1e-4 whatever the schedule (MIC-DKFZ's
    fine-tuning; its training from scratch takes 3e-4).

    Attributes:
        epochs: epochs of training; 0, in ``warmup_poly`` alone, keeps the weights as they are, in nnU-Net's form.
        iterations: optimiser steps per epoch.
        val_iterations: validation batches per epoch.
        peak_lr: largest learning rate, reached at the end of the warm-up. Where the plan does not name one, in runs of less than
            :data:`SHORT_RUN` steps 1e-2 for SGD, since 1e-3 leaves them half trained (``docs/fine-tuning.md`` has the figures).
        warmup: share of the epochs in [0, 1) over which the learning rate rises.
        optimizer: ``"sgd"`` (nnU-Net's: momentum 0.99, nesterov, weight decay 3e-5), ``"adam"`` (no weight decay) or ``"adamw"``
            (betas 0.9 and 0.98, and the weight decay of the trainer: 0.05 for Primus). ``mean_teacher`` and ``warmup_poly`` whose
            plan names neither this nor a rate have Adam with :data:`ADAM_PEAK_LR` in runs of less than :data:`SHORT_RUN` steps.
        layer_decay: factor in (0, 1] on the learning rate per stage away from the heads.
        frozen: share of the steps in [0, 1) that the backbone is frozen for.
        ramp: share of the steps in (0, 1) over which the backbone's learning rate then rises, exponentially.
        ramp_start: what the ramp starts from, as a share of the peak in (0, 1].
        decoder_first: share of the epochs in (0, 1) for which the decoder is trained alone.
        levels: what a linear probe looks at: the bottleneck and the ``"decoder"`` stages, or the ``"encoder"`` stages.
        labelled_first: share of the epochs in [0, 1) that ``mean_teacher`` learns from the labels alone.
        momentum: largest momentum of its teacher, in [0, 1).
        intensities: how the intensities of its patches change: ``"strong"`` (noise, contrast, brightness, gamma;
            :func:`nnssl.trainers.pool.strong_changes`) or ``"nnunet"``.
        strength: factor of at least 0 on the probability of the changes that the student sees on images without labels, and on
            the amount of noise; labelled images have 1. None: by the number of labelled cases, :meth:`strength_for`.
        shift: how far its patches are moved at most, as a share in [0, 1) of the patch. nnU-Net centres a volume that is
            smaller than the patch, and its network never sees it anywhere else.
        largest: whether pseudo-labels keep only the largest component of each class: ``"auto"`` where all labelled cases say that
            it is one piece, ``"always"`` or ``"never"``.
    """

    epochs: int = option(1000, low=0)
    iterations: int = option(250, low=1)
    val_iterations: int = option(50, low=1)
    peak_lr: float = option(1e-3, above=0)
    warmup: float = option(0.05, low=0, below=1)
    optimizer: str = option("sgd", choices=("sgd", "adam", "adamw"))
    layer_decay: float = option(1.0, above=0, high=1)
    frozen: float = option(1 / 3, low=0, below=1)
    ramp: float = option(1200 / 45000, above=0, below=1)
    ramp_start: float = option(0.1, above=0, high=1)
    decoder_first: float = option(0.05, above=0, below=1)
    levels: str = option("decoder", choices=("decoder", "encoder"))
    labelled_first: float = option(1 / 3, low=0, below=1)
    momentum: float = option(0.99, low=0, below=1)
    intensities: str = option("strong", choices=("strong", "nnunet"))
    strength: float | None = option(None, low=0)
    shift: float = option(0.1, low=0, below=1)
    largest: str = option("auto", choices=("auto", "always", "never"))

    def strength_for(self, labelled: int) -> float:
        """``strength``; where it is None, 2 for one or two labelled cases and 1 for more, whose second stage loses by 2."""
        if self.strength is not None:
            return self.strength
        return 2.0 if labelled <= VERY_FEW else 1.0

    @property
    def stages(self) -> Stages:
        """The epochs of ``mean_teacher``: with the labels alone, then with the pool too."""
        return Stages.split(self.epochs, self.labelled_first)

    @property
    def steps(self) -> int:
        """Optimiser steps in all."""
        return self.epochs * self.iterations

    @property
    def warmup_epochs(self) -> int:
        """Epochs of warm-up: ``round(warmup * epochs)``, at least one where there are several epochs and any warm-up."""
        if self.epochs == 1 or self.warmup == 0:
            return 0
        return max(1, round(self.warmup * self.epochs))

    @property
    def decoder_epochs(self) -> int:
        """Epochs of the decoder alone in ``sawtooth``: ``round(decoder_first * epochs)``, at least one of several."""
        return 0 if self.epochs == 1 else min(self.epochs - 1, max(1, round(self.decoder_first * self.epochs)))

    def to_dict(self) -> dict[str, Any]:
        """The figures as plain values."""
        return asdict(self)

    @classmethod
    def from_plans(cls, plans: Mapping[str, Any], schedule: str, trainer: str) -> FineTuningConfig:
        """Read the figures of a plans dict.

        Args:
            plans: nnU-Net's plans; without the key ``"nnssl"`` all figures are the schedule's defaults.
            schedule: the schedule that ``trainer`` follows.
            trainer: name of the trainer, for the messages.

        Raises:
            NnsslError: a figure out of range, another schedule than the trainer's (names the trainer to
                use), or something that only a newer version understands.
        """
        ours, name = plans.get("nnssl") or {}, plans.get("plans_name", "?")
        where = f"Plans '{name}' cannot be trained with {trainer}"
        asked, primus = ours.get("schedule") or schedule, trainer in PRIMUS
        if primus and asked not in PRIMUS_SCHEDULES:
            can = ", ".join(map(spelt, PRIMUS_SCHEDULES))
            raise NnsslError(f"{where}: the schedule '{asked}' is for U-Nets only. For Primus there are {can}.")
        if asked != schedule:
            known = SCHEDULES.get(asked)
            use = f"use -tr {' or -tr '.join(known)}" if known else f"this version knows {', '.join(SCHEDULES)}"
            raise NnsslError(f"{where}: they name the schedule '{asked}' and this trainer follows '{schedule}'; {use}.")
        problems = []
        if ours.get("schema", SCHEMA) != SCHEMA:
            problems.append(f"their schema is {ours['schema']!r}, this version of nnssl reads {SCHEMA}; update nnssl")
        problems += _check_cases(ours.get("train_cases"))
        problems += _check_unlabelled(ours.get("unlabelled"))
        values = {
            **_DEFAULTS.get(schedule, {}),
            **(_PRIMUS if primus else {}),
            **{f.name: ours[f.name] for f in fields(cls) if ours.get(f.name) is not None},
        }
        read, wrong = problems_of(cls, values, "nnssl: ", text=False)
        if read.get("epochs") == 0 and schedule != DEFAULT_SCHEDULE:
            wrong = [
                *wrong,
                f"nnssl: 0 epochs keep the weights as they are: for the schedule '{spelt(DEFAULT_SCHEDULE)}' alone",
            ]
        raise_problems([*problems, *wrong], where)
        figures = cls(**read)
        if "optimizer" not in values and figures.steps < SHORT_RUN:
            if schedule == MEAN_TEACHER:
                figures = replace(figures, optimizer="adam")
            elif schedule == DEFAULT_SCHEDULE and "peak_lr" not in values:  # a rate that is named is one of SGD's
                return replace(figures, optimizer="adam", peak_lr=ADAM_PEAK_LR)
        if "peak_lr" not in values:
            figures = replace(figures, peak_lr=_peak(schedule, figures))
        return figures


Figures = FineTuningConfig
"""The name that it had."""


def _peak(schedule: str, figures: FineTuningConfig) -> float:
    """The largest learning rate where the plan names none."""
    if schedule == MEAN_TEACHER:
        return SHORT_PEAK_LR if figures.optimizer == "sgd" else ADAM_PEAK_LR
    short = figures.optimizer == "sgd" and figures.steps < SHORT_RUN
    return SHORT_PEAK_LR if short else figures.peak_lr


def _check_cases(cases: Any) -> list[str]:
    if cases is None:
        return []
    legal = (
        isinstance(cases, dict)
        and cases
        and all(isinstance(v, list) and v and all(isinstance(c, str) for c in v) for v in cases.values())
    )
    return [] if legal else ["nnssl.train_cases must be a non-empty list of case names for each fold"]


def _check_unlabelled(sources: Any) -> list[str]:
    legal = sources is None or (
        isinstance(sources, list) and sources and all(isinstance(s, str) and s for s in sources)
    )
    return [] if legal else ["nnssl.unlabelled must be a non-empty list of dataset names"]


def spelt(schedule: str) -> str:
    """A schedule as a user types it: ``freeze-unfreeze``."""
    return schedule.replace("_", "-")


def schedule_name(text: str) -> str:
    """The name of a schedule as a user writes it (``freeze-unfreeze``).

    Raises:
        NnsslError: no such schedule; names the nearest.
    """
    name = text.strip().lower().replace("-", "_")
    if name not in SCHEDULES:
        known = [spelt(schedule) for schedule in SCHEDULES]
        raise NnsslError(f"There is no schedule '{text}'.{did_you_mean(text, known)} There are: {', '.join(known)}.")
    return name


def trainer_for(schedule: str, primus: bool = False) -> str:
    """The trainer to type for a schedule, and for a U-Net or a Primus."""
    return PRIMUS[0] if primus else SCHEDULES[schedule][0]


def check_options(options: Mapping[str, Any], schedule: str) -> dict[str, Any]:
    """Read figures of a schedule, from text or typed.

    Returns:
        The figures as a plan holds them.

    Raises:
        NnsslError: lists all that the schedule does not have or that are out of range.
    """
    known, name = USED[schedule], spelt(schedule)
    read, problems = problems_of(FineTuningConfig, {k: v for k, v in options.items() if k in known})
    unknown = [k for k in options if k not in known]
    others = [
        f"'{k}' is no option of the schedule {name}.{did_you_mean(k, known)} It has: {', '.join(known)}"
        for k in unknown
    ]
    raise_problems([*others, *problems], "option -o")
    return read
