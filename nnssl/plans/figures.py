"""What a plan tells a fine-tuning trainer: the schedule, its figures, and the cases to train on.

A trainer fixes the schedule, the plan gives the figures: ``plans["nnssl"]`` holds them by the names of :class:`FineTuningConfig`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from nnssl.config import option, problems_of
from nnssl.errors import NnsslError, did_you_mean, raise_problems
from nnssl.fields import listing, text
from nnssl.teacher.stages import Stages

DEFAULT_SCHEDULE = "warmup_poly"
MEAN_TEACHER = "mean_teacher"
"""The schedule of two stages: the labels, then also the pool without labels."""
LINEAR_PROBE = "linear_probe"
SCRATCH = "nnUNetTrainerPretrainedScratch"
"""The control from random weights: it follows any schedule but the probe's."""
TEACHER = "nnUNetTrainerMeanTeacher"
"""The mean teacher from random weights."""
PRIMUS = ("nnUNetTrainerPretrainedPrimus", "nnUNetTrainerPretrainedPrimusScratch")
"""The trainers for Primus; both follow whatever schedule of :data:`PRIMUS_SCHEDULES` the plan names."""
SCHEDULES = {
    DEFAULT_SCHEDULE: "nnUNetTrainerPretrained",
    "freeze_unfreeze": "nnUNetTrainerPretrainedFreezeUnfreeze",
    "sawtooth": "nnUNetTrainerPretrainedSawtooth",
    "encoder_frozen": "nnUNetTrainerPretrainedFrozen",
    "head_only": "nnUNetTrainerPretrainedHeadOnly",
    MEAN_TEACHER: "nnUNetTrainerPretrainedMeanTeacher",
    LINEAR_PROBE: "nnUNetTrainerLinearProbe",
}
"""Schedule -> the trainer of U-Nets that follows it from pretrained weights."""
PRIMUS_SCHEDULES = tuple(schedule for schedule in SCHEDULES if schedule not in (MEAN_TEACHER, LINEAR_PROBE))

SCHEMA = 1
_COMMON = ("peak_lr", "optimizer")
USED: dict[str, tuple[str, ...]] = {
    DEFAULT_SCHEDULE: (*_COMMON, "warmup", "layer_decay"),
    "freeze_unfreeze": (*_COMMON, "layer_decay", "frozen", "ramp", "ramp_start"),
    "sawtooth": (*_COMMON, "warmup", "layer_decay", "decoder_first"),
    "encoder_frozen": (*_COMMON, "warmup", "layer_decay"),
    "head_only": (*_COMMON, "warmup"),
    MEAN_TEACHER: (
        *_COMMON,
        "warmup",
        "labelled_first",
        "momentum",
        "weight",
        "intensities",
        "labelled_intensities",
        "strength",
        "shift",
        "largest",
    ),
    LINEAR_PROBE: (*_COMMON, "warmup", "levels"),
}
"""Schedule -> the figures, besides the lengths, that decide anything there."""

_ADAM = {"optimizer": "adam", "peak_lr": 3e-4, "warmup": 0.0}
_DEFAULTS: dict[str, dict[str, Any]] = {"freeze_unfreeze": _ADAM, LINEAR_PROBE: _ADAM}
_PRIMUS = {"optimizer": "adamw", "peak_lr": 1e-4}
SHORT_RUN, SHORT_PEAK_LR = 25_000, 1e-2
"""Below so many optimiser steps nnU-Net's SGD gets its own learning rate as peak, unless the plan names one."""
ADAM_PEAK_LR = 2e-3
"""Adam's, with which runs shorter than :data:`SHORT_RUN` are trained in ``mean_teacher`` and ``warmup_poly`` unless the plan says
otherwise (``docs/fine-tuning.md`` has the figures); longer ones have nnU-Net's SGD."""

VERY_FEW = 2
"""Up to so many labelled cases a mean teacher leans on the images without labels (:meth:`FineTuningConfig.with_labels`)."""


@dataclass(frozen=True)
class FineTuningConfig:
    """What ``plans["nnssl"]`` may set for a training; the defaults are nnU-Net's, but for the peak learning rate.

    ``freeze_unfreeze`` and ``linear_probe`` have the defaults of the paper that they come from (Kats et al. 2024, after
    Goncharov et al. 2023): Adam with 3e-4 and no weight decay, the backbone frozen for 15,000 of 45,000 steps and then raised
    from 3e-5 to 3e-4 over 1,200. ``sawtooth`` and ``warmup_poly`` have those of MIC-DKFZ's nnssl (1000 epochs: 50 of warm-up to
    1e-3; before that 50 for the decoder alone). A Primus is trained with AdamW and 1e-4 whatever the schedule (MIC-DKFZ's
    fine-tuning; its training from scratch takes 3e-4). Where the plan names neither rate nor optimiser, runs of less than
    :data:`SHORT_RUN` steps have Adam with :data:`ADAM_PEAK_LR` in ``mean_teacher`` and ``warmup_poly``, and 1e-2 for SGD in the
    others, since 1e-3 leaves them half trained (``docs/fine-tuning.md`` has the figures).
    """

    epochs: int = option(
        1000, "epochs; 0, in warmup_poly alone, keeps the weights as they are, in nnU-Net's form", low=0
    )
    iterations: int = option(250, "optimiser steps of an epoch", low=1)
    val_iterations: int = option(50, "validation batches of an epoch", low=1)
    peak_lr: float = option(1e-3, "largest learning rate, reached at the end of the warm-up", above=0)
    warmup: float = option(0.05, "share of the epochs over which the learning rate rises", low=0, below=1)
    optimizer: str = option(
        "sgd",
        "sgd: nnU-Net's (momentum 0.99, nesterov, weight decay 3e-5); adam: no weight decay; adamw: betas 0.9 and 0.98, and the "
        "trainer's weight decay (0.05 for Primus)",
        choices=("sgd", "adam", "adamw"),
    )
    layer_decay: float = option(1.0, "factor on the learning rate per stage away from the heads", above=0, high=1)
    frozen: float = option(1 / 3, "share of the steps that the backbone is frozen for", low=0, below=1)
    ramp: float = option(
        1200 / 45000, "share of the steps over which its rate then rises exponentially", above=0, below=1
    )
    ramp_start: float = option(0.1, "what the ramp starts from, as a share of the peak", above=0, high=1)
    decoder_first: float = option(0.05, "share of the epochs for which the decoder is trained alone", above=0, below=1)
    levels: str = option(
        "decoder",
        "what a linear probe looks at: the bottleneck and the decoder's stages, or the encoder's stages",
        choices=("decoder", "encoder"),
    )
    labelled_first: float = option(
        1 / 3,
        "share of the epochs that learn from the labels alone; 1, which needs no images without labels, is the control that "
        "has the same changes of labelled patches",
        low=0,
        high=1,
    )
    momentum: float = option(0.99, "largest momentum of the teacher", low=0, below=1)
    weight: float | None = option(
        None,
        "share of patches without labels in the second stage's loss; auto: 0.5 for one or two labelled cases, 0.25 for more",
        low=0,
        below=1,
    )
    intensities: str = option(
        "strong",
        "how intensities of patches without labels change: strong (noise, contrast, brightness, gamma) or as nnU-Net's do",
        choices=("strong", "nnunet"),
    )
    labelled_intensities: str = option(
        "auto",
        "the same of labelled patches; auto: as without labels for one or two labelled cases, as nnU-Net's do for more",
        choices=("auto", "strong", "nnunet"),
    )
    strength: float | None = option(
        None,
        "factor on the probability of the student's changes without labels, and on the amount of noise; labelled images have 1. "
        "auto: 2 for one or two labelled cases, 1 for more",
        low=0,
    )
    shift: float = option(
        0.1,
        "how far patches are moved at most, as a share of the patch; nnU-Net centres a volume that is smaller, and its network "
        "never sees it anywhere else",
        low=0,
        below=1,
    )
    largest: str = option(
        "auto",
        "whether pseudo-labels keep only the largest component of each class; auto: where all labelled cases say it is one piece",
        choices=("auto", "always", "never"),
    )

    def with_labels(self, labelled: int) -> FineTuningConfig:
        """With what goes by the number of labelled cases in a mean teacher: the more they are, the less the rest may disturb.

        ``weight``, ``labelled_intensities`` and ``strength`` get a value where the plan names none.
        """
        few = labelled <= VERY_FEW
        return replace(
            self,
            weight=(0.5 if few else 0.25) if self.weight is None else self.weight,
            strength=(2.0 if few else 1.0) if self.strength is None else self.strength,
            labelled_intensities=(self.intensities if few else "nnunet")
            if self.labelled_intensities == "auto"
            else self.labelled_intensities,
        )

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
        """Read the figures of a plans dict for the trainer of this name, which follows ``schedule``.

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
            known = " or -tr ".join(followers(asked))
            use = f"use -tr {known}" if known else f"this version knows {', '.join(SCHEDULES)}"
            raise NnsslError(f"{where}: they name the schedule '{asked}' and this trainer follows '{schedule}'; {use}.")
        problems = []
        if ours.get("schema", SCHEMA) != SCHEMA:
            problems.append(f"their schema is {ours['schema']!r}, this version of nnssl reads {SCHEMA}; update nnssl")
        for key, fits, words in _LISTS:
            if ours.get(key) is not None and not fits(ours[key]):
                problems.append(f"nnssl.{key} must be a non-empty list of {words}")
        values = {
            **_DEFAULTS.get(schedule, {}),
            **(_PRIMUS if primus else {}),
            **{f.name: ours[f.name] for f in fields(cls) if ours.get(f.name) is not None},
        }
        read, wrong = problems_of(cls, values, "nnssl: ", text=False)
        if read.get("epochs") == 0 and schedule != DEFAULT_SCHEDULE:
            only = f"for the schedule '{spelt(DEFAULT_SCHEDULE)}' alone"
            wrong.append(f"nnssl: 0 epochs keep the weights as they are: {only}")
        raise_problems([*problems, *wrong], where)
        return _with_rate(cls(**read), schedule, values)


Figures = FineTuningConfig
"""The name that it had."""


def _names(value: Any) -> bool:
    return bool(value) and listing(text).fits(value)


_LISTS: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    (
        "train_cases",
        lambda v: bool(v) and isinstance(v, dict) and all(map(_names, v.values())),
        "case names for each fold",
    ),
    ("unlabelled", _names, "dataset names"),
    ("excluded", _names, "names '<dataset>/<case>'"),
)


def _with_rate(figures: FineTuningConfig, schedule: str, named: Mapping[str, Any]) -> FineTuningConfig:
    """Optimiser and largest learning rate where neither the plan nor the schedule names them: they go by the length."""
    short, optimizer, peak = figures.steps < SHORT_RUN, figures.optimizer, figures.peak_lr
    # a rate that is named is one of SGD's
    by_length = schedule == MEAN_TEACHER or (schedule == DEFAULT_SCHEDULE and "peak_lr" not in named)
    if by_length and short and "optimizer" not in named:
        optimizer = "adam"
    if "peak_lr" not in named:
        if optimizer == "sgd" and (short or schedule == MEAN_TEACHER):
            peak = SHORT_PEAK_LR
        elif schedule == MEAN_TEACHER or optimizer != figures.optimizer:
            peak = ADAM_PEAK_LR
    return replace(figures, optimizer=optimizer, peak_lr=peak)


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


def followers(schedule: str) -> list[str]:
    """The trainers of U-Nets that follow a schedule, the one from pretrained weights first; none of an unknown schedule."""
    if schedule not in SCHEDULES:
        return []
    found = [SCHEDULES[schedule]]
    if schedule == MEAN_TEACHER:
        found.append(TEACHER)
    if schedule != LINEAR_PROBE:
        found.append(SCRATCH)
    return found


def trainer_for(schedule: str, primus: bool = False, pretrained: bool = True) -> str:
    """The trainer to type for a schedule: for a U-Net or a Primus, from pretrained weights or from random ones."""
    if primus:
        return PRIMUS[0 if pretrained else 1]
    if pretrained:
        return SCHEDULES[schedule]
    return TEACHER if schedule == MEAN_TEACHER else SCRATCH


def check_options(options: Mapping[str, Any], schedule: str) -> dict[str, Any]:
    """Read figures of a schedule, from text or typed, into what a plan holds.

    Raises:
        NnsslError: lists all that the schedule does not have or that are out of range.
    """
    known = USED[schedule]
    read, problems = problems_of(FineTuningConfig, {k: v for k, v in options.items() if k in known})
    unknown = [
        f"'{k}' is no option of the schedule {spelt(schedule)}.{did_you_mean(k, known)} It has: {', '.join(known)}"
        for k in options
        if k not in known
    ]
    raise_problems([*unknown, *problems], "option -o")
    return read
