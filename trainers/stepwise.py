"""The part of a trainer that sets learning rates: one optimiser, named groups, rates that are pure functions of the step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import nn

from nnssl.amp import autocast_for, cpu_bfloat16, float_outputs, wrong_in_bfloat16
from nnssl.networks import unwrap
from nnssl.parts import is_head
from nnssl.plans.figures import DEFAULT_SCHEDULE, FineTuningConfig
from nnssl.trainers.groups import backbone_groups, build_optimizer, hold_statistics, parameter_groups
from nnssl.trainers.learning_rates import describe_rates, draw_below, draw_rates
from nnssl.trainers.schedule import LearningRates, StepSchedule

CLIP = 12.0  # nnU-Net's


class StepwiseTrainer(nnUNetTrainer):
    """nnU-Net's trainer with the schedules of :mod:`nnssl.trainers.schedule`. Subclasses set ``followed_schedule`` and
    ``figures``.

    A group with learning rate 0 is frozen: its gradients are dropped before they are clipped and applied, so that it stays
    bit-identical and takes no part in the norm. ``requires_grad`` is only ever changed before DDP wraps the network, for
    groups that no step trains.

    """

    schedule: ClassVar[str] = "warmup_poly"
    clip: ClassVar[float] = CLIP
    followed_schedule: str
    figures: FineTuningConfig
    provenance: dict[str, Any]
    rates: Sequence[dict[str, Any]] = ()
    _iteration: int = 0
    _narrow: bool | None = None

    @classmethod
    def schedule_of(cls, plans: dict[str, Any]) -> str:
        """The schedule that this trainer follows on the given plans."""
        return cls.schedule

    @property
    def told(self) -> dict[str, Any]:
        """What the plan variant tells the trainer; empty for plain plans."""
        return self.plans_manager.plans.get("nnssl") or {}

    @property
    def one_rate(self) -> bool:
        """Whether all parameters learn at one rate that changes from epoch to epoch, as nnU-Net's does."""
        return self.followed_schedule == DEFAULT_SCHEDULE and self.figures.layer_decay == 1

    def configure_optimizers(self) -> tuple[torch.optim.Optimizer, StepSchedule]:
        """One group, as nnU-Net has it, where there is one rate; else one for each stage, the heads first."""
        figures = replace(
            self.figures,
            epochs=self.num_epochs,
            iterations=self.num_iterations_per_epoch,
            peak_lr=self.initial_lr,
        )
        groups: list[dict[str, Any]] = [{"params": list(self.network.parameters())}]
        if not self.one_rate:
            groups = self.parameter_groups()
        names = tuple(group.get("name", "network") for group in groups)
        backbone = backbone_groups(self.default_backbone(names), names)
        rates = LearningRates(self.followed_schedule, figures, names, backbone)
        for name, group in zip(names, groups):
            if rates.always_frozen(name):
                for parameter in group["params"]:
                    parameter.requires_grad_(False)
        optimizer = build_optimizer(groups, figures.optimizer, self.initial_lr, self.weight_decay)
        schedule = StepSchedule(optimizer, rates)
        if not self.one_rate:
            schedule.step(0)
        return optimizer, schedule

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The optimiser's groups, named."""
        return parameter_groups(self.network)

    def default_backbone(self, groups: Iterable[str]) -> list[str]:
        """The parts that the plan calls the backbone, or all groups but the heads."""
        named = self.told.get("backbone")
        return list(named) if named else [name for name in groups if not is_head(name)]

    def set_backbone(self, parts: Iterable[str] | None = None) -> None:
        """Tell ``freeze_unfreeze`` which parts came pretrained (default: the plan's), and remember it for ``--c``."""
        if self.followed_schedule != "freeze_unfreeze":
            return
        rates = self.lr_scheduler.rates
        chosen = self.default_backbone(rates.groups) if parts is None else [str(part) for part in parts]
        self.provenance["backbone"] = chosen
        self.lr_scheduler.rates = replace(rates, backbone=backbone_groups(chosen, rates.groups))
        self.lr_scheduler.step(self.current_epoch)

    def on_train_epoch_start(self) -> None:
        """As nnU-Net; the learning rates of all groups are logged."""
        super().on_train_epoch_start()
        self._iteration = 0
        if self.one_rate:  # in nnU-Net's own log
            return
        first = self.lr_scheduler.now()
        hold_statistics(self.network, self.lr_scheduler.frozen())
        kept = [row for row in self.rates if row["epoch"] < self.current_epoch]
        self.rates = [*kept, {"epoch": self.current_epoch, "first": first, "last": first}]
        self.print_to_log_file(f"nnssl: learning rates {describe_rates(first)}")

    def train_step(self, batch: dict) -> dict:
        """As nnU-Net, at this step's learning rates and without the gradients of what is frozen."""
        held = [] if self.one_rate else [p for p in self._set_rates(self.lr_scheduler) if p.requires_grad]
        if held or self.clip != CLIP or self.own_loss(batch) or self._cpu_bfloat16():
            return self._optimise(batch, held)
        return super().train_step(batch)

    def _set_rates(self, schedule: StepSchedule) -> list[nn.Parameter]:
        """Set the learning rates of this step; returns the parameters that it does not train."""
        before = {name for name, lr in schedule.now().items() if lr == 0}
        schedule.set(self.current_epoch * self.num_iterations_per_epoch + self._iteration)
        self._iteration += 1
        now = schedule.now()
        frozen = schedule.frozen()
        if before != {name for name, lr in now.items() if lr == 0}:
            hold_statistics(self.network, frozen)
            self.print_to_log_file(f"nnssl: step {self._iteration} of the epoch: {describe_rates(now)}")
        if self.rates:
            self.rates[-1]["last"] = now
        return frozen

    def own_loss(self, batch: dict) -> bool:
        """Whether :meth:`batch_loss` differs from nnU-Net's loss for this batch."""
        return False

    def batch_loss(self, batch: dict) -> torch.Tensor:
        """The loss of a batch, with gradients; called under autocast."""
        return self.loss(self.outputs(self.moved(batch["data"])), self.moved(batch["target"]))

    def outputs(self, data: torch.Tensor) -> Any:
        """What the network makes of a batch on the device; on a CPU float32 for the loss, whatever it computes in."""
        made = self.network(data)
        return float_outputs(made) if self.device.type == "cpu" else made

    def moved(self, tensors: Any) -> Any:
        """A tensor, or a list of them, on the device."""
        if isinstance(tensors, (list, tuple)):
            return [t.to(self.device, non_blocking=True) for t in tensors]
        return tensors.to(self.device, non_blocking=True)

    def _optimise(self, batch: dict, frozen: Iterable[nn.Parameter]) -> dict:
        """One optimiser step on :meth:`batch_loss` that leaves the given parameters as they are."""
        self.optimizer.zero_grad(set_to_none=True)
        with autocast_for(self.device, self.device.type != "cpu" or self._cpu_bfloat16()):
            loss = self.batch_loss(batch)
        scaler = self.grad_scaler
        (loss if scaler is None else scaler.scale(loss)).backward()
        for parameter in frozen:
            parameter.grad = None
        if scaler is not None:
            scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), self.clip)
        taken = True
        if scaler is None:
            self.optimizer.step()
        else:
            scale = scaler.get_scale()
            scaler.step(self.optimizer)
            scaler.update()
            taken = scaler.get_scale() >= scale  # a smaller scale tells of a step that was skipped
        if taken:
            self.after_step()
        return {"loss": loss.detach().cpu().numpy()}

    def after_step(self) -> None:
        """Called after each optimiser step of :meth:`batch_loss`, and not where that was skipped."""

    def validation_step(self, batch: dict) -> dict:
        """As nnU-Net, on a CPU in bfloat16 where training steps are; the loss is computed in float32."""
        if not self._cpu_bfloat16():
            return super().validation_step(batch)
        hook = self.network.register_forward_hook(lambda module, inputs, output: float_outputs(output))
        try:
            with autocast_for(self.device):
                return super().validation_step(batch)
        finally:
            hook.remove()

    def _cpu_bfloat16(self) -> bool:
        """Whether steps on a CPU are in bfloat16: where it is asked for, and no convolution of the network is wrong in it."""
        if self.device.type != "cpu" or not cpu_bfloat16():
            return False
        if self._narrow is None:
            size = (self.batch_size, self.num_input_channels, *self.configuration_manager.patch_size)
            wrong = wrong_in_bfloat16(unwrap(self.network), lambda network: network(torch.zeros(size)))
            self._narrow = not wrong
            if wrong:
                self.print_to_log_file(
                    f"nnssl: float32 in place of bfloat16: torch {torch.__version__} computes '{wrong[0]}' wrongly here."
                )
        return self._narrow

    def on_epoch_end(self) -> None:
        """As nnU-Net; ``progress.png`` gets a panel with the learning rates of all groups."""
        super().on_epoch_end()
        if self.local_rank == 0 and self.rates and not self.one_rate:
            rates, done = self.lr_scheduler.rates, self.current_epoch
            draw_below(Path(self.output_folder) / "progress.png", lambda ax: draw_rates(rates, done, ax))
