"""The trainers of the other schedules: :class:`nnUNetTrainerPretrained` with other learning rates, and nothing else.

All figures come from the plan variant (``nnssl_plan --schedule ... -o ...``); without one they are the schedule's defaults, see
:class:`nnssl.plans.figures.FineTuningConfig`.
"""

from __future__ import annotations

from typing import ClassVar

from nnssl.trainers.pretrained import nnUNetTrainerPretrained


class nnUNetTrainerPretrainedFreezeUnfreeze(nnUNetTrainerPretrained):
    """Backbone frozen for a third of the steps, then raised exponentially to the heads' rate (Kats et al. 2024).

    The backbone is what came pretrained: parts that the checkpoint did not fill are trained at the full rate throughout, as the
    heads are. Adam with 3e-4 by default, as published.
    """

    schedule: ClassVar[str] = "freeze_unfreeze"


class nnUNetTrainerPretrainedSawtooth(nnUNetTrainerPretrained):
    """Decoder and heads first, alone, up and down; then the whole network, warm-up and poly (MIC-DKFZ's nnssl)."""

    schedule: ClassVar[str] = "sawtooth"


class nnUNetTrainerPretrainedFrozen(nnUNetTrainerPretrained):
    """The encoder stays as it was pretrained; decoder and heads are trained, warm-up and poly."""

    schedule: ClassVar[str] = "encoder_frozen"


class nnUNetTrainerPretrainedHeadOnly(nnUNetTrainerPretrained):
    """Only the segmentation heads (1x1x1 convolutions of all resolutions) are trained, warm-up and poly."""

    schedule: ClassVar[str] = "head_only"
