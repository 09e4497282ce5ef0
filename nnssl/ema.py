"""Exponential moving average of a module: the teacher of a student."""

from __future__ import annotations

import math
import weakref
from copy import deepcopy
from typing import Any

import torch
from torch import nn

from nnssl.networks.state import unwrap


def cosine_momentum(step: int, steps: int, start: float = 0.996, end: float = 1.0) -> float:
    """``mu_t = end - (end - start) (1 + cos(pi t / T)) / 2``: from ``start`` at step 0 to ``end`` at ``steps``."""
    done = min(max(step / max(1, steps), 0.0), 1.0)
    return end - (end - start) * (1.0 + math.cos(math.pi * done)) / 2.0


class EMA(nn.Module):
    """A copy of a module that follows it: ``theta <- mu theta + (1 - mu) theta_source``, once per optimiser step.

    The copy is float32 (a bfloat16 one would lose every step at ``mu`` = 0.996), without gradients, and always in eval
    mode. Each tensor is updated once, under however many names it is known. Buffers are copied.

    ``source`` is bare, or wrapped in DistributedDataParallel or torch.compile; ``module`` is the averaged copy.
    """

    def __init__(self, source: nn.Module) -> None:
        super().__init__()
        self._followed: weakref.ref[nn.Module] | None = None
        self.module = deepcopy(unwrap(source)).requires_grad_(False).eval()
        for tensor in [*self.module.parameters(), *self.module.buffers()]:
            if tensor.dtype in (torch.float16, torch.bfloat16):
                tensor.data = tensor.data.float()
        self.train()

    @torch.no_grad()
    def update(self, source: nn.Module, momentum: float) -> None:
        """Follow ``source`` by one step with ``mu`` in [0, 1]; call it after the optimiser's, and not where that was skipped.

        Raises:
            ValueError: the source has other parameters or buffers than the copy.
        """
        source = unwrap(source)
        if self._followed is None or self._followed() is not source:
            self._check(source)
            self._followed = weakref.ref(source)
        for name, buffer in source.named_buffers():
            self.module.get_buffer(name).copy_(buffer)
        averaged: list[torch.Tensor] = list(self.module.parameters())
        current = [t.detach().to(a) for a, t in zip(averaged, source.parameters())]
        torch._foreach_lerp_(averaged, current, 1.0 - momentum)

    def _check(self, source: nn.Module) -> None:
        for mine, theirs in (
            (dict(self.module.named_parameters()), dict(source.named_parameters())),
            (dict(self.module.named_buffers()), dict(source.named_buffers())),
        ):
            if mine.keys() != theirs.keys():
                raise ValueError(f"the source does not fit: {sorted(mine.keys() ^ theirs.keys())[:3]} are not in both")

    def train(self, mode: bool = True) -> EMA:
        """Stays in eval mode."""
        del mode
        return super().train(False)

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The copy's output, without gradients."""
        return self.module(*args, **kwargs)
