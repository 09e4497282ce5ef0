"""Random numbers for views that do not depend on the number of ranks, the device or what was drawn in earlier steps."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

HELD_OUT_STEP = 2**40
"""Steps from here on are those of held-out batches: no training step draws the same numbers."""


class StepRNG:
    """Random parameters for the samples of one step: a pure function of (seed, step, sample).

    Every method draws for the *global* batch on the CPU and returns the rows of this rank, so that two ranks with half
    the batch each make the same views as one process with all of it, and a GPU the same as a CPU.

    Args:
        seed: the run's seed.
        step: global step; of held-out batches :data:`HELD_OUT_STEP` and more.
        total: samples of the step over all ranks.
        first: index of this rank's first sample.
        count: samples on this rank.
        device: where the results are put.
    """

    def __init__(
        self,
        seed: int,
        step: int,
        total: int,
        first: int = 0,
        count: int | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.total, self.first = total, first
        self.count = total - first if count is None else count
        self.device = torch.device(device)
        state = np.random.SeedSequence([seed, step % 2**63, 0x5EED]).generate_state(1, np.uint64)[0]
        self._cpu = torch.Generator().manual_seed(int(state) % 2**63)

    def fork(self, total: int, first: int = 0, count: int | None = None) -> StepRNG:
        """Random numbers for another batch of the same step; a later fork of the same object has others."""
        seed = int(torch.randint(0, 2**62, (1,), generator=self._cpu))
        return StepRNG(seed, 0, total, first, count, self.device)

    def _mine(self, x: Tensor) -> Tensor:
        return x[self.first : self.first + self.count].to(self.device)

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        """``(count, *shape)`` float32, uniform in [low, high)."""
        return self._mine(torch.rand(self.total, *shape, generator=self._cpu) * (high - low) + low)

    def normal(self, *shape: int) -> Tensor:
        """``(count, *shape)`` float32, standard normal. For few numbers a sample; see :meth:`noise` for fields."""
        return self._mine(torch.randn(self.total, *shape, generator=self._cpu))

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        """``(count, *shape)`` int64, uniform in [low, high)."""
        return self._mine(torch.randint(low, high, (self.total, *shape), generator=self._cpu))

    def chance(self, p: float, *shape: int) -> Tensor:
        """``(count, *shape)`` bool, True with probability ``p``."""
        return self._mine(torch.rand(self.total, *shape, generator=self._cpu) < p)

    def generators(self) -> list[torch.Generator]:
        """One generator per sample of this rank, on :attr:`device`, for draws whose number varies between samples."""
        seeds = torch.randint(0, 2**62, (self.total,), generator=self._cpu)[self.first : self.first + self.count]
        return [torch.Generator(self.device).manual_seed(int(s)) for s in seeds]

    def noise(self, *shape: int) -> Tensor:
        """``(count, *shape)`` float32 standard normal field, drawn on :attr:`device` sample by sample."""
        out = torch.empty(self.count, *shape, device=self.device)
        for row, g in zip(out, self.generators()):
            torch.randn(*shape, generator=g, out=row)
        return out
