"""Two stages of a training, each with a warm-up and a decay of its own: labels alone until they are learnt, then the pool too.

With one schedule over both, the network enters the second stage half trained, and the rate is low when
pseudo-labels begin.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["Stages", "warmup_cosine"]


def warmup_cosine(step: int, steps: int, warmup: float = 0.05) -> float:
    """Factor on the peak learning rate: a linear rise times a cosine decay to 0, a pure function of the step.

    ``min(1, (i + 1) / (w S)) (1 + cos(pi i / S)) / 2`` for step i of S, with the share w of warm-up; never 0 at the first step.

    Args:
        step: from 0.
        steps: of the whole stage, at least 1.
        warmup: share of the steps in [0, 1) over which the rate rises.
    """
    rise = min(1.0, (step + 1) / (warmup * steps)) if warmup > 0 else 1.0
    return rise * 0.5 * (1.0 + math.cos(math.pi * min(step, steps) / steps))


@dataclass(frozen=True)
class Stages:
    """Where the first stage ends.

    Attributes:
        first: length of the first stage, in whatever is counted (steps, epochs).
        total: length of both.
    """

    first: int
    total: int

    @classmethod
    def split(cls, total: int, share: float) -> Stages:
        """Stages of ``total`` units of which ``share`` belong to the first: at least one to each where there are two.

        Args:
            total: at least 1.
            share: in [0, 1]; 1 leaves no second stage, 0 no first.
        """
        if share >= 1 or total < 2:
            return cls(total, total)
        if share <= 0:
            return cls(0, total)
        return cls(min(total - 1, max(1, round(share * total))), total)

    def second(self, at: int) -> bool:
        """Whether ``at``, counted from 0, lies in the second stage."""
        return at >= self.first

    def begins_second(self, at: int) -> bool:
        """Whether ``at`` is the first of a second stage that follows a first one."""
        return 0 < at == self.first < self.total

    def within(self, at: int) -> tuple[int, int]:
        """``(position in the stage, length of the stage)`` of ``at``."""
        return (at - self.first, self.total - self.first) if self.second(at) else (at, self.first)

    def factor(self, at: int, warmup: float = 0.05) -> float:
        """:func:`warmup_cosine` within the stage of ``at``."""
        step, steps = self.within(at)
        return warmup_cosine(step, max(1, steps), warmup)
