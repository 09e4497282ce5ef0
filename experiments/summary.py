"""From scores and training curves to the rows of the table: means, gains over ``scratch`` with their tests, labels and epochs
saved."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from nnssl.experiments import statistics as st
from nnssl.experiments.scores import METRICS, Key, Scores, number, parse_labels

MEAN = "mean"
SAVING_RESAMPLES = 2_000
ALPHA = 0.05


@dataclass(frozen=True)
class Gain:
    """A method against ``scratch`` with the same number of labels, on the seeds and cases that both have.

    Attributes:
        mean, sd: of the gains of the seeds, Dice in 0..1; their sample deviation is NaN for one seed.
        low, high: bootstrap interval over cases, 95 %, for these seeds.
        p, p_holm: Wilcoxon signed-rank over cases, and adjusted for all comparisons of the experiment.
        seeds, cases: how many were compared. seeds_better, cases_better: in how many the method is above scratch.
    """

    mean: float
    sd: float
    low: float
    high: float
    p: float
    p_holm: float
    seeds: int
    cases: int
    seeds_better: int
    cases_better: int


@dataclass(frozen=True)
class LabelFactor:
    """How many labels ``scratch`` needs for a method's Dice, ``needed``, divided by those the method had, ``factor``; 95 %
    interval."""

    needed: st.Factor
    factor: st.Factor
    low: st.Factor
    high: st.Factor


@dataclass(frozen=True)
class EpochsToMatch:
    """Epochs after which the training curve reaches the Dice that ``scratch`` ends with.

    Attributes:
        target: scratch's final pseudo Dice. own, scratch: epochs; None where it is not reached. epochs: length of the method's
            runs.
        window: epochs in the running mean.
    """

    target: float
    own: int | None
    scratch: int | None
    epochs: int
    window: int


@dataclass(frozen=True)
class Row:
    """One cell of the experiment.

    Attributes:
        values: metric -> label name, or ``"mean"`` -> (mean, standard deviation) over seeds; Dice in 0..1, HD95 in mm.
        done, wanted: seeds that are complete, and asked for.
        gain, saving, speed: None for ``scratch``, and where nothing can be compared yet.
        events: see :class:`nnssl.experiments.scores.Scores`.
    """

    key: Key
    values: dict[str, dict[str, tuple[float, float]]]
    done: int
    wanted: int
    gain: Gain | None = None
    saving: LabelFactor | None = None
    speed: EpochsToMatch | None = None
    events: dict[str, int] = field(default_factory=dict)

    @property
    def dice(self) -> tuple[float, float]:
        """Mean and deviation over seeds of the Dice averaged over labels; NaN where there is none."""
        return self.values.get("dice", {}).get(MEAN, (math.nan, math.nan))


Curves = dict[Key, dict[str, np.ndarray]]


def verdict(gain: Gain) -> str:
    """``better``, ``worse``, ``unclear`` or ``one seed``.

    Better (worse): the interval lies above (below) zero, the adjusted p is below 0.05 and all seeds, at least two, agree.
    """
    if math.isnan(gain.low) or math.isnan(gain.mean):
        return "unclear"
    sign = (gain.low > 0) - (gain.high < 0)
    if sign == 0 or not gain.p_holm < ALPHA:
        return "unclear"
    if gain.seeds < 2:
        return "one seed"
    agree = gain.seeds_better == gain.seeds if sign > 0 else gain.seeds_better == 0
    return ("better" if sign > 0 else "worse") if agree else "unclear"


def read_curves(rows: Sequence[dict[str, str]], setting: str = "") -> Curves:
    """Training curves from the lines of ``runs.csv``: per cell and column ``(R, E)``, runs (seed and fold) and epochs; NaN:
    missing.

    Args:
        rows: lines by column; one without an epoch or with broken numbers (a run that was killed) is left out.
        setting: of the lines that name none.
    """
    runs: dict[Key, dict[tuple[str, str], dict[int, dict[str, float]]]] = {}
    for row in rows:
        key = Key((row.get("setting") or setting).strip(), row["method"].strip(), parse_labels(row["labels"]))
        try:
            values = {c: number(row.get(c)) for c in ("pseudo_dice", "train_loss", "val_loss", "minutes")}
            epoch = int(float(row["epoch"]))
        except ValueError:
            continue
        runs.setdefault(key, {}).setdefault((row["seed"], row.get("fold") or "0"), {})[epoch] = values
    out: Curves = {}
    first = min((e for by_run in runs.values() for run in by_run.values() for e in run), default=0)
    for key, by_run in runs.items():
        length = max(max(run) for run in by_run.values()) - first + 1
        for column in ("pseudo_dice", "train_loss", "val_loss", "minutes"):
            array = np.full((len(by_run), length), math.nan)
            for r, run in enumerate(by_run.values()):
                for epoch, values in run.items():
                    array[r, epoch - first] = values[column]
            out.setdefault(key, {})[column] = array
    return out


def mean_curve(curves: np.ndarray) -> np.ndarray:
    """Mean over runs, ``(R, E)`` to ``(E,)``, up to the last epoch that every run has reached."""
    reached = [int(np.flatnonzero(~np.isnan(run)).max(initial=-1)) + 1 for run in curves]
    return st._nanmean(curves[:, : min(reached)], 0)


def _speed(key: Key, base: Key, curves: Curves) -> EpochsToMatch | None:
    if key == base or key not in curves or base not in curves:
        return None
    own, scratch = mean_curve(curves[key]["pseudo_dice"]), mean_curve(curves[base]["pseudo_dice"])
    length = curves[base]["pseudo_dice"].shape[1]
    if len(scratch) < length or not len(own):
        return None
    window = max(1, round(length / 20))
    target = float(np.nanmean(scratch[-window:])) if not np.isnan(scratch[-window:]).all() else math.nan
    if math.isnan(target):
        return None
    reached = st.first_reached(own, target, window), st.first_reached(scratch, target, window)
    return EpochsToMatch(target, reached[0], reached[1], len(own), window)


def _gain(scores: Scores, key: Key, weights: np.ndarray) -> Gain | None:
    base = scores.baseline(key)
    if key == base or key not in scores.arrays or base not in scores.arrays:
        return None
    both = (scores.present[key] & scores.present[base])[:, :, None]
    if not both.any():
        return None
    ours = np.where(both, scores.arrays[key]["dice"], math.nan)
    theirs = np.where(both, scores.arrays[base]["dice"], math.nan)
    per_seed = st.seed_means(ours) - st.seed_means(theirs)
    per_seed = per_seed[~np.isnan(per_seed)]
    mean, sd = st.mean_and_sd(per_seed)
    low, high = st.interval(st.weighted_mean(ours, weights) - st.weighted_mean(theirs, weights))
    difference = st.paired_differences(ours, theirs)
    return Gain(
        mean, sd, low, high, st.wilcoxon_p(difference), math.nan, len(per_seed), len(difference),
        int((per_seed > 0).sum()), int((difference > 0).sum()),
    )  # fmt: skip


def _divided(factor: st.Factor, by: float) -> st.Factor:
    return replace(factor, value=factor.value / by)


def _saving(scores: Scores, key: Key, replicates: dict[Key, np.ndarray], means: dict[Key, float]) -> LabelFactor | None:
    counts = [n for n in scores.labels(key.setting) if isinstance(n, int) and n > 0]
    base = [scores.baseline(replace(key, labels=n)) for n in counts]
    there = [(n, k) for n, k in zip(counts, base) if k in means]
    if key == scores.baseline(key) or key not in means or not isinstance(key.labels, int) or len(there) < 2:
        return None
    numbers = [n for n, _ in there]
    needed = st.labels_needed(numbers, [means[k] for _, k in there], means[key])
    drawn = [
        st.labels_needed(numbers, [replicates[k][r] for _, k in there], replicates[key][r])
        for r in range(min(SAVING_RESAMPLES, len(replicates[key])))
    ]
    beyond = {"<": -math.inf, ">": math.inf}
    low, high = st.interval(np.array([beyond.get(f.bound, f.value) for f in drawn]))
    ends = [
        st.Factor(numbers[0], "<") if v == -math.inf else st.Factor(numbers[-1], ">") if v == math.inf else st.Factor(v)
        for v in (low, high)
    ]
    return LabelFactor(needed, *(_divided(f, key.labels) for f in (needed, *ends)))


def _values(scores: Scores, key: Key) -> dict[str, dict[str, tuple[float, float]]]:
    out: dict[str, dict[str, tuple[float, float]]] = {}
    for metric in METRICS if key in scores.arrays else ():
        array = scores.arrays[key][metric]
        own = {name: st.mean_and_sd(st.seed_means(array, i)) for i, name in enumerate(scores.label_names[key.setting])}
        out[metric] = {**own, MEAN: st.mean_and_sd(st.seed_means(array))}
    return out


def _weights(cases: int) -> np.ndarray:
    """Bootstrap weights of a setting; fewer than usual above 4,000 cases, so that they stay below 320 MB."""
    if cases == 0:
        return np.zeros((0, 0))
    return st.case_weights(cases, min(st.RESAMPLES, max(1000, 40_000_000 // cases)))


def summarise(scores: Scores, curves: Curves | None = None) -> list[Row]:
    """The rows of an experiment, one per cell that was asked for or measured, also where nothing is there yet.

    Args:
        scores: from :func:`nnssl.experiments.scores.read_scores`.
        curves: from :func:`read_curves`; the longest run of the baseline is taken for a finished one.
    """
    rows: list[Row] = []
    for setting in scores.settings:
        keys = [key for key in scores.wanted if key.setting == setting]
        weights = _weights(len(scores.cases[setting]))
        measured = [key for key in keys if key in scores.arrays]
        replicates = {key: st.weighted_mean(scores.arrays[key]["dice"], weights) for key in measured}
        means = {key: st.mean_and_sd(st.seed_means(scores.arrays[key]["dice"]))[0] for key in measured}
        for key in keys:
            done, wanted = scores.complete_seeds(key)
            rows.append(
                Row(
                    key,
                    _values(scores, key),
                    done,
                    wanted,
                    _gain(scores, key, weights),
                    _saving(scores, key, replicates, means),
                    _speed(key, scores.baseline(key), curves or {}),
                    scores.events.get(key, {}),
                )  # fmt: skip
            )
    tested = [i for i, row in enumerate(rows) if row.gain]
    adjusted = st.holm([rows[i].gain.p for i in tested])  # type: ignore[union-attr]
    for i, p in zip(tested, adjusted):
        rows[i] = replace(rows[i], gain=replace(rows[i].gain, p_holm=p))  # type: ignore[type-var]
    return rows
