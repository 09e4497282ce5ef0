"""Stop a pretraining, or remember its best checkpoint, by the robustness loss of that one run.

The published text's own online rule is not known to us; this one is stated in docs/transferability.md, together with what
it costs on the public figures. It is off by default.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from nnssl.errors import NnsslError


@dataclass
class Stopper:
    """Keeps the lowest loss after warm-up; asks to stop after ``patience`` evaluations without improvement.

    The first epoch (0, before any training) is recorded but never a candidate. A value that is not finite is recorded
    as a failure and neither improves nor counts against the patience. Ties keep the earlier epoch.
    """

    patience: int = 5  # evaluations, not epochs, without improvement before the stop
    warmup: int = 0  # first epoch that may be chosen
    min_delta: float = 0.0  # by how much a loss must fall to be an improvement
    allow_epoch0: bool = False  # let epoch 0 be a candidate (for simulations on recorded traces)
    best: float = math.inf  # lowest loss of a candidate so far
    best_epoch: int | None = None
    bad: int = 0  # evaluations since the best one
    stopped: int | None = None  # epoch at which the rule asked to stop
    failures: list[int] = field(default_factory=list)  # epochs whose loss was not finite

    def __post_init__(self) -> None:
        if self.patience < 1:
            raise NnsslError(f"the patience must be at least 1 evaluation, got {self.patience}.")
        if self.warmup < 0 or self.min_delta < 0:
            raise NnsslError(f"warm-up and min_delta cannot be negative, got {self.warmup} and {self.min_delta}.")

    def update(self, epoch: int, loss: float) -> bool:
        """Take in the robustness loss after ``epoch`` epochs; returns whether it is the best candidate so far, to be saved."""
        if not math.isfinite(loss):
            self.failures.append(epoch)
            return False
        if epoch < self.warmup or (epoch == 0 and not self.allow_epoch0):
            return False
        if loss < self.best - self.min_delta:
            self.best, self.best_epoch, self.bad = loss, epoch, 0
            return True
        self.bad += 1
        if self.bad >= self.patience and self.stopped is None:
            self.stopped = epoch
        return False

    @property
    def stop(self) -> bool:
        """Whether the rule has asked to stop."""
        return self.stopped is not None

    def state_dict(self) -> dict[str, Any]:
        """Everything, as plain numbers and lists that a weights-only checkpoint can hold."""
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where :meth:`state_dict` was taken, settings included, so that a resumed run decides the same."""
        vars(self).update(vars(Stopper(**state)))
