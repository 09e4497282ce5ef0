"""From scores and training curves to one frame of results: means, gains over ``scratch`` with their tests, labels and epochs
saved."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd

from nnssl.experiments import statistics as st
from nnssl.experiments.scores import CELL, Key, Scores, cell_columns, numbers

MEAN = "mean"
FACTOR_RESAMPLES = 2_000
ALPHA = 0.05

EVENTS = ["empty_references", "false_alarms", "missed", "hd95_undefined"]
"""References without any voxel of a label; of these those with a prediction (Dice 0); a reference that was not found (Dice 0);
Dice without an HD95. Counted over seeds, folds, cases and labels."""
CSV_COLUMNS = [
    *CELL, "label", "seeds", "seeds_wanted", "dice", "dice_sd", "surface_dice", "surface_dice_sd", "hd95_mm", "hd95_mm_sd",
    "gain", "gain_sd", "gain_low", "gain_high", "p", "p_holm", "cases", "cases_better", "seeds_compared", "seeds_better",
    "scratch_labels", "label_factor", "label_factor_low", "label_factor_high", "epochs_to_scratch", "scratch_epochs", *EVENTS,
]  # fmt: skip


def verdict(row: Any) -> str:
    """``better``, ``worse``, ``unclear`` or ``one seed``.

    Better (worse): the interval lies above (below) zero, the adjusted p is below 0.05 and all seeds, at least two, agree.
    """
    sign = int(row.gain_low > 0) - int(row.gain_high < 0)
    if sign == 0 or math.isnan(row.gain) or not row.p_holm < ALPHA:
        return "unclear"
    if row.seeds_compared < 2:
        return "one seed"
    agree = row.seeds_better == (row.seeds_compared if sign > 0 else 0)
    return ("better" if sign > 0 else "worse") if agree else "unclear"


def read_curves(table: pd.DataFrame, setting: str = "") -> pd.DataFrame:
    """The pseudo Dice of ``runs.csv``: a line for each cell, seed and fold, a column for each epoch; NaN: missing.

    A line without an epoch or with a broken number (of a run that was killed) is left out; ``setting`` is that of lines without.
    """
    runs = [*CELL, "seed", "fold"]
    lines = cell_columns(table.reindex(columns=list(dict.fromkeys([*table, "epoch", "pseudo_dice"])), fill_value=""))
    dice, wrong = numbers(lines["pseudo_dice"])
    epochs = numbers(lines["epoch"])[0]
    lines = lines.assign(setting=lines["setting"].replace("", setting), pseudo_dice=dice, epoch=epochs)
    lines = lines[~wrong & epochs.notna()].astype({"epoch": int})
    wide = (
        lines.drop_duplicates([*runs, "epoch"], keep="last").set_index([*runs, "epoch"])["pseudo_dice"].unstack("epoch")
    )
    return wide if wide.empty else wide.reindex(columns=range(wide.columns.min(), wide.columns.max() + 1))


def curves_of(curves: pd.DataFrame, key: Key) -> pd.DataFrame:
    """The runs of a cell, up to the last epoch that one of them has reached."""
    own = curves[(curves.index.to_frame()[CELL] == list(key)).all(axis=1)]
    last = own.notna().any()[::-1].idxmax() if own.notna().any(axis=None) else None
    return own.loc[:, :last] if last is not None else own.iloc[:0, :0]


def mean_curve(runs: pd.DataFrame) -> pd.Series:
    """Mean over the runs of a cell, up to the last epoch that every run has reached."""
    reached = [run.last_valid_index() for _, run in runs.iterrows()]
    return pd.Series(dtype=float) if None in reached or not reached else runs.loc[:, : min(reached)].mean()


def _epochs_to_match(own: pd.DataFrame, base: pd.DataFrame) -> dict[str, Any]:
    """Epochs after which a method's training curve, and scratch's own, reach the pseudo Dice that scratch ends with."""
    curve, scratch = mean_curve(own), mean_curve(base)
    length = base.shape[1]
    if not len(curve) or not len(scratch) or len(scratch) < length:
        return {}
    window = max(1, round(length / 20))
    target = float(scratch.iloc[-window:].mean())
    if math.isnan(target):
        return {}
    reached = {"epochs_to_scratch": st.first_reached(curve, target, window),
               "scratch_epochs": st.first_reached(scratch, target, window)}  # fmt: skip
    return {name: st.Factor(len(curve), ">") if n is None else st.Factor(n) for name, n in reached.items()}


def _gain(ours: pd.Series, theirs: pd.Series, weights: pd.DataFrame) -> dict[str, float]:
    """A cell against the baseline with the same number of labels, on the seeds and cases that both have.

    The interval is a bootstrap over cases, 95 %, for these seeds; p is Wilcoxon's signed-rank test over cases.
    """
    evaluated = [scores.index.droplevel("label") for scores in (ours, theirs)]
    both = evaluated[0].intersection(evaluated[1])
    if both.empty:
        return {}
    ours, theirs = ours[evaluated[0].isin(both)], theirs[evaluated[1].isin(both)]
    per_seed = (st.seed_means(ours) - st.seed_means(theirs)).dropna()
    low, high = st.interval(st.weighted_mean(ours, weights) - st.weighted_mean(theirs, weights))
    per_case = st.paired_differences(ours, theirs)
    return {
        "gain": per_seed.mean(), "gain_sd": per_seed.std(), "gain_low": low, "gain_high": high,
        "p": st.wilcoxon_p(per_case), "cases": len(per_case), "cases_better": (per_case > 0).sum(),
        "seeds_compared": len(per_seed), "seeds_better": (per_seed > 0).sum(),
    }  # fmt: skip


def _label_factor(
    key: Key, points: list[Key], replicates: dict[Key, np.ndarray], means: dict[Key, float]
) -> dict[str, st.Factor]:
    """How many labels the baseline (``points``, by number of labels) needs for the Dice of a cell, and divided by the cell's."""
    counts = [int(k.labels) for k in points]
    drawn = np.stack([replicates[k][:FACTOR_RESAMPLES] for k in points], axis=1)
    targets = replicates[key][:FACTOR_RESAMPLES]
    needed = [st.labels_needed(counts, dice, target) for dice, target in zip(drawn, targets)]
    beyond = {"<": -math.inf, ">": math.inf}
    ends = st.interval(np.array([beyond.get(f.bound, f.value) for f in needed]))
    bounds = {-math.inf: st.Factor(counts[0], "<"), math.inf: st.Factor(counts[-1], ">")}
    found = [
        st.labels_needed(counts, [means[k] for k in points], means[key]),
        *(bounds.get(v, st.Factor(v)) for v in ends),
    ]
    factors = [st.Factor(f.value / int(key.labels), f.bound) for f in found]
    names = ("label_factor", "label_factor_low", "label_factor_high")
    return {"scratch_labels": found[0], **dict(zip(names, factors))}


def _values(cell: pd.DataFrame, names: list[str]) -> pd.DataFrame:
    """Mean and sample deviation over seeds of each metric, in percent and mm: of the mean over labels, and of each label."""
    per_label = cell.groupby(["seed", "label"]).mean()
    of = {**dict(list(per_label.groupby("label"))), MEAN: per_label.groupby("seed").mean()}
    found = pd.DataFrame({name: pd.concat([of[name].mean(), of[name].std().add_suffix("_sd")]) for name in of}).T
    found = found * [1.0 if column.startswith("hd95") else 100.0 for column in found]
    columns = {"hd95": "hd95_mm", "hd95_sd": "hd95_mm_sd"}
    return found.rename(columns=columns).reindex([MEAN, *(n for n in names if n != MEAN)])


def _count_events(lines: pd.DataFrame) -> pd.DataFrame:
    """How often each of :data:`EVENTS` happened, by cell."""
    empty, found = lines["reference_voxels"] == 0, lines["prediction_voxels"]
    undefined = lines["hd95"].isna() & lines["dice"].notna()
    missed = (lines["reference_voxels"] > 0) & (found == 0)
    events = pd.DataFrame(dict(zip(EVENTS, (empty, empty & (found > 0), missed, undefined))))
    return events.groupby([lines[c] for c in CELL]).sum()


def _weights(cases: list[str]) -> pd.DataFrame:
    """Bootstrap weights of a setting; fewer than usual above 4,000 cases, so that they stay below 320 MB."""
    return st.case_weights(cases, min(st.RESAMPLES, max(1000, 40_000_000 // len(cases)))) if cases else pd.DataFrame()


def _results(scores: Scores, setting: str, curves: pd.DataFrame) -> Iterator[dict[str, Any]]:
    keys = [key for key in scores.wanted if key.setting == setting]
    weights, events = _weights(scores.cases(setting)), _count_events(scores.lines)
    dice = {key: scores.cells[key]["dice"] for key in keys if key in scores.cells}
    replicates = {key: st.weighted_mean(values, weights) for key, values in dice.items()}
    means = {key: float(st.seed_means(values).mean()) for key, values in dice.items()}
    for key in keys:
        base = scores.baseline(key)
        counts = [n for n in scores.labels(setting) if isinstance(n, int) and n > 0]
        points = [k for n in counts if (k := base._replace(labels=n)) in dice]
        compared: dict[str, Any] = dict(events.loc[key]) if key in dice else dict.fromkeys(EVENTS, 0)
        if key != base:
            compared |= _epochs_to_match(curves_of(curves, key), curves_of(curves, base))
        if key != base and key in dice and base in dice:
            compared |= _gain(dice[key], dice[base], weights)
        if key != base and key in dice and isinstance(key.labels, int) and len(points) > 1:
            compared |= _label_factor(key, points, replicates, means)
        done, wanted = scores.complete_seeds(key)
        line = {**key._asdict(), "seeds": done, "seeds_wanted": wanted, "measured": key in dice}
        values = _values(scores.cells[key], scores.label_names(setting)) if key in dice else pd.DataFrame(index=[MEAN])
        for name, row in values.iterrows():
            yield {**line, "label": name, **row, **(compared if name == MEAN else {})}


def summarise(scores: Scores, curves: pd.DataFrame | None = None) -> pd.DataFrame:
    """The results: a line for each cell that was asked for or measured and each label, ``mean`` (over labels) first.

    The columns are :data:`CSV_COLUMNS`, and ``measured``: whether there is anything of the cell. Dice and gains are in percent,
    HD95 in mm, label factors and epochs are of :class:`Factor`. What compares methods stands in the lines of the mean; it is NaN
    for the baseline, and where nothing can be compared yet. The longest run of the baseline is taken for a finished one.
    """
    curves = read_curves(pd.DataFrame()) if curves is None else curves
    lines = [line for setting in scores.settings for line in _results(scores, setting, curves)]
    rows = pd.DataFrame(lines, columns=[*CSV_COLUMNS, "measured"]).astype({"labels": object})
    percent = ["gain", "gain_sd", "gain_low", "gain_high"]
    return rows.assign(p_holm=st.holm(list(rows["p"])), **{c: 100 * rows[c] for c in percent})
