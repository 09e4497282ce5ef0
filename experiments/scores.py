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
    labels, seeds, folds: what was asked for, so that what is missing can be marked; settings: a list of objects with name and
    these four where settings differ; asked, commands (lines), versions, hardware (objects), started, finished, minutes.
``images.json``: ``{"cases": {case: {"image": path, "reference": path}}, "labels": {name: value or [values]},
    "predictions": [{"method", "labels", "setting", "seed", "fold", "folder"}]}``; ``cases`` may be nested in settings.

Each file may be missing or be cut off; only a line that is there and makes no sense is an error.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from nnssl.errors import NnsslError, raise_problems
from nnssl.files import read_json

BASELINE = "scratch"
METRICS = ["dice", "surface_dice", "hd95"]
VOXELS = ["reference_voxels", "prediction_voxels"]
CELL = ["setting", "method", "labels"]
REQUIRED = ("method", "labels", "seed", "case", "label", "dice")
NO_NUMBER = ("", "nan", "none", "–")

Labels = int | str


class Key(NamedTuple):
    """One cell of the table: a method with a number of labelled cases in a setting."""

    setting: str
    method: str
    labels: Labels


@dataclass
class Scores:
    """What an experiment has measured so far.

    Attributes:
        lines: ``cases.csv``, of two lines for the same run, case and label the later one.
        cells: of each measured cell the metrics by seed, case and label, means over folds; NaN where there is no value.
        expected: the (seed, fold) pairs of a finished cell, per setting.
        wanted: the cells that were asked for, or are there, in the order of the table: ``scratch`` first.
    """

    lines: pd.DataFrame
    cells: dict[Key, pd.DataFrame]
    wanted: list[Key]
    expected: dict[str, set[tuple[str, str]]] = field(default_factory=dict)

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
        return key._replace(method=self.methods(key.setting)[0])

    def labels(self, setting: str) -> list[Labels]:
        """The numbers of labelled cases of a setting, ascending; what is no number comes last."""
        return sorted({key.labels for key in self.wanted if key.setting == setting}, key=label_order)

    def _of(self, setting: str, column: str) -> list[str]:
        return list(self.lines.loc[self.lines["setting"] == setting, column].unique())

    def seeds(self, setting: str) -> list[str]:
        """The seeds that are there, ascending."""
        return sorted(self._of(setting, "seed"), key=lambda seed: label_order(parse_labels(seed)))

    def cases(self, setting: str) -> list[str]:
        """The evaluated cases."""
        return sorted(self._of(setting, "case"))

    def label_names(self, setting: str) -> list[str]:
        """The names of the labels, in the order of the file."""
        return self._of(setting, "label")

    def complete_seeds(self, key: Key) -> tuple[int, int]:
        """How many seeds of a cell have all their folds and cases, and how many were asked for."""
        expected = self.expected.get(key.setting, set())
        own = self.lines[(self.lines[CELL] == list(key)).all(axis=1)]
        runs = set(zip(own["seed"], own["fold"]))
        cases = own.groupby("seed")["case"].nunique()
        whole = set(cases.index[cases == len(self.cases(key.setting))])
        seeds = {seed for seed, _ in expected}
        done = [s for s in seeds & whole if all(pair in runs for pair in expected if pair[0] == s)]
        return len(done), len(seeds)


def label_order(labels: Labels) -> tuple[int, float, str]:
    """Sort key: numbers ascending, then texts."""
    return (0, float(labels), "") if isinstance(labels, int) else (1, 0.0, str(labels))


def parse_labels(text: object) -> Labels:
    """``"8"`` as a number; anything else (``"all"``) as it is."""
    stripped = str(text).strip()
    return int(stripped) if stripped.isdecimal() else stripped


def numbers(texts: pd.Series) -> tuple[pd.Series, pd.Series]:
    """Fields of a CSV as numbers, and which of them are none; empty, ``nan``, ``None`` and infinite values are NaN."""
    values = pd.to_numeric(texts, errors="coerce").astype(float)
    wrong = values.isna() & ~texts.str.strip().str.lower().isin(NO_NUMBER)
    return values.where(np.isfinite(values)), wrong


def read_table(file: Path, required: Iterable[str] = ()) -> pd.DataFrame:
    """The lines of a CSV as text; no columns where there is no file. A last line that was cut off is left out."""
    if not file.is_file():
        return pd.DataFrame()
    with file.open(newline="", encoding="utf-8-sig") as handle:
        reader = csv.DictReader(handle)
        rows = list(reader)
        columns = list(reader.fieldnames or [])
    missing = [c for c in required if c not in columns]
    if missing and columns:
        raise NnsslError(f"{file} has no column {', '.join(missing)}; its first line is: {','.join(columns)}.")
    if rows and None in rows[-1].values():
        rows.pop()
    return pd.DataFrame(rows, columns=columns, dtype=object).fillna("")


def read_json_file(file: Path) -> dict[str, Any]:
    """A JSON object; empty where there is no file. Raises :class:`NnsslError` where it is broken."""
    return read_json(file) if file.is_file() else {}


def cell_columns(table: pd.DataFrame) -> pd.DataFrame:
    """A table of texts with all columns that tell cells and runs apart, numbers of labels as numbers."""
    filled = table.reindex(columns=list(dict.fromkeys([*table, *CELL, "seed", "fold"])), fill_value="").astype(object)
    labels = pd.Series([parse_labels(n) for n in filled["labels"]], filled.index, dtype=object)
    names = {c: filled[c].str.strip() for c in ("setting", "method")}
    return filled.assign(**names, labels=labels, fold=filled["fold"].replace("", "0"))


def read_cases(file: Path) -> pd.DataFrame:
    """``cases.csv`` with its numbers; of two lines for the same run, case and label the later one holds."""
    columns = [*CELL, "seed", "fold", "case", "label", *METRICS, *VOXELS]
    table = cell_columns(read_table(file, REQUIRED)).reindex(columns=columns, fill_value="").astype(object)
    problems: list[tuple[int, str]] = []
    for column in (*METRICS, *VOXELS):
        texts = table[column]
        table[column], wrong = numbers(texts)
        problems += [(i, f"could not convert {column} = '{texts[i]}' to a number") for i in table.index[wrong]]
    for column, high in (("dice", 1.000001), ("surface_dice", 1.000001), ("hd95", np.inf)):
        wrong = (table[column] < 0) | (table[column] > high)
        said = "Dice is a share in 0..1, a distance is not negative"
        problems += [(i, f"{column} = {table.loc[i, column]:g}; {said}") for i in table.index[wrong]]
    raise_problems([f"line {i + 2}: {text}" for i, text in sorted(problems)[:20]], str(file))
    return table.drop_duplicates(columns[:7], keep="last")


def _asked(experiment: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What was asked for in each setting; of the experiment where a setting has none of its own."""
    return {str(s.get("name", "")): {**experiment, **s} for s in experiment.get("settings") or ()}


def _wanted(lines: pd.DataFrame, experiment: dict[str, Any]) -> list[Key]:
    """All cells of the table: every method with every number of labels, where asked for or found."""
    found = [Key(*cell) for cell in lines[CELL].drop_duplicates().itertuples(index=False)]
    asked = _asked(experiment)
    wanted = []
    for setting in dict.fromkeys([*asked, *(k.setting for k in found)]) or [""]:
        there = [k for k in found if k.setting == setting]
        own = asked.get(setting, experiment)
        methods = dict.fromkeys([*(own.get("methods") or ()), *(k.method for k in there)])
        counts = {*map(parse_labels, own.get("labels") or ()), *(k.labels for k in there)}
        first = sorted(methods, key=lambda m: m != BASELINE)
        wanted += [Key(setting, m, n) for m in first for n in sorted(counts, key=label_order)]
    return wanted


def _expected(lines: pd.DataFrame, asked: dict[str, Any]) -> set[tuple[str, str]]:
    seeds = [str(s) for s in asked.get("seeds") or lines["seed"].unique()]
    folds, asked_folds = list(lines["fold"].unique()) or ["0"], [str(f) for f in asked.get("folds") or ()]
    return {(s, f) for s in seeds for f in (asked_folds if len(asked_folds) > len(folds) else folds)}


def read_scores(folder: Path, experiment: dict[str, Any]) -> Scores:
    """Read ``cases.csv`` of a result folder; an experiment that has measured nothing yet gives a table of empty cells.

    ``experiment`` is the content of ``experiment.json``: what was asked for. It may be empty.

    Raises:
        NnsslError: a line of ``cases.csv`` makes no sense; it names file and line.
    """
    lines = read_cases(folder / "cases.csv")
    means = lines.groupby([*CELL, "seed", "case", "label"], sort=False)[METRICS].mean()
    cells = {Key(*key): cell.droplevel(CELL) for key, cell in means.groupby(level=CELL, sort=False)}
    scores = Scores(lines, cells, _wanted(lines, experiment))
    asked = _asked(experiment)
    for setting in scores.settings:
        own = lines[lines["setting"] == setting]
        scores.expected[setting] = _expected(own, asked.get(setting, experiment))
    return scores
