"""``nnUNetTrainerPretrainedPrimus``: fine-tuning of a Primus that a plan variant describes, and its control without weights.

The network, AdamW, its betas and weight decay, the clipping and no deep supervision are those of nnU-Net's Primus trainers; the
learning rate (1e-4, MIC-DKFZ's for fine-tuning; nnU-Net's own from scratch is 3e-4), schedule, length and cases are the plan's.
Checkpoints are saved under the name of nnU-Net's Primus trainer of the same size, so that any nnU-Net predicts with them; for a
size that nnU-Net has no trainer of, under this one's, and nnssl is needed where they predict.
"""

from __future__ import annotations

from typing import Any, ClassVar

from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import nn

from nnssl.networks.build import build_primus
from nnssl.trainers.pretrained import nnUNetTrainerPretrained


class nnUNetTrainerPretrainedPrimus(nnUNetTrainerPretrained):
    """Fine-tunes a Primus; weights are found as in :class:`~nnssl.trainers.pretrained.nnUNetTrainerPretrained`.

    It follows whatever schedule the plan names (but mean teacher and linear probe): one trainer for all of them.
    """

    primus: ClassVar[bool] = True
    one_output: ClassVar[bool] = True
    clip: ClassVar[float] = 1.0

    def constructed(self) -> None:
        """The weight decay of nnU-Net's Primus trainers."""
        self.weight_decay = 5e-2

    @classmethod
    def schedule_of(cls, plans: dict[str, Any]) -> str:
        """The plan's schedule."""
        return (plans.get("nnssl") or {}).get("schedule") or cls.schedule

    @staticmethod
    def build_network_architecture(
        plans_manager: PlansManager,
        configuration_manager: ConfigurationManager,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = True,
    ) -> nn.Module:
        """The Primus that the plans describe, for their patch; it has one output whatever is asked for."""
        return build_primus(configuration_manager, num_input_channels, num_output_channels)

    def stock_name(self) -> str | None:
        """nnU-Net's Primus trainer of this size, ``"nnUNet_Primus_S_Trainer"``; None where it has none."""
        return self.plan().stock_trainer


class nnUNetTrainerPretrainedPrimusScratch(nnUNetTrainerPretrainedPrimus):
    """The control without pretraining: random weights, everything else as the plan has it."""

    pretrained: ClassVar[bool] = False
