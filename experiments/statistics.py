"""The statistics of a label-efficiency table, as pure functions; Dice values are fractions or percent as the caller likes.

The scores of a cell are a series indexed by ``seed``, ``case`` and ``label``; NaN where there is no value. Their mean is
nnU-Net's, seed by seed: the mean over cases of each label without the NaN (a case whose reference and prediction are both
empty has no Dice), then the mean over labels; and then the mean over seeds. What the numbers can and cannot say is in
docs/label-efficiency.md.

Sources: Efron and Tibshirani, *An Introduction to the Bootstrap*, 1993, chapter 13 (percentile interval); Wilcoxon 1945,
signed ranks, by scipy; Holm, *A simple sequentially rejective multiple test procedure*, 1979.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

RESAMPLES = 10_000
LEVEL = 0.95


def seed_means(scores: pd.Series) -> pd.Series:
    """The mean of each seed: label by label over the cases, then over the labels. A label without any value is left out."""
    return scores.groupby(["seed", "label"]).mean().groupby("seed").mean()


def case_weights(cases: Sequence[str], resamples: int = RESAMPLES, seed: int = 0) -> pd.DataFrame:
    """How often each case (column) is drawn in each bootstrap sample (row); rows sum to the number of cases.

    Cases are drawn, and every seed keeps its place: the same cases are drawn for all seeds and for both methods, since a case
    that is hard under one seed is hard under the others. To draw (seed, case) pairs as if they were independent would give
    intervals that are too narrow.
    """
    share = np.full(len(cases), 1.0 / len(cases))
    drawn = np.random.default_rng(seed).multinomial(len(cases), share, size=resamples)
    return pd.DataFrame(drawn.astype(float), columns=list(cases))


def weighted_mean(scores: pd.Series, weights: pd.DataFrame) -> np.ndarray:
    """The mean of a cell in each bootstrap sample: per seed and label the weighted mean over cases, then the means over labels
    and over seeds."""
    wide = scores.unstack(["seed", "label"]).reindex(weights.columns)
    total = weights.to_numpy() @ wide.fillna(0.0).to_numpy()
    count = weights.to_numpy() @ wide.notna().to_numpy(dtype=float)
    means = np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)
    return pd.DataFrame(means.T, index=wide.columns).groupby(level="seed").mean().mean().to_numpy()


def interval(replicates: np.ndarray, level: float = LEVEL) -> tuple[float, float]:
    """Percentile interval of bootstrap replicates; they may be infinite (nothing is interpolated), NaN are left out."""
    there = np.sort(replicates[~np.isnan(replicates)])
    if there.size == 0:
        return math.nan, math.nan
    tail = (1.0 - level) / 2.0
    low, high = math.floor(tail * (there.size - 1)), math.ceil((1.0 - tail) * (there.size - 1))
    return float(there[low]), float(there[high])


def paired_differences(scores: pd.Series, baseline: pd.Series) -> pd.Series:
    """One difference per case: the mean over the seeds and labels with a value in both; cases without any are left out."""
    return (scores - baseline).groupby("case").mean().dropna()


def wilcoxon_p(differences: pd.Series) -> float:
    """Two-sided p of the Wilcoxon signed-rank test; cases without a difference are left out, 1.0 where all are, NaN without
    cases.

    The exact distribution is used for up to 50 cases without ties, by scipy's choice, else the normal approximation.
    """
    if not np.any(differences):
        return 1.0 if len(differences) else math.nan
    from scipy.stats import wilcoxon

    return float(wilcoxon(differences[differences != 0]).pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p values, in the order given. NaN are no tests: they stay NaN and do not count.

    The k-th smallest of m (k from 0) is multiplied by ``m - k``; none is smaller than the one before it, none exceeds 1.
    """
    order = sorted((i for i, p in enumerate(p_values) if not math.isnan(p)), key=lambda i: p_values[i])
    adjusted, least = [math.nan] * len(p_values), 0.0
    for k, i in enumerate(order):
        least = max(least, min(1.0, (len(order) - k) * p_values[i]))
        adjusted[i] = least
    return adjusted


@dataclass(frozen=True)
class Factor:
    """A number; with the bound ``">"`` or ``"<"`` it lies beyond ``value``, out of what was measured."""

    value: float
    bound: str = ""

    def __str__(self) -> str:
        return "" if math.isnan(self.value) else f"{self.bound}{self.value:.6g}"


def labels_needed(counts: Sequence[float], dice: Sequence[float], target: float) -> Factor:
    """With how many labels a curve first reaches ``target``: where the line through its points, in log labels, first does.

    Where the curve falls, the earlier, higher value holds (a running maximum), which errs towards few labels, on the side of the
    curve. Beyond the counts measured: the last with ``">"`` or the first with ``"<"``; NaN without points or target.
    """
    points = [(math.log(n), d) for n, d in zip(counts, dice, strict=True) if not math.isnan(d)]
    if not points or math.isnan(target):
        return Factor(math.nan)
    x, y = np.array([p[0] for p in points]), np.maximum.accumulate([p[1] for p in points])
    if target > y[-1]:
        return Factor(math.exp(x[-1]), ">")
    if target < y[0]:
        return Factor(math.exp(x[0]), "<")
    i = int(np.argmax(y >= target))
    if i == 0:
        return Factor(math.exp(x[0]))
    share = (target - y[i - 1]) / (y[i] - y[i - 1])
    return Factor(math.exp(x[i - 1] + share * (x[i] - x[i - 1])))


def first_reached(curve: Sequence[float] | np.ndarray, target: float, window: int = 1) -> int | None:
    """Number of epochs (from 1) after which the mean of the last ``window`` values first reaches ``target``; None where it
    never does.

    NaN are left out of the means; a window that is not full yet does not count.
    """
    means = pd.Series(curve, dtype=float).rolling(window, min_periods=1).mean().to_numpy()
    reached = np.flatnonzero(means[window - 1 :] >= target)
    return int(reached[0]) + window if reached.size else None
