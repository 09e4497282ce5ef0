"""Reads the result folder of an experiment. This is the contract between what runs the jobs and what writes the report.

``cases.csv``, one line per evaluated case and label (empty or ``nan``: no value):
    method, labels, setting, seed, fold, case, label, dice, surface_dice, hd95, reference_voxels, prediction_voxels
    ``dice`` and ``surface_dice`` in 0..1, ``hd95`` in mm; ``label`` is the label's name, background left out; ``labels`` is
    the number of labelled cases; ``setting`` tells tables apart (a dataset, or a dataset and a way of fine-tuning);
    ``scratch`` is the baseline, or where there is none the first method.
``runs.csv``, one line per fine-tuning and epoch:
    method, labels, seed, fold, epoch, step, pseudo_dice, train_loss, val_loss, minutes   (and setting, where there are several)
``failures.csv``, one line per failed job: any columns; job, method, labels, setting, seed, fold, phase, reason, log are put
    first.
``experiment.json``, all optional: name, title, notes (sentences), pictures (false: no image of a case is shown), methods,
    labels, seeds, folds;
    asked: per setting an object with setting, arms (by name) and labelled (objects with seed, fold and cases): what was asked
    for, so that what is missing can be marked; commands (lines), versions, hardware (objects), started, finished, minutes.
``images.json``: ``{"cases": {case: {"image": path, "reference": path}}, "labels": {name: value or [values]},
    "predictions": [{"method", "labels", "setting", "seed", "fold", "folder"}]}``; ``cases`` may be nested in settings.

Each file may be missing or be cut off; only a line that is there and makes no sense is an error.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from nnssl.errors import NnsslError, raise_problems

BASELINE = "scratch"
METRICS = ("dice", "surface_dice", "hd95")
REQUIRED = ("method", "labels", "seed", "case", "label", "dice")

Labels = int | str


@dataclass(frozen=True)
class Key:
    """One cell of the table: a method with a number of labelled cases in a setting."""

    setting: str
    method: str
    labels: Labels


@dataclass
class Scores:
    """What an experiment has measured so far.

    Attributes:
        arrays: per cell and metric ``(S, C, L)``: seeds, cases, labels of the cell's setting; means over folds; NaN where no
            value.
        present: per cell ``(S, C)``, whether the case was evaluated.
        runs: per cell the (seed, fold) pairs that were evaluated.
        expected: the (seed, fold) pairs of a finished cell, per setting.
        wanted: the cells that were asked for, or are there, in the order of the table: ``scratch`` first.
        seeds, cases, label_names: the axes, per setting.
        events: per cell: ``empty`` references without any voxel of a label, ``false_alarms`` (of these, those with a
            prediction: Dice 0), ``missed`` (a reference, no prediction: Dice 0), ``hd95_undefined``. Counted over seeds,
                folds, cases and labels.
    """

    arrays: dict[Key, dict[str, np.ndarray]] = field(default_factory=dict)
    present: dict[Key, np.ndarray] = field(default_factory=dict)
    runs: dict[Key, set[tuple[str, str]]] = field(default_factory=dict)
    expected: dict[str, set[tuple[str, str]]] = field(default_factory=dict)
    wanted: list[Key] = field(default_factory=list)
    seeds: dict[str, list[str]] = field(default_factory=dict)
    cases: dict[str, list[str]] = field(default_factory=dict)
    label_names: dict[str, list[str]] = field(default_factory=dict)
    events: dict[Key, dict[str, int]] = field(default_factory=dict)

    @property
    def settings(self) -> list[str]:
        """The settings in order."""
        return list(dict.fromkeys(key.setting for key in self.wanted))

    def methods(self, setting: str) -> list[str]:
        """The methods of a setting; the first one is the baseline."""
        return list(dict.fromkeys(key.method for key in self.wanted if key.setting == setting))

    def baseline(self, key: Key) -> Key:
        """The cell that a cell is compared with: ``scratch`` with the same labels; without scratch the first method of the
        setting."""
        return Key(key.setting, self.methods(key.setting)[0], key.labels)

    def labels(self, setting: str) -> list[Labels]:
        """The numbers of labelled cases of a setting, ascending; what is no number comes last."""
        return sorted({key.labels for key in self.wanted if key.setting == setting}, key=label_order)

    def complete_seeds(self, key: Key) -> tuple[int, int]:
        """How many seeds of a cell have all their folds and cases, and how many were asked for."""
        expected = self.expected.get(key.setting, set())
        seeds = {seed for seed, _ in expected}
        if key not in self.runs:
            return 0, len(seeds)
        whole = {s for s, row in zip(self.seeds[key.setting], self.present[key]) if row.all()}
        done = [s for s in seeds if s in whole and {f for e, f in expected if e == s} <= _folds(self.runs[key], s)]
        return len(done), len(seeds)


def _folds(runs: set[tuple[str, str]], seed: str) -> set[str]:
    return {fold for s, fold in runs if s == seed}


def label_order(labels: Labels) -> tuple[int, float, str]:
    """Sort key: numbers ascending, then texts."""
    return (0, float(labels), "") if isinstance(labels, int) else (1, 0.0, str(labels))


def parse_labels(text: object) -> Labels:
    """``"8"`` as a number; anything else (``"all"``) as it is."""
    stripped = str(text).strip()
    return int(stripped) if stripped.isdecimal() else stripped


def number(text: str | None) -> float:
    """A field of a CSV; empty, ``nan``, ``None`` and infinite values are NaN. Raises ValueError for anything else."""
    if text is None or text.strip().lower() in ("", "nan", "none", "–"):
        return math.nan
    value = float(text)
    return value if math.isfinite(value) else math.nan


def read_rows(file: Path, required: Iterable[str] = ()) -> list[dict[str, str]]:
    """The lines of a CSV as dictionaries; none where there is no file. A last line that was cut off is left out.

    Raises:
        NnsslError: a column of ``required`` is missing.
    """
    if not file.is_file():
        return []
    with file.open(newline="", encoding="utf-8-sig") as handle:
        reader = csv.DictReader(handle)
        rows = list(reader)
        columns = reader.fieldnames or []
    missing = [c for c in required if c not in columns]
    if missing and (columns or rows):
        raise NnsslError(
            f"{file} has no column {', '.join(missing)}; its first line is: {','.join(columns) or '(empty)'}."
        )
    return rows[:-1] if rows and None in rows[-1].values() else rows


def read_json_file(file: Path) -> dict[str, Any]:
    """A JSON object; empty where there is no file. Raises :class:`NnsslError` where it is broken."""
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise NnsslError(f"{file} cannot be read: {error}") from error
    return content if isinstance(content, dict) else {}


def _checked(rows: list[dict[str, str]], file: Path) -> list[dict[str, Any]]:
    out, problems = [], []
    for line, row in enumerate(rows, start=2):
        try:
            values = {metric: number(row.get(metric)) for metric in METRICS}
            voxels = {c: number(row.get(c)) for c in ("reference_voxels", "prediction_voxels")}
        except ValueError as error:
            problems.append(f"line {line}: {error}")
            continue
        wrong = [m for m in ("dice", "surface_dice") if not math.isnan(values[m]) and not 0 <= values[m] <= 1.000001]
        if wrong or values["hd95"] < 0:
            what = ", ".join(f"{m} = {row[m]}" for m in wrong or ["hd95"])
            problems.append(f"line {line}: {what}; Dice is a share in 0..1, a distance is not negative")
            continue
        key = Key((row.get("setting") or "").strip(), row["method"].strip(), parse_labels(row["labels"]))
        out.append({"key": key, "seed": row["seed"], "fold": row.get("fold") or "0", "case": row["case"],
                    "label": row["label"], **values, **voxels})  # fmt: skip
    raise_problems(problems[:20], str(file))
    return out


def _names(items: object) -> list[str]:
    """The names in a list of texts, numbers, or objects with a ``name``."""
    listed = items if isinstance(items, (list, tuple)) else []
    return [str(i.get("name", "")) if isinstance(i, dict) else str(i) for i in listed]


def settings_of(experiment: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What was asked for in each setting: methods, labels, seeds, folds; those of the experiment where it has none of its
    own."""
    listed = experiment.get("settings") or []
    own = {str(s.get("name", "")): s for s in listed if isinstance(s, dict)} or {name: {} for name in _names(listed)}
    for asked in experiment.get("asked") or ():
        draws = asked.get("labelled") or []
        own[str(asked.get("setting", ""))] = {
            "methods": list(asked.get("arms") or ()),
            "labels": sorted({len(d["cases"]) for d in draws}),
            "seeds": list(dict.fromkeys(d["seed"] for d in draws)),
            "folds": list(dict.fromkeys(d["fold"] for d in draws)),
        }
    return {name: {**experiment, **keys} for name, keys in own.items()}


def _counts(asked: dict[str, Any], there: list[Key]) -> list[Labels]:
    """The numbers of labels asked for. A share, whose number of cases is not known, is shown until something is measured."""
    counts = [parse_labels(n) for n in asked.get("labels") or ()]
    return [n for n in counts if not there or isinstance(n, int) or n == "all"]


def _wanted(rows: list[dict[str, Any]], experiment: dict[str, Any]) -> list[Key]:
    """All cells of the table: every method with every number of labels, where asked for or found."""
    found = list(dict.fromkeys(row["key"] for row in rows))
    asked = settings_of(experiment)
    wanted = []
    for setting in dict.fromkeys([*asked, *(k.setting for k in found)]) or [""]:
        there = [k for k in found if k.setting == setting]
        own = asked.get(setting, experiment)
        names = dict.fromkeys([*_names(own.get("methods")), *(k.method for k in there)])
        labels = sorted({*_counts(own, there), *(k.labels for k in there)}, key=label_order)
        wanted += [Key(setting, m, n) for m in sorted(names, key=lambda m: m != BASELINE) for n in labels]
    return wanted


def _expected(rows: list[dict[str, Any]], asked: dict[str, Any]) -> set[tuple[str, str]]:
    seeds = _names(asked.get("seeds")) or sorted({r["seed"] for r in rows})
    folds = sorted({r["fold"] for r in rows}) or ["0"]
    if len(_names(asked.get("folds"))) > len(folds):
        folds = _names(asked["folds"])
    return {(s, f) for s in seeds for f in folds}


def _fill(scores: Scores, setting: str, rows: list[dict[str, Any]]) -> None:
    """The arrays of one setting; of two lines for the same run, case and label the later one holds."""
    axes = [sorted({r["seed"] for r in rows}, key=_natural), sorted({r["case"] for r in rows}),
            list(dict.fromkeys(r["label"] for r in rows))]  # fmt: skip
    scores.seeds[setting], scores.cases[setting], scores.label_names[setting] = axes
    if not rows:
        return
    shape = tuple(len(axis) for axis in axes)
    latest = pd.DataFrame(rows).drop_duplicates(["key", "seed", "fold", "case", "label"], keep="last")
    places = pd.MultiIndex.from_product(axes)
    for key, own in latest.groupby("key", sort=False):
        means = own.groupby(["seed", "case", "label"])[list(METRICS)].mean().reindex(places)
        scores.arrays[key] = {metric: means[metric].to_numpy().reshape(shape) for metric in METRICS}
        scores.present[key] = (
            places.isin(pd.MultiIndex.from_frame(own[["seed", "case", "label"]])).reshape(shape).any(2)
        )
        scores.runs[key] = set(zip(own["seed"], own["fold"]))
        empty, found = own["reference_voxels"] == 0, own["prediction_voxels"]
        events = {
            "empty": empty,
            "false_alarms": empty & (found > 0),
            "missed": (own["reference_voxels"] > 0) & (found == 0),
            "hd95_undefined": own["hd95"].isna() & own["dice"].notna(),
        }
        scores.events[key] = {name: int(where.sum()) for name, where in events.items()}


def _natural(text: str) -> tuple[int, str]:
    return (int(text), "") if text.isdecimal() else (1 << 60, text)


def read_scores(folder: Path, experiment: dict[str, Any]) -> Scores:
    """Read ``cases.csv`` of a result folder; an experiment that has measured nothing yet gives a table of empty cells.

    Args:
        folder: the result folder.
        experiment: what was asked for: content of ``experiment.json``; may be empty.

    Raises:
        NnsslError: a line of ``cases.csv`` makes no sense; it names file and line.
    """
    file = folder / "cases.csv"
    rows = _checked(read_rows(file, REQUIRED), file)
    scores = Scores(wanted=_wanted(rows, experiment))
    for setting in scores.settings:
        own = [row for row in rows if row["key"].setting == setting]
        _fill(scores, setting, own)
        scores.expected[setting] = _expected(own, settings_of(experiment).get(setting, experiment))
    return scores
