"""Did pretraining beat a random initialisation, as far as robustness can tell?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

FEW_CASES = 16
"""Below this many cases a measurement is mostly noise: it is said, and nothing is stopped."""

_RESAMPLES = 2000


@dataclass(frozen=True)
class Baseline:
    """Robustness of K random initialisations of the same network on the same crops."""

    losses: tuple[float, ...]
    per_crop: tuple[tuple[float, ...], ...] = ()  # mean hinge per crop, K x N; empty where it is not known

    @property
    def mean(self) -> float:
        """Mean loss over the finite initialisations; NaN without any."""
        finite = [v for v in self.losses if math.isfinite(v)]
        return float(np.mean(finite)) if finite else math.nan

    @property
    def sd(self) -> float:
        """Their sample standard deviation; 0 for fewer than two."""
        finite = [v for v in self.losses if math.isfinite(v)]
        return float(np.std(finite, ddof=1)) if len(finite) > 1 else 0.0

    def plot(self, ax: Any, label: str) -> None:
        """Draw mean and band (mean +- 2 SD) into a matplotlib axis; nothing where there is no mean."""
        if math.isfinite(self.mean):
            ax.axhspan(self.mean - 2 * self.sd, self.mean + 2 * self.sd, color="0.85", label=label)
            ax.axhline(self.mean, color="0.6", linewidth=1)

    def to_dict(self) -> dict[str, Any]:
        """Plain lists."""
        return {"losses": list(self.losses), "per_crop": [list(row) for row in self.per_crop]}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Baseline:
        """Undo :meth:`to_dict`."""
        return cls(tuple(values["losses"]), tuple(tuple(row) for row in values["per_crop"]))


@dataclass(frozen=True)
class Verdict:
    """The comparison of a run's best evaluation with random initialisations."""

    kind: str  # pretraining_supported, no_evidence, worse_than_init or unknown
    gain: float  # mean of the initialisations minus the best loss; positive is good
    z: float  # gain in standard deviations of the initialisations
    low: float  # 95 % bootstrap interval of the gain over cases, paired
    high: float
    sentence: str


def judge(
    baseline: Baseline, loss: float, per_crop: Sequence[float], *, epoch: int, seed: int = 0, coupled: bool = False
) -> Verdict:
    """Compare the best evaluation of a run with random initialisations.

    ``pretraining_supported`` where the gain exceeds two standard deviations of the initialisations and the interval over cases
    excludes zero; ``worse_than_init`` where the loss is two standard deviations above them; else ``no_evidence``.

    Args:
        baseline: the random initialisations.
        loss, per_crop, epoch: of the run's best evaluation.
        seed: of the bootstrap.
        coupled: whether the run's objective optimises a quantity of this kind.
    """
    mean, sd = baseline.mean, baseline.sd
    if not (math.isfinite(mean) and math.isfinite(loss)):
        text = "Robustness says nothing: the representations of the network or of all random initialisations are degenerate."
        return Verdict("unknown", math.nan, math.nan, math.nan, math.nan, text)
    gain = mean - loss
    low, high = _interval(baseline, per_crop, seed)
    z = gain / max(sd, 1e-12)
    k, n = len(baseline.losses), len(per_crop)
    facts = (
        f"robustness loss {loss:.3f} after epoch {epoch}, {mean:.3f} (SD {sd:.3f}) for {k} random initialisations; "
        f"gain {gain:+.3f}, 95 % interval over {n} crops {low:+.3f} to {high:+.3f}"
    )
    if gain > 2 * sd and low > 0:
        kind, text = "pretraining_supported", f"Robustness supports this pretraining: {facts}."
    elif loss > mean + 2 * sd:
        kind = "worse_than_init"
        text = f"Robustness is worse than without pretraining: {facts}. Fine-tune from scratch too and compare."
    else:
        kind = "no_evidence"
        text = f"Robustness gives no evidence that this pretraining helps: {facts}. Fine-tune from scratch too and compare."
    if n < FEW_CASES:
        text += f" {n} cases are few: this is mostly noise."
    if coupled:
        text += " This objective lowers a quantity of this kind by construction, so it says little here."
    return Verdict(kind, gain, z, low, high, text + " An indicator within this run, no proof.")


def _interval(baseline: Baseline, per_crop: Sequence[float], seed: int) -> tuple[float, float]:
    rows = [row for row in baseline.per_crop if len(row) == len(per_crop)]
    if not rows or len(per_crop) < 2:
        return math.nan, math.nan
    difference = np.mean(rows, axis=0) - np.asarray(per_crop)
    rng = np.random.default_rng(seed)
    means = difference[rng.integers(0, len(difference), (_RESAMPLES, len(difference)))].mean(axis=1)
    low, high = np.percentile(means, (2.5, 97.5))
    return float(low), float(high)
