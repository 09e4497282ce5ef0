"""Published figures beside ours: ``--compare published.csv``.

docs/label-efficiency.md says what each column means.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from nnssl.errors import NnsslError, did_you_mean, raise_problems
from nnssl.experiments.scores import BASELINE, numbers, parse_labels
from nnssl.experiments.summary import MEAN
from nnssl.experiments.tables import NOTHING, Table, baseline_of, plus_minus, signed

REQUIRED = ("method", "labels", "dice")
SHARES = ("dice", "sd", "surface_dice", "jaccard")
DISTANCES = ("hd95", "asd")
COLUMNS = (*REQUIRED, "setting", "label", "sd", "surface_dice", "jaccard", *DISTANCES, "source", "note")
PUBLISHED = "Published figures beside ours"
LEFT_OVER = "Published figures of other settings"
NOT_COMPARABLE = (
    "Published figures were made with other networks, splits, preprocessing and metrics. Compare gains over scratch, not "
    "levels; and a gain without a deviation may be noise."
)


def read_published(file: str | Path) -> pd.DataFrame:
    """Read a file of published figures: a line for each, with all of :data:`COLUMNS`; numbers as published, NaN: not given.

    Raises:
        NnsslError: the file is missing, a column is missing or unknown, a line has too many fields, a value is no number or no
            percentage, two lines give the same figure. Lines are named.
    """
    file = Path(file)
    try:
        with file.open(newline="", encoding="utf-8-sig") as handle:
            reader = csv.DictReader(handle, restval="")
            rows, columns = list(reader), [c.strip() for c in reader.fieldnames or []]
    except (OSError, UnicodeDecodeError) as error:
        raise NnsslError(f"The published figures {file} cannot be read: {error}") from error
    problems = [f"line 1: no column '{c}'." for c in REQUIRED if c not in columns]
    problems += [f"line 1: unknown column '{c}'.{did_you_mean(c, COLUMNS)}" for c in columns if c not in COLUMNS]
    raise_problems(problems, str(file))
    long = "more fields than columns; a text with a comma needs quotes."
    raise_problems([f"line {i}: {long}" for i, row in enumerate(rows, start=2) if None in row], str(file))
    texts = pd.DataFrame(rows, columns=reader.fieldnames, dtype=object).set_axis(columns, axis=1)
    texts = texts.reindex(columns=COLUMNS, fill_value="").astype(object).apply(lambda column: column.str.strip())
    figures = texts.assign(
        labels=texts["labels"].map(parse_labels).astype(object), label=texts["label"].replace("", MEAN)
    )
    found: list[tuple[int, str]] = []
    for column in (*SHARES, *DISTANCES):
        figures[column], wrong = numbers(texts[column])
        outside = (figures[column] < 0) | ((figures[column] > 100) if column in SHARES else False)
        kind = "not a percentage between 0 and 100" if column in SHARES else "a negative distance"
        found += [(i, f"{column} = '{texts[column][i]}' is not a number.") for i in texts.index[wrong]]
        found += [(i, f"{column} = {figures[column][i]:g} is {kind}.") for i in texts.index[outside]]
    for column in ("method", "labels"):
        found += [(i, f"{column} is empty.") for i in texts.index[texts[column] == ""]]
    same = figures[["setting", "method", "labels", "label"]].map(lambda text: str(text).casefold())
    for _, of in same.groupby(list(same)):
        found += [(i, f"gives the same figure as line {of.index[0] + 2}.") for i in of.index[1:]]
    if figures["dice"].max() <= 1:
        found.append((0, "all Dice values are 1 or less; write percent (81.3, not 0.813)."))
    raise_problems([f"line {i + 2}: {text}" for i, text in sorted(found)], str(file))
    return figures


def _bare(setting: str) -> str:
    return re.sub(r"^dataset\d+_", "", setting.strip().casefold())


def of_setting(published: pd.DataFrame, setting: str, settings: Sequence[str]) -> pd.DataFrame:
    """The figures that belong to a setting: of the same name, or without one where the experiment has one setting only."""
    names = published["setting"]
    for same in (names.str.casefold() == setting.casefold(), names.map(_bare) == _bare(setting)):
        if (same & (names != "")).any():
            return published[same & (names != "")]
    return published[(names == "") & (len(settings) <= 1)]


def left_over(published: pd.DataFrame, settings: Sequence[str]) -> pd.DataFrame:
    """The figures that belong to no setting of the experiment."""
    used = [of_setting(published, setting, settings) for setting in settings]
    return published.drop(index=pd.concat([published[:0], *used]).index)


def left_over_table(figures: pd.DataFrame) -> Table:
    """Figures of :func:`left_over`."""
    texts = {
        "setting": figures["setting"].replace("", NOTHING),
        "labels": figures["labels"].map(str),
        "method": _named(figures),
        "published, %": _shown(figures),
        "source": figures["source"],
    }
    return Table(LEFT_OVER, pd.DataFrame(texts), left=3)


def _named(figures: pd.DataFrame) -> list[str]:
    return [p.method if p.label == MEAN else f"{p.method}, {p.label}" for p in figures.itertuples()]


def _shown(figures: pd.DataFrame) -> list[str]:
    return list(map(plus_minus, figures["dice"], figures["sd"]))


def published_table(rows: pd.DataFrame, figures: pd.DataFrame) -> Table | None:
    """Published Dice and gain beside ours, for one setting; cells that only one side has show a dash. None without figures."""
    if figures.empty:
        return None
    most = max((n for n in rows["labels"] if isinstance(n, int)), default="all")
    labels = pd.Series([most if n == "all" else n for n in figures["labels"]], figures.index, dtype=object)
    order = {n: i for i, n in enumerate(dict.fromkeys([*rows["labels"], *labels]))}
    figures = figures.assign(labels=labels, place=labels.map(order), part=figures["label"] != MEAN)
    figures = figures.sort_values(["place", "part"], kind="stable")
    baseline = (baseline_of(rows) or BASELINE).casefold()
    cells, base_cells = _cells(figures), _cells(figures.assign(method=baseline))
    published = figures.set_axis(cells)
    ours = rows.set_axis(_cells(rows))
    own, base = ours.reindex(cells), ours.reindex(base_cells)
    theirs = published["dice"] - published[~cells.duplicated()]["dice"].reindex(base_cells).to_numpy()
    gain = own["gain"].where(published["label"] == MEAN, own["dice"] - base["dice"].to_numpy())
    texts = {
        "labels": list(map(str, figures["labels"])),
        "method": _named(figures),
        "published, %": _shown(figures),
        "ours, %": list(map(plus_minus, own["dice"], own["dice_sd"])),
        "published gain": list(map(signed, theirs.where(cells != base_cells))),
        "our gain": list(map(signed, gain.where(cells != base_cells))),
        "source": list(figures["source"]),
    }
    return Table(PUBLISHED, pd.DataFrame(texts), left=2)


def _cells(table: pd.DataFrame) -> pd.MultiIndex:
    """Method, number of labels and label of each line; capitals do not matter."""
    return pd.MultiIndex.from_arrays([table["method"].str.casefold(), table["labels"], table["label"]])


def published_notes(figures: pd.DataFrame) -> list[str]:
    """What is not comparable: the general warning and the notes of the file, each once."""
    return [NOT_COMPARABLE, *figures["note"][figures["note"] != ""].unique()] if len(figures) else []
