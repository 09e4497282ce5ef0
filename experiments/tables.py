"""The rows of an experiment as ``table.md``, ``table.csv`` and ``table.tex``. Dice in percent, distances in mm; a dash:
nothing yet."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from nnssl.experiments.scores import Labels, label_order
from nnssl.experiments.statistics import Factor
from nnssl.experiments.summary import MEAN, EpochsToMatch, LabelFactor, Row, verdict

NOTHING = "–"
FEW_CASES = 10
CSV_COLUMNS: tuple[str, ...] = (
    "setting", "method", "labels", "label", "seeds", "seeds_wanted", "dice", "dice_sd", "surface_dice",
    "surface_dice_sd", "hd95_mm", "hd95_mm_sd", "gain", "gain_sd", "gain_low", "gain_high", "p", "p_holm", "cases",
    "cases_better", "seeds_compared", "seeds_better", "scratch_labels", "label_factor", "label_factor_low",
    "label_factor_high", "epochs_to_scratch", "scratch_epochs", "empty_references", "false_alarms", "missed",
    "hd95_undefined",
)  # fmt: skip


@dataclass(frozen=True)
class Table:
    """Text cells below a line of heads.

    Attributes:
        left: so many columns are left aligned; with two or more, a change in the first one is marked by a rule.
        tones: (line, column) of cells that stand out: ``"up"`` or ``"down"``.
    """

    title: str
    head: list[str]
    rows: list[list[str]]
    left: int = 1
    tones: dict[tuple[int, int], str] = field(default_factory=dict)


def percent(value: float, digits: int = 1) -> str:
    """A share as percent without the sign, or a dash."""
    return NOTHING if math.isnan(value) else f"{100 * value:.{digits}f}"


def plus_minus(value: tuple[float, float], scale: float = 100.0) -> str:
    """``81.2 ± 0.4``; without a deviation the mean alone; a dash without a mean."""
    mean, sd = value
    if math.isnan(mean):
        return NOTHING
    return f"{scale * mean:.1f}" if math.isnan(sd) else f"{scale * mean:.1f} ± {scale * sd:.1f}"


def p_text(p: float) -> str:
    """A p value with two significant digits, ``<0.001`` below, a dash for NaN."""
    return NOTHING if math.isnan(p) else "<0.001" if p < 0.001 else f"{p:.3f}" if p < 0.0995 else f"{p:.2f}"


def factor_text(factor: Factor) -> str:
    """``2.8×``, ``>4.0×`` where it lies beyond what was measured."""
    return NOTHING if math.isnan(factor.value) else f"{factor.bound}{factor.value:.1f}×"


def epochs_text(speed: EpochsToMatch | None) -> str:
    """``12 / 47``: the method's and scratch's epochs; ``>50`` where the target was not reached."""
    if speed is None:
        return NOTHING
    own = f">{speed.epochs}" if speed.own is None else str(speed.own)
    return f"{own} / {NOTHING if speed.scratch is None else speed.scratch}"


def saving_text(saving: LabelFactor | None) -> str:
    """``2.8× [2.1×, >4.0×]``; one figure where all three are the same."""
    if saving is None or math.isnan(saving.factor.value):
        return NOTHING
    value, low, high = (factor_text(f) for f in (saving.factor, saving.low, saving.high))
    return value if value == low == high else f"{value} [{low}, {high}]"


def labels_text(labels: Labels) -> str:
    """``1 label``, ``4 labels``, ``all``."""
    return f"{labels} label{'s' * (labels != 1)}" if isinstance(labels, int) else str(labels)


def seeds_mark(row: Row) -> str:
    """`` (2/3)`` where only two of three seeds are complete; nothing where all are, or none is there at all."""
    return f" ({row.done}/{row.wanted})" if row.done < row.wanted and row.values else ""


def _grid(rows: Sequence[Row]) -> tuple[list[str], list[Labels], dict[tuple[str, Labels], Row]]:
    methods = list(dict.fromkeys(r.key.method for r in rows))
    labels = list(dict.fromkeys(r.key.labels for r in rows))
    return methods, labels, {(r.key.method, r.key.labels): r for r in rows}


def dice_table(rows: Sequence[Row]) -> Table:
    """Methods by numbers of labels: mean Dice over labels, mean and deviation over seeds. ``rows`` are of one setting."""
    return metric_table(rows, "dice", "Dice, %")


def metric_table(rows: Sequence[Row], metric: str, title: str) -> Table:
    """The same for any metric; distances are not scaled."""
    methods, labels, grid = _grid(rows)
    scale = 1.0 if metric == "hd95" else 100.0
    lines = []
    for method in methods:
        cells = [grid[method, n] for n in labels]
        values = [(r.values.get(metric, {}).get(MEAN, (math.nan, math.nan)), r) for r in cells]
        lines.append([method, *(plus_minus(v, scale) + seeds_mark(r) for v, r in values)])
    return Table(title, ["method", *map(labels_text, labels)], lines)


def label_table(rows: Sequence[Row]) -> Table | None:
    """Dice of each label beside the mean; None where there is one label only."""
    names = list(dict.fromkeys(name for r in rows for name in r.values.get("dice", {}) if name != MEAN))
    if len(names) < 2:
        return None
    lines = []
    for r in sorted(rows, key=lambda r: label_order(r.key.labels)):
        dice = r.values.get("dice", {})
        lines.append(
            [str(r.key.labels), r.key.method, *(plus_minus(dice.get(n, (math.nan, math.nan))) for n in [*names, MEAN])]
        )
    return Table("Dice of each label, %", ["labels", "method", *names, MEAN], lines, left=2)


def comparison_table(rows: Sequence[Row]) -> Table | None:
    """Each method against the baseline, which is the first; None where there is nothing else."""
    base = baseline_of(rows)
    lines: list[list[str]] = []
    tones: dict[tuple[int, int], str] = {}
    for r in sorted(rows, key=lambda r: label_order(r.key.labels)):
        if r.key.method == base:
            continue
        tone = {"better": "up", "worse": "down"}.get(verdict(r.gain) if r.gain else "")
        if tone:
            tones[len(lines), 3] = tone
        cells = [NOTHING] * 5
        if r.gain:
            gain = f"{100 * r.gain.mean:+.1f}" + ("" if math.isnan(r.gain.sd) else f" ± {100 * r.gain.sd:.1f}")
            ends = f"{100 * r.gain.low:+.1f} to {100 * r.gain.high:+.1f}" if not math.isnan(r.gain.low) else NOTHING
            cells = [
                gain + seeds_mark(r), ends, p_text(r.gain.p), p_text(r.gain.p_holm), f"{r.gain.cases_better}/{r.gain.cases}"
            ]  # fmt: skip
        lines.append(
            [str(r.key.labels), r.key.method, plus_minus(r.dice), *cells, saving_text(r.saving), epochs_text(r.speed)]
        )
    head = [
        "labels", "method", "Dice, %", f"gain over {base}", "95 % interval", "p", "p (Holm)", "cases better", "label factor",
        f"epochs / {base}",
    ]  # fmt: skip
    return Table(f"Against {base}", head, lines, 2, tones) if lines else None


def baseline_of(rows: Sequence[Row]) -> str:
    """The method that the others of a setting are compared with; empty without rows."""
    return rows[0].key.method if rows else ""


def notes(rows: Sequence[Row]) -> list[str]:
    """What must be known to read the tables: missing cells, incomplete seeds, empty references. Sentences without markup."""
    out = []
    missing = [r for r in rows if not r.values]
    partial = [r for r in rows if r.values and r.done < r.wanted]
    single = [r for r in rows if r.values and r.wanted < 2]
    if missing:
        out.append(f"Without a result so far ({NOTHING}): {len(missing)} of {len(rows)} cells.")
    if partial:
        out.append(
            f"Incomplete: {len(partial)} of {len(rows)} cells; (2/3) means that 2 of 3 seeds have all their folds and cases."
        )
    if single:
        out.append(
            "Only one seed: no deviation can be given, and another draw of the labelled cases may turn the order round."
        )
    fewest = min((r.gain.cases for r in rows if r.gain), default=FEW_CASES)
    if fewest < FEW_CASES:
        cases = f"{fewest} test case{'s' * (fewest != 1)}"
        out.append(f"Only {cases}: the intervals are too short, and p is large whatever the difference.")
    return out + _empty_notes(rows)


def _empty_notes(rows: Sequence[Row]) -> list[str]:
    """How often a label was missing from a reference or a prediction, over all cells, seeds, folds, cases and labels."""
    empty, false_alarms, missed, undefined = (
        sum(r.events.get(name, 0) for r in rows) for name in ("empty", "false_alarms", "missed", "hd95_undefined")
    )
    out = []
    if empty:
        out.append(
            f"Empty references: {empty} times, over all cells, seeds, cases and labels, an image held none of a label. "
            "Where the prediction was empty too there is no Dice and the mean leaves it out, as in nnU-Net; "
            f"{false_alarms} times it was not and the Dice is 0."
        )
    if missed or undefined:
        out.append(
            f"Empty predictions: {missed} times a label that is there was not found at all (Dice 0). HD95 is undefined "
            f"{undefined} times and left out of its mean, which flatters a method that finds nothing: read it with the "
            "Dice."
        )
    return out


def _widths(table: Table) -> list[int]:
    return [max(len(str(line[i])) for line in [table.head, *table.rows]) for i in range(len(table.head))]


def markdown(table: Table) -> str:
    """A GitHub table, its columns aligned in the text as well."""
    widths = [max(w, 3) for w in _widths(table)]
    rule = ["-" * w if i < table.left else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    lines = [[c.replace("|", "\\|") for c in line] for line in [table.head, rule, *table.rows]]
    text = ["| " + " | ".join(c.ljust(w) if i < table.left else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths))) + " |"
            for line in lines]  # fmt: skip
    return "\n".join(text)


_TEX = {
    "\\": r"\textbackslash{}",
    "±": r"$\pm$",
    "×": r"$\times$",
    "–": "--",
    ">": "$>$",
    "<": "$<$",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
}
_TEX.update({c: "\\" + c for c in "&%$#_{}"})


FIT = r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%"
"""As wide as it is, but never wider than the text."""
TEX_PAGE = r"""% pdflatex table.tex. In a paper: \input{table_body.tex}, with these packages in the preamble.
\documentclass{article}
\usepackage[T1]{fontenc}
\usepackage[utf8]{inputenc}
\usepackage[margin=2.5cm]{geometry}
\usepackage{booktabs}
\usepackage{graphicx}
\begin{document}
\input{table_body.tex}
\end{document}
"""


def tex_escape(text: str) -> str:
    """Text for LaTeX."""
    return re.sub(r"(?<!\w)-(?=\d)", "$-$", "".join(_TEX.get(c, c) for c in text))


def tex(table: Table, caption: str) -> str:
    """A ``table`` environment, shrunk where it is wider than the text; needs the packages booktabs and graphicx."""
    columns = "l" * table.left + "r" * (len(table.head) - table.left)
    body: list[str] = []
    for i, line in enumerate(table.rows):
        if i and table.left > 1 and line[0] != table.rows[i - 1][0]:
            body.append(r"\addlinespace")
        body.append(" & ".join(map(tex_escape, line)) + r" \\")
    head = " & ".join(map(tex_escape, table.head)) + r" \\"
    lines = [r"\begin{table}", r"\centering", rf"\caption{{{tex_escape(caption)}}}", FIT,
    rf"\begin{{tabular}}{{{columns}}}",
    r"\toprule", head,
             r"\midrule", *body, r"\bottomrule", r"\end{tabular}}", r"\end{table}"]  # fmt: skip
    return "\n".join(lines)


def _figure(value: float, scale: float = 1.0) -> str:
    return "" if math.isnan(value) else f"{scale * value:.6g}"


def _csv_row(row: Row, label: str) -> list[str]:
    pair = {m: row.values.get(m, {}).get(label, (math.nan, math.nan)) for m in ("dice", "surface_dice", "hd95")}
    out = [row.key.setting, row.key.method, str(row.key.labels), label, str(row.done), str(row.wanted)]
    out += [_figure(v, 1.0 if m == "hd95" else 100.0) for m in pair for v in pair[m]]
    g = row.gain if label == MEAN else None
    out += [_figure(v, 100.0) for v in (g.mean, g.sd, g.low, g.high)] if g else [""] * 4
    out += [_figure(g.p), _figure(g.p_holm)] if g else [""] * 2
    out += [str(v) for v in (g.cases, g.cases_better, g.seeds, g.seeds_better)] if g else [""] * 4
    s = row.saving if label == MEAN else None
    out += [f"{f.bound}{_figure(f.value)}" for f in (s.needed, s.factor, s.low, s.high)] if s else [""] * 4
    e = row.speed if label == MEAN else None
    out += [
        "" if e is None else f">{e.epochs}" if v is None else str(v)
        for v in ((e.own, e.scratch) if e else (None, None))
    ]
    return out + [
        str(row.events.get(n, 0)) if label == MEAN else ""
        for n in ("empty", "false_alarms", "missed", "hd95_undefined")
    ]


def csv_text(rows: Sequence[Row]) -> str:
    """Everything as one line per cell and label, ``mean`` first: Dice in percent, HD95 in mm; empty: no value."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for row in rows:
        for label in [MEAN, *(n for n in row.values.get("dice", {}) if n != MEAN)]:
            writer.writerow(_csv_row(row, label))
    return out.getvalue()
