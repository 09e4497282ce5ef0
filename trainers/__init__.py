"""Trainers for plain ``nnUNetv2_train -tr <name>``: which weights, which schedule. Importing this imports no torch.

``TRAINERS`` is the one list of them: the folder that nnU-Net searches and ``nnssl_trainers`` both read it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nnssl.trainers.mean_teacher import nnUNetTrainerMeanTeacher, nnUNetTrainerPretrainedMeanTeacher
    from nnssl.trainers.other_schedules import (
        nnUNetTrainerPretrainedFreezeUnfreeze,
        nnUNetTrainerPretrainedFrozen,
        nnUNetTrainerPretrainedHeadOnly,
        nnUNetTrainerPretrainedSawtooth,
    )
    from nnssl.trainers.pretrained import nnUNetTrainerPretrained, nnUNetTrainerPretrainedScratch
    from nnssl.trainers.primus import nnUNetTrainerPretrainedPrimus, nnUNetTrainerPretrainedPrimusScratch
    from nnssl.trainers.probe import nnUNetTrainerLinearProbe

__all__ = [
    "TRAINERS",
    "nnUNetTrainerLinearProbe",
    "nnUNetTrainerMeanTeacher",
    "nnUNetTrainerPretrained",
    "nnUNetTrainerPretrainedFreezeUnfreeze",
    "nnUNetTrainerPretrainedFrozen",
    "nnUNetTrainerPretrainedHeadOnly",
    "nnUNetTrainerPretrainedMeanTeacher",
    "nnUNetTrainerPretrainedPrimus",
    "nnUNetTrainerPretrainedPrimusScratch",
    "nnUNetTrainerPretrainedSawtooth",
    "nnUNetTrainerPretrainedScratch",
]

TRAINERS: dict[str, tuple[str, str]] = {
    "nnUNetTrainerPretrained": (
        "nnssl.trainers.pretrained",
        "starts from the pretraining that was made for the plans; warm-up, then poly",
    ),
    "nnUNetTrainerPretrainedScratch": (
        "nnssl.trainers.pretrained",
        "the control: the plan's schedule from random weights",
    ),
    "nnUNetTrainerPretrainedFreezeUnfreeze": (
        "nnssl.trainers.other_schedules",
        "pretrained parts frozen for a third of the run, then raised exponentially",
    ),
    "nnUNetTrainerPretrainedSawtooth": ("nnssl.trainers.other_schedules", "decoder and heads first, then everything"),
    "nnUNetTrainerPretrainedFrozen": ("nnssl.trainers.other_schedules", "the encoder stays frozen"),
    "nnUNetTrainerPretrainedHeadOnly": ("nnssl.trainers.other_schedules", "only the segmentation heads are trained"),
    "nnUNetTrainerPretrainedMeanTeacher": (
        "nnssl.trainers.mean_teacher",
        "for few labels: also learns from images without labels, by an averaged teacher's pseudo-labels",
    ),
    "nnUNetTrainerMeanTeacher": ("nnssl.trainers.mean_teacher", "the same from random weights"),
    "nnUNetTrainerPretrainedPrimus": (
        "nnssl.trainers.primus",
        "pretrained weights for plans whose network is a Primus; the plan says which schedule",
    ),
    "nnUNetTrainerPretrainedPrimusScratch": (
        "nnssl.trainers.primus",
        "the control for Primus: the plan's schedule from random weights",
    ),
    "nnUNetTrainerLinearProbe": (
        "nnssl.trainers.probe",
        "frozen network, one linear layer per resolution; predicts only where nnssl is installed",
    ),
}
"""Name of each trainer -> the module that defines it, and one line on what it does."""


def __getattr__(name: str) -> Any:
    if name in TRAINERS:
        return getattr(import_module(TRAINERS[name][0]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *TRAINERS})
