"""Published figures beside ours: ``--compare published.csv``.

Columns of the file, in any order; the first line names them:

| column | meaning |
|---|---|
| ``method`` | as in the experiment (capitals do not matter); ``scratch`` is the paper's own baseline |
| ``labels`` | number of labelled cases, or ``all``: beside our largest number |
| ``setting`` | dataset, ``ACDC`` or ``Dataset027_ACDC``; may be left out where the experiment has one |
| ``label`` | name of a label; empty or ``mean``: mean over labels |
| ``dice``, ``surface_dice``, ``jaccard`` | percent |
| ``hd95``, ``asd`` | as published; the unit belongs into ``note`` |
| ``sd`` | deviation of the Dice, percent; over what belongs into ``note`` |
| ``source``, ``note`` | where the figure stands, and what is not comparable |
"""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from nnssl.errors import NnsslError, did_you_mean, raise_problems
from nnssl.experiments.scores import BASELINE, Labels, number, parse_labels
from nnssl.experiments.summary import MEAN, Row
from nnssl.experiments.tables import NOTHING, Table, baseline_of, percent, plus_minus

REQUIRED = ("method", "labels", "dice")
SHARES = ("dice", "sd", "surface_dice", "jaccard")
DISTANCES = ("hd95", "asd")
COLUMNS = (*REQUIRED, "setting", "label", "sd", "surface_dice", "jaccard", *DISTANCES, "source", "note")
PUBLISHED = "Published figures beside ours"
LEFT_OVER = "Published figures of other settings"
NOT_COMPARABLE = (
    "Published figures were made with other networks, splits, preprocessing and metrics. Compare gains over scratch, not "
    "levels; and a "
    "gain without a deviation may be noise."
)


@dataclass(frozen=True)
class Published:
    """One published figure. Dice, its deviation and other overlaps in 0..1, distances as published; NaN: not given."""

    setting: str
    method: str
    labels: Labels
    label: str
    values: dict[str, float]
    source: str
    note: str
    line: int

    @property
    def dice(self) -> tuple[float, float]:
        """Mean and deviation, 0..1."""
        return self.values["dice"], self.values["sd"]


def _parse(row: dict[str, str], line: int, problems: list[str]) -> Published | None:
    values = {}
    for column in (*SHARES, *DISTANCES):
        try:
            value = number(row.get(column))
        except ValueError:
            problems.append(f"line {line}: {column} = '{row[column]}' is not a number.")
            return None
        if column in SHARES and not math.isnan(value) and not 0 <= value <= 100:
            problems.append(f"line {line}: {column} = {value:g} is not a percentage between 0 and 100.")
        if column in DISTANCES and value < 0:
            problems.append(f"line {line}: {column} = {value:g} is a negative distance.")
        values[column] = value / 100 if column in SHARES else value
    text = {c: (row.get(c) or "").strip() for c in ("setting", "method", "labels", "label", "source", "note")}
    problems += [f"line {line}: {c} is empty." for c in ("method", "labels") if not text[c]]
    return Published(text["setting"], text["method"], parse_labels(text["labels"]), text["label"] or MEAN, values,
                     text["source"], text["note"], line)  # fmt: skip


def read_published(file: str | Path) -> list[Published]:
    """Read a file of published figures.

    Raises:
        NnsslError: the file is missing, a column is missing or unknown, a line has too many fields, a value is no number or no
            percentage, two lines give the same figure. Lines are named.
    """
    file = Path(file)
    try:
        with file.open(newline="", encoding="utf-8-sig") as handle:
            reader = csv.DictReader(handle)
            rows, columns = list(reader), [c.strip() for c in reader.fieldnames or []]
    except (OSError, UnicodeDecodeError) as error:
        raise NnsslError(f"The published figures {file} cannot be read: {error}") from error
    problems = [f"line 1: no column '{c}'." for c in REQUIRED if c not in columns]
    problems += [f"line 1: unknown column '{c}'.{did_you_mean(c, COLUMNS)}" for c in columns if c not in COLUMNS]
    raise_problems(problems, str(file))
    out: list[Published] = []
    seen: dict[tuple[str, str, str, str], int] = {}
    for line, raw in enumerate(rows, start=2):
        if None in raw:
            problems.append(f"line {line}: more fields than columns; a text with a comma needs quotes.")
            continue
        found = _parse({k.strip(): v or "" for k, v in raw.items()}, line, problems)
        if found is None:
            continue
        key = (found.setting.casefold(), found.method.casefold(), str(found.labels), found.label.casefold())
        if key in seen:
            problems.append(f"line {line}: gives the same figure as line {seen[key]}.")
        seen[key] = line
        out.append(found)
    dice = [p.dice[0] for p in out if not math.isnan(p.dice[0])]
    if dice and max(dice) <= 0.01:
        problems.append(f"line {out[0].line}: all Dice values are 1 or less; write percent (81.3, not 0.813).")
    raise_problems(problems, str(file))
    return out


def _bare(setting: str) -> str:
    return re.sub(r"^dataset\d+_", "", setting.strip().casefold())


def of_setting(published: Sequence[Published], setting: str, settings: Sequence[str]) -> list[Published]:
    """The figures that belong to a setting: of the same name, or without one where the experiment has one setting only."""
    same = [p for p in published if p.setting and p.setting.casefold() == setting.casefold()]
    same = same or [p for p in published if p.setting and _bare(p.setting) == _bare(setting)]
    return same or ([p for p in published if not p.setting] if len(settings) <= 1 else [])


def left_over(published: Sequence[Published], settings: Sequence[str]) -> Table | None:
    """The figures that belong to no setting of the experiment, as a table of their own; None where all belong to one."""
    used = {id(p) for setting in settings for p in of_setting(published, setting, settings)}
    rest = [p for p in published if id(p) not in used]
    lines = [[p.setting or NOTHING, str(p.labels), _named(p), _shown(p), p.source] for p in rest]
    return Table(LEFT_OVER, ["setting", "labels", "method", "published, %", "source"], lines, left=3) if lines else None


def _named(p: Published) -> str:
    return p.method if p.label == MEAN else f"{p.method}, {p.label}"


def _shown(p: Published) -> str:
    return percent(p.dice[0]) + ("" if math.isnan(p.dice[1]) else f" ± {100 * p.dice[1]:.1f}")


def _ours(rows: Sequence[Row], method: str, labels: Labels) -> Row | None:
    return next((r for r in rows if r.key.method.casefold() == method.casefold() and r.key.labels == labels), None)


def _baseline(figures: Sequence[Published], of: Published, name: str) -> float:
    base = [
        p for p in figures if p.method.casefold() == name.casefold() and (p.labels, p.label) == (of.labels, of.label)
    ]
    return base[0].dice[0] if base else math.nan


def _gain_text(gain: float) -> str:
    return NOTHING if math.isnan(gain) else f"{100 * gain:+.1f}"


def published_table(rows: Sequence[Row], figures: Sequence[Published]) -> Table | None:
    """Published Dice and gain beside ours, for one setting; cells that only one side has show a dash. None without figures.

    Args:
        rows: ours, of the setting.
        figures: published ones of the same setting, from :func:`of_setting`.
    """
    lines, name = [], baseline_of(rows) or BASELINE
    most = max((r.key.labels for r in rows if isinstance(r.key.labels, int)), default=None)
    figures = [replace(p, labels=most) if p.labels == "all" and most is not None else p for p in figures]
    order = {n: i for i, n in enumerate(dict.fromkeys([*(r.key.labels for r in rows), *(p.labels for p in figures)]))}
    for p in sorted(figures, key=lambda p: (order[p.labels], p.label != MEAN)):
        row = _ours(rows, p.method, p.labels)
        ours = row.values.get("dice", {}).get(p.label, (math.nan, math.nan)) if row else (math.nan, math.nan)
        base = _ours(rows, name, p.labels)
        gain = math.nan
        if row and row.gain and p.label == MEAN:
            gain = row.gain.mean
        elif row and base and p.label != MEAN and row is not base:
            gain = ours[0] - base.values.get("dice", {}).get(p.label, (math.nan, math.nan))[0]
        theirs = math.nan if p.method.casefold() == name.casefold() else p.dice[0] - _baseline(figures, p, name)
        lines.append(
            [str(p.labels), _named(p), _shown(p), plus_minus(ours), _gain_text(theirs), _gain_text(gain), p.source]
        )
    head = ["labels", "method", "published, %", "ours, %", "published gain", "our gain", "source"]
    return Table(PUBLISHED, head, lines, left=2) if lines else None


def published_notes(figures: Sequence[Published]) -> list[str]:
    """What is not comparable: the general warning and the notes of the file, each once."""
    return [NOT_COMPARABLE, *dict.fromkeys(p.note for p in figures if p.note)] if figures else []
