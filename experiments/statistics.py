"""The statistics of a label-efficiency table, as pure functions of arrays; Dice values are fractions or percent as the caller
likes.

A score array has the shape ``(S, C, L)``: seeds, cases, labels; NaN where there is no value. Its mean is nnU-Net's, seed by
seed: the mean over cases of each label without the NaN (a case whose reference and prediction are both empty has no Dice),
then the mean over labels; and then the mean over seeds. What the numbers can and cannot say is in
docs/label-efficiency.md.

Sources: Efron and Tibshirani, *An Introduction to the Bootstrap*, 1993, chapter 13 (percentile interval); Wilcoxon 1945,
signed ranks, by scipy; Holm, *A simple sequentially rejective multiple test procedure*, 1979.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 10_000
LEVEL = 0.95


def _nanmean(values: np.ndarray, axis: int) -> np.ndarray:
    """``np.nanmean`` without a warning where there is nothing to average: NaN."""
    count = np.sum(~np.isnan(values), axis=axis)
    total = np.nansum(values, axis=axis)
    return np.divide(total, count, out=np.full(np.shape(total), np.nan), where=count > 0)


def seed_means(scores: np.ndarray, label: int | None = None) -> np.ndarray:
    """Mean of each seed, ``(S,)``.

    Args:
        scores: ``(S, C, L)``.
        label: index of one label; None: the mean over labels of the means over cases. A label without any value is left out.
    """
    per_label = _nanmean(scores, 1)
    return per_label[:, label] if label is not None else _nanmean(per_label, 1)


def mean_and_sd(values: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """Mean and sample standard deviation (n - 1) of the values that are not NaN; the deviation of fewer than two is NaN."""
    there = np.asarray(values, dtype=float)
    there = there[~np.isnan(there)]
    if there.size == 0:
        return math.nan, math.nan
    return float(there.mean()), float(there.std(ddof=1)) if there.size > 1 else math.nan


def case_weights(cases: int, resamples: int = RESAMPLES, seed: int = 0) -> np.ndarray:
    """How often each case is drawn in each bootstrap sample: ``(resamples, cases)``, rows sum to ``cases``.

    Cases are drawn, and every seed keeps its place: the same cases are drawn for all seeds and for both methods, since a case
    that is hard under one seed is hard under the others. To draw (seed, case) pairs as if they were independent would give
    intervals that are too narrow.
    """
    generator = np.random.default_rng(seed)
    return generator.multinomial(cases, np.full(cases, 1.0 / cases), size=resamples).astype(float)


def weighted_mean(scores: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The mean of a score array under each row of case weights.

    Args:
        scores: ``(S, C, L)``.
        weights: ``(R, C)``, from :func:`case_weights`.

    Returns:
        ``(R,)``: per seed and label the weighted mean over cases, then the means over labels and over seeds.
    """
    seeds, cases, labels = scores.shape
    flat = scores.transpose(1, 0, 2).reshape(cases, seeds * labels)
    there = ~np.isnan(flat)
    total, count = weights @ np.where(there, flat, 0.0), weights @ there.astype(float)
    per_label = np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)
    return _nanmean(_nanmean(per_label.reshape(-1, seeds, labels), 2), 1)


def interval(replicates: np.ndarray, level: float = LEVEL) -> tuple[float, float]:
    """Percentile interval of bootstrap replicates; they may be infinite (nothing is interpolated), NaN are left out."""
    there = np.sort(replicates[~np.isnan(replicates)])
    if there.size == 0:
        return math.nan, math.nan
    tail = (1.0 - level) / 2.0
    low, high = math.floor(tail * (there.size - 1)), math.ceil((1.0 - tail) * (there.size - 1))
    return float(there[low]), float(there[high])


def paired_differences(scores: np.ndarray, baseline: np.ndarray) -> np.ndarray:
    """One difference per case: the mean over the seeds and labels that have a value in both arrays.

    Args:
        scores, baseline: ``(S, C, L)``, the same seeds, cases and labels.

    Returns:
        ``(C',)`` with ``C' <= C``: cases without any such pair are left out.
    """
    seeds, cases, labels = scores.shape
    difference = (scores - baseline).transpose(1, 0, 2).reshape(cases, seeds * labels)
    per_case = _nanmean(difference, 1)
    return per_case[~np.isnan(per_case)]


def wilcoxon_p(differences: np.ndarray) -> float:
    """Two-sided p of the Wilcoxon signed-rank test; cases without a difference are left out, 1.0 where all are, NaN without
    cases.

    The exact distribution is used for up to 50 cases without ties, by scipy's choice, else the normal approximation.
    """
    if differences.size == 0:
        return math.nan
    if not np.any(differences):
        return 1.0
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
    """A number that may lie beyond what was measured.

    Attributes:
        value: the number, or the bound.
        bound: ``""`` where it was reached, ``">"`` or ``"<"`` where it lies beyond ``value``.
    """

    value: float
    bound: str = ""

    def __str__(self) -> str:
        return f"{self.bound}{self.value:.1f}x" if not math.isnan(self.value) else "–"


def labels_needed(counts: Sequence[float], dice: Sequence[float], target: float) -> Factor:
    """With how many labels a curve first reaches ``target``: where the line through its points, in log labels, first does.

    Args:
        counts: numbers of labelled cases, ascending and positive.
        dice: the curve's Dice at each. NaN are left out. Where it falls, the earlier, higher value holds (a running maximum),
            which errs towards few labels, that is, on the side of the curve.
        target: Dice to reach.

    Returns:
        The number; beyond the counts measured, the last with ``">"`` or the first with ``"<"``; NaN without points or target.
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
    values = np.asarray(curve, dtype=float)
    for end in range(window, len(values) + 1):
        piece = values[end - window : end]
        piece = piece[~np.isnan(piece)]
        if piece.size and piece.mean() >= target:
            return end
    return None
