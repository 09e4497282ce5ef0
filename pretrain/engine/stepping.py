"""One optimiser step: autocast, scaling, clipping, the learning rate, and numbers that are read one step later."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from nnssl.amp import amp_dtype, wrong_in_bfloat16
from nnssl.distributed import mean_over_ranks, rank, world_size
from nnssl.pretrain.augment import StepRNG
from nnssl.pretrain.engine.speed import use_implementation
from nnssl.pretrain.methods.base import Method
from nnssl.pretrain.types import Batch, Crops

if TYPE_CHECKING:
    from nnssl.pretrain.engine.spec import RunSpec

log = logging.getLogger("nnssl")


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


def views_in_parts(
    method: Method, crops: Crops, parts: int, device: torch.device, seed: int, step: int
) -> Iterator[Batch]:
    """The views of this rank's crops of a step, micro-batch by micro-batch; the same however many micro-batches there are."""
    n = len(crops)
    total, first, count = n * world_size(), rank() * n, n // parts
    for begin in range(0, n, count):
        part = crops if parts == 1 else crops.part(begin, count)
        with torch.no_grad():
            batch = method.views(part, StepRNG(seed, step, total, first + begin, count, device))
        yield batch


class Stepper:
    """Owns the optimiser and the gradient scaler of a method.

    Args:
        method: the bare method (for its schedule).
        module: what is called: the method, compiled or wrapped in DistributedDataParallel.
        device: where it runs.
        steps: length of the run.
        grad_clip: largest gradient norm; 0 for none.
        amp: autocast where the device computes faster in a narrower type, see :func:`nnssl.amp.amp_dtype`.
        implementation: of the optimiser, see :func:`~nnssl.pretrain.engine.speed.use_implementation`.
    """

    def __init__(
        self,
        method: Method,
        module: nn.Module,
        device: torch.device,
        steps: int,
        grad_clip: float,
        amp: bool,
        implementation: str = "auto",
    ) -> None:
        self.method, self.module, self.device, self.steps = method, module, device, steps
        self.grad_clip = grad_clip if grad_clip > 0 else math.inf
        self.optimiser, self.implementation = method.optimiser(), implementation
        use_implementation(self.optimiser, implementation)
        for group in self.optimiser.param_groups:
            group["initial_lr"] = float(group["lr"])
        self.parameters = [p for g in self.optimiser.param_groups for p in g["params"]]
        self.dtype = amp_dtype(device) if amp else None
        self.scaler = torch.amp.GradScaler("cuda") if self.dtype is torch.float16 else None
        self._tried = device.type != "cpu"

    @classmethod
    def of(cls, spec: RunSpec, method: Method, module: nn.Module) -> Stepper:
        """As the options of a run say."""
        options = spec.engine
        clip = method.grad_clip if options.grad_clip is None else options.grad_clip
        implementation = options.optimizer_implementation
        return cls(method, module, spec.device, spec.steps, clip, options.amp, implementation)

    def autocast(self) -> torch.autocast:
        """The context that forwards run in; does nothing where all is float32."""
        return torch.autocast(self.device.type, dtype=self.dtype or torch.bfloat16, enabled=self.dtype is not None)

    @property
    def precision(self) -> str:
        """``"float32"``, or the narrower type that forward passes run in."""
        return str(self.dtype or torch.float32).removeprefix("torch.")

    def step(
        self, batch: Batch | Iterator[Batch], step: int, cases: list[str], stop: bool, parts: int = 1
    ) -> tuple[Numbers, bool]:
        """Forward, backward and update.

        Args:
            batch: the method's batch, or its ``parts`` micro-batches, each used up before the next is asked for. The loss of a
                step is the mean of theirs.
            step: global step.
            cases: names, for error messages.
            stop: whether this rank was asked to end; shared with all ranks through the numbers.
            parts: number of micro-batches.

        Returns:
            The step's numbers, and whether the optimiser did step (float16 scaling may skip one).
        """
        factor = self.method.lr_factor(step, self.steps)
        for group in self.optimiser.param_groups:
            group["lr"] = group["initial_lr"] * factor
        if self.method.restarts(step, self.steps):
            self.optimiser.state.clear()
        self.optimiser.zero_grad(set_to_none=True)
        terms = self._backward(batch if isinstance(batch, Iterator) else iter([batch]), parts)
        if self.scaler is not None:
            self.scaler.unscale_(self.optimiser)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.grad_clip)
        stepped = True
        if self.scaler is None:
            self.optimiser.step()
        else:
            before = self.scaler.get_scale()
            self.scaler.step(self.optimiser)
            self.scaler.update()
            stepped = self.scaler.get_scale() >= before
        values = list(terms.values())
        values += [norm.detach().float(), torch.tensor(float(stop), device=self.device)]
        numbers = Numbers(step, [*terms, "grad_norm", "stop"], mean_over_ranks(torch.stack(values)), cases)
        return numbers, stepped

    def _try_bfloat16(self, batch: Batch) -> None:
        """Before the first step on a CPU: float32, where a convolution would be wrong in bfloat16."""
        self._tried = True
        if self.dtype is not torch.bfloat16:
            return
        wrong = wrong_in_bfloat16(self.method, lambda method: method(batch))
        if float(mean_over_ranks(torch.tensor([float(len(wrong))]))[0]) > 0:  # all ranks alike
            self.dtype = None
            log.warning(
                "The run goes on in float32: torch %s computes %s wrongly in bfloat16 on this processor.",
                torch.__version__,
                f"'{wrong[0]}'" if wrong else "convolutions of another rank",
            )

    def _backward(self, batches: Iterator[Any], parts: int) -> dict[str, Tensor]:
        """Gradients of all micro-batches, and the means of their terms."""
        means: dict[str, Tensor] = {}
        for part, batch in enumerate(batches):
            if not self._tried:
                self._try_bfloat16(batch)
            module: Any = self.module
            alone = part + 1 < parts and isinstance(module, nn.parallel.DistributedDataParallel)
            with module.no_sync() if alone else contextlib.nullcontext():  # ranks exchange gradients once a step
                with self.autocast():
                    terms = module(batch)
                total = terms["total"] if parts == 1 else terms["total"] / parts
                (total if self.scaler is None else self.scaler.scale(total)).backward()
            for key, value in terms.items():
                value = torch.as_tensor(value, dtype=torch.float32, device=self.device).detach()
                means[key] = value if parts == 1 else means.get(key, torch.zeros_like(value)) + value / parts
        return means

    def state_dict(self) -> dict:
        """Optimiser and scaler."""
        scaler = self.scaler.state_dict() if self.scaler else None
        return {"optimiser": self.optimiser.state_dict(), "scaler": scaler, "precision": self.precision}

    def load_state_dict(self, state: dict) -> None:
        """Take back what :meth:`state_dict` gave; on a CPU a run goes on in the precision that it began in."""
        began = state.get("precision", "float32")  # runs on a CPU were in float32 before this was saved
        if self.device.type == "cpu" and began != self.precision:
            log.info("The run goes on in %s, as it began; this process would choose %s.", began, self.precision)
            self.dtype = None if began == "float32" else getattr(torch, began)
        self.optimiser.load_state_dict(state["optimiser"])
        use_implementation(self.optimiser, self.implementation)
        if self.scaler is not None and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
