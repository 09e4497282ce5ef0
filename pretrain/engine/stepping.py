"""One optimiser step: autocast, scaling, clipping, the learning rate, and numbers that are read one step later."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nnssl.distributed import mean_over_ranks
from nnssl.pretrain.methods.base import Batch, Method

__all__ = ["Numbers", "Stepper"]


@dataclass
class Numbers:
    """Numbers of one step, still on the device, so that reading them does not hold up the next step.

    Attributes:
        names: of the terms, in the order of ``values``; the last ones are ``grad_norm`` and ``stop``.
        values: ``(len(names),)`` float32, averaged over ranks.
        cases: of this rank's crops.
    """

    step: int
    names: list[str]
    values: Tensor
    cases: list[str]

    def read(self) -> dict[str, float]:
        """Wait for the device and return the numbers by name."""
        return dict(zip(self.names, self.values.tolist()))


class Stepper:
    """Owns the optimiser and the gradient scaler of a method.

    Args:
        method: the bare method (for its schedule).
        module: what is called: the method, compiled or wrapped in DistributedDataParallel.
        device: where it runs.
        steps: length of the run.
        grad_clip: largest gradient norm; 0 for none.
        amp: autocast on CUDA.
    """

    def __init__(
        self, method: Method, module: nn.Module, device: torch.device, steps: int, grad_clip: float, amp: bool
    ) -> None:
        self.method, self.module, self.device, self.steps = method, module, device, steps
        self.grad_clip = grad_clip if grad_clip > 0 else math.inf
        self.optimiser = method.optimiser()
        for group in self.optimiser.param_groups:
            group["initial_lr"] = float(group["lr"])
        self.parameters = [p for g in self.optimiser.param_groups for p in g["params"]]
        self.dtype = _amp_dtype(device) if amp else None
        self.scaler = torch.amp.GradScaler("cuda") if self.dtype is torch.float16 else None

    def autocast(self) -> torch.autocast:
        """The context that forwards run in; does nothing on a CPU."""
        return torch.autocast(self.device.type, dtype=self.dtype or torch.bfloat16, enabled=self.dtype is not None)

    def set_lr(self, step: int) -> float:
        """Set every group's learning rate for a step and return the first group's."""
        factor = self.method.lr_factor(step, self.steps)
        for group in self.optimiser.param_groups:
            group["lr"] = group["initial_lr"] * factor
        return self.optimiser.param_groups[0]["lr"]

    def step(self, batch: Batch, step: int, cases: list[str], stop: bool) -> tuple[Numbers, bool]:
        """Forward, backward and update.

        Args:
            batch: the method's batch.
            step: global step.
            cases: names, for error messages.
            stop: whether this rank was asked to end; shared with all ranks through the numbers.

        Returns:
            The step's numbers, and whether the optimiser did step (float16 scaling may skip one).
        """
        self.set_lr(step)
        self.optimiser.zero_grad(set_to_none=True)
        with self.autocast():
            terms = self.module(batch)
        total = terms["total"]
        if self.scaler is None:
            total.backward()
            norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.grad_clip)
            self.optimiser.step()
            stepped = True
        else:
            self.scaler.scale(total).backward()
            self.scaler.unscale_(self.optimiser)
            norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.grad_clip)
            before = self.scaler.get_scale()
            self.scaler.step(self.optimiser)
            self.scaler.update()
            stepped = self.scaler.get_scale() >= before
        values = [torch.as_tensor(v, dtype=torch.float32, device=self.device).detach() for v in terms.values()]
        values += [norm.detach().float(), torch.tensor(float(stop), device=self.device)]
        numbers = Numbers(step, [*terms, "grad_norm", "stop"], mean_over_ranks(torch.stack(values)), cases)
        return numbers, stepped

    def state_dict(self) -> dict:
        """Optimiser and scaler."""
        return {"optimiser": self.optimiser.state_dict(), "scaler": self.scaler.state_dict() if self.scaler else None}

    def load_state_dict(self, state: dict) -> None:
        """Take back what :meth:`state_dict` gave."""
        self.optimiser.load_state_dict(state["optimiser"])
        if self.scaler is not None and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])


def _amp_dtype(device: torch.device) -> torch.dtype | None:
    if device.type != "cuda":
        return None
    return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
