"""``nnUNetTrainerLinearProbe``: what a linear classifier makes of the frozen pretrained features, trained by nnU-Net."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch

from nnssl import transfer
from nnssl.errors import NnsslError
from nnssl.networks import unwrap
from nnssl.plans import Plan
from nnssl.plans.commands import plan_command
from nnssl.plans.figures import LINEAR_PROBE
from nnssl.plans.probe import from_probe, to_probe
from nnssl.trainers.pretrained import nnUNetTrainerPretrained

_ONLY_HERE = (
    "nnssl: NOTE: a linear probe predicts only where nnssl is installed. That goes for this folder and for a zip that "
    "nnUNetv2_export_model_to_zip makes of it: whoever installs it needs pip install of nnssl too."
)


class nnUNetTrainerLinearProbe(nnUNetTrainerPretrained):
    """Trains one 1x1(x1) convolution per resolution on the plan's network, frozen as it was pretrained.

    The network is :class:`nnssl.networks.probe.LinearProbe`, written into the plans that the results folder keeps, so that plain
    ``nnUNetv2_predict`` predicts where nnssl is installed, and only there. Adam with a constant 3e-4 by default, as published.
    ``-pretrained_weights`` has no place here, since nnU-Net would look for the probe's names: name the file in a plan.
    """

    schedule: ClassVar[str] = LINEAR_PROBE

    one_output: ClassVar[bool] = True

    def trained_plans(self, plans: dict[str, Any], configuration: str, dataset_json: dict[str, Any]) -> dict[str, Any]:
        """Those of the probe."""
        plan = Plan.from_dicts(from_probe(plans, configuration), configuration, dataset_json, second_stage=True)
        return to_probe(plan, self.figures.levels)

    def on_train_start(self) -> None:
        """As the other trainers; says what the model is good for."""
        self.print_to_log_file(_ONLY_HERE)
        super().on_train_start()

    def on_train_end(self) -> None:
        """As nnU-Net; says again what an exported zip needs."""
        super().on_train_end()
        self.print_to_log_file(_ONLY_HERE)

    def plan(self) -> Plan:
        """The plan of the frozen network."""
        plans = from_probe(self.plans_manager.plans, self.configuration_name)
        return Plan.from_dicts(plans, self.configuration_name, self.dataset_json, second_stage=True)

    def pretrained_network(self) -> torch.nn.Module:
        """The frozen network."""
        backbone: Any = unwrap(self.network).backbone
        return backbone

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The probe's convolutions, and nothing else."""
        heads: Any = unwrap(self.network).heads
        return [{"name": str(transfer.HEADS), "params": list(heads.parameters())}]

    def check_transfer(self, report: transfer.TransferReport, path: Path) -> None:
        """Refuse to probe decoder stages that are random."""
        random = report.random_decoder if self.figures.levels == "decoder" else []
        if random:
            command = plan_command(self.plan(), f"--checkpoint {path} --schedule linear-probe -o levels=encoder")
            raise NnsslError(
                f"{path} holds no weights for {', '.join(random)}, which a probe of the decoder looks at. Probe the encoder: "
                f"{command}"
            )
