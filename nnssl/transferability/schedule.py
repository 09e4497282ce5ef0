"""How many crops and how often, so that the trace costs a small share of a run."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

from nnssl.errors import NnsslError

BUDGET = 0.03
"""Share of a run's time."""
RANDOM_INITS = 5
MOST_CROPS, FEWEST_CROPS, ENOUGH_CROPS = 64, 8, 16
FEWEST_EVALUATIONS = 3
EARLY = (1, 2, 5, 10, 20)


@dataclass(frozen=True)
class Schedule:
    """When to measure.

    Attributes:
        epochs: length of the run.
        every: epochs between two evaluations.
        crops: held-out crops, one per case.
        early: further epochs at the beginning, where the trace moves fastest.
        share: estimated share of the run's time, the random initialisations included.
    """

    epochs: int
    every: int
    crops: int
    early: tuple[int, ...] = ()
    share: float = 0.0

    def due(self, epoch: int) -> bool:
        """Whether to measure after ``epoch`` epochs; always at 0 and at the end."""
        return epoch in (0, self.epochs) or epoch % self.every == 0 or epoch in self.early

    @property
    def evaluations(self) -> int:
        """Number of evaluations of the whole run, random initialisations not counted."""
        return sum(self.due(e) for e in range(self.epochs + 1))

    def slowed(self, factor: float) -> Schedule:
        """The same with ``factor`` times as many epochs between evaluations and no early ones."""
        return replace(self, every=max(self.every + 1, math.ceil(self.every * factor)), early=())

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "early": list(self.early)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Schedule:
        """Undo :meth:`to_dict`."""
        return cls(**{**values, "early": tuple(values["early"])})


def plan_schedule(epochs: int, crops_per_epoch: float, available: int, *, every: int | None = None) -> Schedule | None:
    """Choose crops and interval that take :data:`BUDGET` of the time, counted in voxels: the same on every machine.

    A trained crop is counted as three forward passes of the encoder (forward and backward of one view; most methods do more),
    a measured one as two (its two views). None where there are fewer than two cases or, without ``every``, where the run is too
    short for three evaluations of 8 crops and the random initialisations.

    Args:
        epochs, crops_per_epoch: length of the run; crops trained per epoch, in units of a measured crop's voxels.
        available: held-out cases.
        every: the user's interval; None to choose it.
    """
    if every is not None and every < 1:
        raise NnsslError(f"--robustness-every must be at least 1 epoch (0 turns it off), got {every}.")
    if available < 2:
        return None
    affordable = BUDGET * 3 * crops_per_epoch * epochs / 2

    def cost(s: Schedule) -> int:
        return s.crops * (s.evaluations + RANDOM_INITS)

    def rated(s: Schedule) -> Schedule:
        return replace(s, share=BUDGET * cost(s) / affordable if affordable > 0 else math.inf)

    most = min(MOST_CROPS, available) // 2 * 2
    sizes = sorted({most, *(n for n in (48, 32, 24, ENOUGH_CROPS, 12, FEWEST_CROPS) if n < most)}, reverse=True)
    if every is not None:
        fits = [n for n in sizes if cost(Schedule(epochs, every, n)) <= affordable]
        return rated(Schedule(epochs, every, max([*fits, min(most, ENOUGH_CROPS)])))
    usual = max(5, math.ceil(epochs / 50))
    for n in sizes:
        full = Schedule(epochs, usual, n, tuple(e for e in EARLY if e < epochs))
        if n >= min(ENOUGH_CROPS, most) and cost(full) <= affordable:
            return rated(full)
    for n in sizes:
        if n > ENOUGH_CROPS:
            continue
        count = int(affordable / n) - RANDOM_INITS  # evaluations that can be paid for
        if count >= FEWEST_EVALUATIONS:
            interval = max(1, math.ceil(epochs / (count - 1)))
            return rated(Schedule(epochs, interval, n))
    return None
