"""The results of an experiment as tables of text, and these as Markdown, LaTeX and CSV. A dash: nothing yet."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from nnssl.experiments.scores import Labels, label_order
from nnssl.experiments.statistics import Factor
from nnssl.experiments.summary import CSV_COLUMNS, EVENTS, MEAN, verdict
from nnssl.words import counted

NOTHING = "–"
FEW_CASES = 10


@dataclass(frozen=True)
class Table:
    """Text cells below a line of heads.

    Attributes:
        left: so many columns are left aligned; with two or more, a change in the first one is marked by a rule.
        tones: (line, column) of cells that stand out: ``"up"`` or ``"down"``.
    """

    title: str
    frame: pd.DataFrame
    left: int = 1
    tones: dict[tuple[int, int], str] = field(default_factory=dict)


def plus_minus(mean: float, sd: float = math.nan, form: str = ".1f") -> str:
    """``81.2 ± 0.4``; without a deviation the mean alone; a dash without a mean."""
    if math.isnan(mean):
        return NOTHING
    return f"{mean:{form}}" + ("" if math.isnan(sd) else f" ± {sd:.1f}")


def signed(value: float) -> str:
    """``+1.2``, or a dash."""
    return plus_minus(value, form="+.1f")


def p_text(p: float) -> str:
    """A p value with two significant digits, ``<0.001`` below, a dash for NaN."""
    return NOTHING if math.isnan(p) else "<0.001" if p < 0.001 else f"{p:.3f}" if p < 0.0995 else f"{p:.2f}"


def factor_text(factor: Factor) -> str:
    """``2.8×``, ``>4.0×`` where it lies beyond what was measured."""
    return NOTHING if math.isnan(factor.value) else f"{factor.bound}{factor.value:.1f}×"


def epochs_text(row: Any) -> str:
    """``12 / 47``: the method's and scratch's epochs; ``>50`` where the target was not reached."""
    return f"{row.epochs_to_scratch} / {row.scratch_epochs}" if pd.notna(row.epochs_to_scratch) else NOTHING


def label_factor_text(row: Any) -> str:
    """``2.8× [2.1×, >4.0×]``; one figure where all three are the same."""
    if pd.isna(row.label_factor) or math.isnan(row.label_factor.value):
        return NOTHING
    value, low, high = map(factor_text, (row.label_factor, row.label_factor_low, row.label_factor_high))
    return value if value == low == high else f"{value} [{low}, {high}]"


def labels_text(labels: Labels) -> str:
    """``1 label``, ``4 labels``, ``all``."""
    return f"{labels} label{'s' * (labels != 1)}" if isinstance(labels, int) else str(labels)


def seeds_mark(row: Any) -> str:
    """`` (2/3)`` where only two of three seeds are complete; nothing where all are, or none is there at all."""
    return f" ({row.seeds}/{row.seeds_wanted})" if row.seeds < row.seeds_wanted and row.measured else ""


def means(rows: pd.DataFrame) -> pd.DataFrame:
    """The lines of the means over labels: one for each cell."""
    return rows[rows["label"] == MEAN]


def baseline_of(rows: pd.DataFrame) -> str:
    """The method that the others of a setting are compared with, its first one; empty without rows."""
    return "" if rows.empty else rows["method"].iloc[0]


def _by_labels(rows: pd.DataFrame) -> pd.DataFrame:
    return rows.sort_values("labels", key=lambda labels: labels.map(label_order), kind="stable")


def metric_table(rows: pd.DataFrame, metric: str, title: str) -> Table:
    """Methods by numbers of labels: mean over labels, mean and deviation over seeds. ``rows`` are of one setting."""
    own = means(rows)
    texts = [plus_minus(getattr(r, metric), getattr(r, f"{metric}_sd")) + seeds_mark(r) for r in own.itertuples()]
    frame = own.assign(text=texts).pivot(index="method", columns="labels", values="text")
    frame = frame.reindex(index=own["method"].unique(), columns=own["labels"].unique())
    return Table(title, frame.set_axis([labels_text(n) for n in frame], axis=1).reset_index())


def label_table(rows: pd.DataFrame) -> Table | None:
    """Dice of each label beside the mean, of what has been measured; None where there is one label only."""
    names = [n for n in rows["label"].unique() if n != MEAN]
    if len(names) < 2:
        return None
    own = _by_labels(rows[rows["measured"]])
    own = own.assign(labels=own["labels"].map(str), text=list(map(plus_minus, own["dice"], own["dice_sd"])))
    cells = own.set_index(["labels", "method"]).index.unique()
    frame = own.pivot(index=["labels", "method"], columns="label", values="text")
    frame = frame.reindex(index=cells, columns=[*names, MEAN]).fillna(NOTHING)
    return Table("Dice of each label, %", frame.reset_index(allow_duplicates=True), left=2)


def comparison_table(rows: pd.DataFrame) -> Table | None:
    """Each method against the baseline, which is the first, where it has been measured; None where there is nothing else."""
    base = baseline_of(rows)
    own = _by_labels(means(rows[rows["measured"]]))
    others = list(own[own["method"] != base].itertuples())
    if not others:
        return None
    texts = {
        "labels": [str(r.labels) for r in others],
        "method": [r.method for r in others],
        "Dice, %": [plus_minus(r.dice, r.dice_sd) for r in others],
        f"gain over {base}": [
            plus_minus(r.gain, r.gain_sd, "+.1f") + seeds_mark(r) * (not math.isnan(r.cases)) for r in others
        ],
        "95 % interval": [
            NOTHING if math.isnan(r.gain_low) else f"{r.gain_low:+.1f} to {r.gain_high:+.1f}" for r in others
        ],
        "p": [p_text(r.p) for r in others],
        "p (Holm)": [p_text(r.p_holm) for r in others],
        "cases better": [NOTHING if math.isnan(r.cases) else f"{r.cases_better:.0f}/{r.cases:.0f}" for r in others],
        "label factor": [label_factor_text(r) for r in others],
        f"epochs / {base}": [epochs_text(r) for r in others],
    }
    kinds = [verdict(r) for r in others]
    tones = {(i, 3): {"better": "up", "worse": "down"}[k] for i, k in enumerate(kinds) if k in ("better", "worse")}
    return Table(f"Against {base}", pd.DataFrame(texts), 2, tones)


def notes(rows: pd.DataFrame) -> list[str]:
    """What must be known to read the tables: missing cells, incomplete seeds, empty references. Sentences without markup."""
    out, own = [], means(rows)
    measured = own[own["measured"]]
    partial = (measured["seeds"] < measured["seeds_wanted"]).sum()
    if len(measured) < len(own):
        out.append(f"Without a result so far ({NOTHING}): {len(own) - len(measured)} of {len(own)} cells.")
    if partial:
        out.append(
            f"Incomplete: {partial} of {len(own)} cells; (2/3) means that 2 of 3 seeds have all their folds and cases."
        )
    if (measured["seeds_wanted"] < 2).any():
        out.append(
            "Only one seed: no deviation can be given, and another draw of the labelled cases may turn the order round."
        )
    fewest = own["cases"].min()
    if fewest < FEW_CASES:
        cases = counted(int(fewest), "test case")
        out.append(f"Only {cases}: the intervals are too short, and p is large whatever the difference.")
    empty, false_alarms, missed, undefined = own[EVENTS].sum().astype(int)
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


def markdown(table: Table) -> str:
    """A GitHub table, its columns aligned in the text as well."""
    lines = [list(table.frame), *table.frame.to_numpy().tolist()]
    columns = []
    for i, column in enumerate(zip(*lines)):
        head, *cells = (text.replace("|", "\\|") for text in column)
        width, left = max(3, len(head), *map(len, cells)), i < table.left
        rule = "-" * width if left else "-" * (width - 1) + ":"
        columns.append([c.ljust(width) if left else c.rjust(width) for c in (head, rule, *cells)])
    return "\n".join(f"| {' | '.join(line)} |" for line in zip(*columns))


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
    frame = table.frame.map(tex_escape).rename(columns=tex_escape)
    if table.left > 1:
        first = frame.iloc[:, 0]
        frame.isetitem(0, first.mask(first.ne(first.shift(fill_value=first.iloc[0])), r"\addlinespace " + first))
    columns = "l" * table.left + "r" * (frame.shape[1] - table.left)
    tabular = frame.to_latex(index=False, escape=False, column_format=columns).rstrip()
    head = [r"\begin{table}", r"\centering", rf"\caption{{{tex_escape(caption)}}}", FIT]
    return "\n".join([*head, f"{tabular}}}", r"\end{table}"])


def csv_text(rows: pd.DataFrame) -> str:
    """Everything as one line per cell and label, ``mean`` first: Dice in percent, HD95 in mm; empty: no value."""
    return rows.to_csv(columns=CSV_COLUMNS, index=False, float_format="%.6g", lineterminator="\n")
