"""One honest sentence on each checkpoint: do its features help, beside those of random weights?"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy.stats import t as student

LEVEL = 0.95
RANDOM = "random weights"


class Difference(NamedTuple):
    """Paired over cases, in points of Dice (0 to 100): mean, and the ends of the 95 % interval (NaN with one case)."""

    mean: float
    low: float
    high: float
    cases: int


@dataclass(frozen=True, eq=False)
class Row:
    """One line of the table.

    Attributes:
        name: of the checkpoint, or ``"random weights"``.
        stages: which feature maps.
        n_decoder: decoder stages among them.
        cases: ``(cases,)`` Dice in points, mean over classes; of random weights the mean over initialisations.
        classes: ``(classes,)`` Dice in points, mean over cases.
        inits: of random weights the mean Dice of each initialisation; empty for a checkpoint.
        difference: to random weights with the same stages; None for these.
    """

    name: str
    stages: str
    n_decoder: int
    cases: np.ndarray
    classes: np.ndarray
    inits: tuple[float, ...] = ()
    difference: Difference | None = None

    @property
    def mean(self) -> float:
        """Mean over cases."""
        return nanmean(self.cases)

    @property
    def sd(self) -> float:
        """Standard deviation over cases (n - 1); NaN with fewer than two."""
        found = self.cases[np.isfinite(self.cases)]
        return float(found.std(ddof=1)) if len(found) > 1 else math.nan


def nanmean(values: np.ndarray) -> float:
    """Mean of the numbers among values; NaN without any."""
    found = values[np.isfinite(values)]
    return float(found.mean()) if len(found) else math.nan


def mean_dice(dice: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Points per case and per class of Dice ``(cases, classes)`` in 0 to 1; a class that is nowhere does not count."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return 100 * np.nanmean(dice, axis=1), 100 * np.nanmean(dice, axis=0)


def compare(ours: np.ndarray, theirs: np.ndarray) -> Difference:
    """Mean of the paired differences ``(cases,)`` and its t interval."""
    d = ours - theirs
    d = d[np.isfinite(d)]
    n = len(d)
    if n < 2:
        return Difference(float(d.mean()) if n else math.nan, math.nan, math.nan, n)
    half = float(student.ppf(0.5 + LEVEL / 2, n - 1) * d.std(ddof=1) / math.sqrt(n))
    return Difference(float(d.mean()), float(d.mean()) - half, float(d.mean()) + half, n)


def sentence(row: Row, random: Row) -> str:
    """What the probe says of one checkpoint.

    Its features help where the interval over cases lies above random weights and no random initialisation is as good.
    """
    d = row.difference
    assert d is not None  # the row of a checkpoint
    text = f"{row.name}, {row.stages}: {row.mean:.1f} against {random.mean:.1f} of random weights ({d.mean:+.1f}"
    if math.isfinite(d.low):
        text += f", 95 % over {d.cases} cases {d.low:+.1f} to {d.high:+.1f}"
    text += "): "
    if not math.isfinite(d.mean):
        return text + "nothing can be said, no case holds a class."
    if not math.isfinite(d.low):
        return text + "one case cannot tell whether its features help."
    if d.low > 0 and row.mean > max(random.inits):
        return text + "its features help."
    if d.high < 0 and row.mean < min(random.inits):
        return text + "its features are worse than those of random weights."
    if d.mean > 0:
        return text + "higher, but not clear of chance."
    return text + "no better than random weights."


def choose_sentence(rows: list[Row]) -> str | None:
    """Which of several checkpoints (with the same stages) is ahead, and whether that is clear; None with fewer than two."""
    ranked = sorted((r for r in rows if math.isfinite(r.mean)), key=lambda r: -r.mean)
    if len(ranked) < 2:
        return None
    first, second = ranked[:2]
    d = compare(first.cases, second.cases)
    lead = f"{first.name} is ahead of {second.name} by {d.mean:.1f}"
    if math.isfinite(d.low) and d.low > 0:
        return f"{lead} (95 % {d.low:+.1f} to {d.high:+.1f}): take it first."
    return f"{lead}, which {d.cases} case{'s' * (d.cases > 1)} cannot tell from chance."
