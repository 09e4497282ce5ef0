"""Tables, curves and one page from the result folder of an experiment, finished or not.

Written into the folder: ``table.md``, ``table.csv``, ``table.tex`` (compiles, and shows ``table_body.tex``),
``dice_over_labels*.png`` and ``.svg``, ``training_curves*.png`` and ``.svg``, ``overlays/*.png`` and ``report.html``, which opens
offline and holds all of it. What is read is described in :mod:`nnssl.experiments.scores`.
"""

from __future__ import annotations

import itertools
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from nnssl.experiments import curves as draw
from nnssl.experiments import html, interpretation, provenance, tables
from nnssl.experiments.overlay import COLOURS, remove_overlays, write_overlays
from nnssl.experiments.published import (
    COLUMNS,
    LEFT_OVER,
    PUBLISHED,
    left_over,
    left_over_table,
    of_setting,
    published_notes,
    published_table,
    read_published,
)
from nnssl.experiments.scores import Scores, read_json_file, read_scores, read_table
from nnssl.experiments.summary import read_curves, summarise
from nnssl.experiments.tables import Table
from nnssl.files import write_text

log = logging.getLogger("nnssl")

CURVE_CAPTION = (
    "Mean Dice over the number of labelled cases. Lines: mean over seeds; bands: one standard deviation over seeds; dots: "
    "single seeds."
)
TRAINING_CAPTION = (
    "Pseudo Dice on validation patches during fine-tuning. Lines: mean over runs, up to the last epoch that all have "
    "reached; bands: range."
)


@dataclass(frozen=True)
class _Data:
    """All that the writers need of an experiment."""

    folder: Path
    about: dict[str, Any]
    scores: Scores
    rows: pd.DataFrame
    curves: pd.DataFrame
    published: pd.DataFrame

    @property
    def title(self) -> str:
        return str(self.about.get("title") or self.about.get("name") or "Label efficiency")

    def of(self, setting: str) -> pd.DataFrame:
        return self.rows[self.rows["setting"] == setting]

    def figures(self, setting: str) -> pd.DataFrame:
        return of_setting(self.published, setting, self.scores.settings)


def _read(folder: Path, published: str | Path | None) -> _Data:
    about = read_json_file(folder / "experiment.json")
    scores = read_scores(folder, about)
    only = scores.settings[0] if len(scores.settings) == 1 else ""
    curves = read_curves(read_table(folder / "runs.csv", ("method", "labels", "seed", "epoch")), only)
    figures = pd.DataFrame(columns=COLUMNS, dtype=object) if published is None else read_published(published)
    return _Data(folder, about, scores, summarise(scores, curves), curves, figures)


def _tables(data: _Data, setting: str) -> list[Table]:
    rows = data.of(setting)
    found = [tables.metric_table(rows, "dice", "Dice, %"), tables.comparison_table(rows)]
    for metric, title in (("surface_dice", "Surface Dice, %"), ("hd95_mm", "HD95, mm (lower is better)")):
        if rows[metric].notna().any():
            found.append(tables.metric_table(rows, metric, title))
    found += [tables.label_table(rows), published_table(rows, data.figures(setting))]
    return [t for t in found if t is not None]


def _write_tables(data: _Data) -> None:
    parts = [f"# {data.title}"]
    latex = [r"% needs \usepackage{booktabs} and \usepackage{graphicx}; table.tex shows them"]
    for setting in data.scores.settings:
        rows, figures = data.of(setting), data.figures(setting)
        parts += [f"## {setting or 'Results'}", _listed(interpretation.answers(rows))]
        for content in _tables(data, setting):
            parts += [f"### {content.title}", tables.markdown(content)]
            latex.append(tables.tex(content, f"{setting + ': ' if setting else ''}{content.title}"))
        parts.append(_listed([*tables.notes(rows), *published_notes(figures)]))
    rest = left_over(data.published, data.scores.settings)
    if len(rest):
        parts += [f"## {LEFT_OVER}", f"{len(rest)} figures are listed in report.html, of: {_names_of(rest)}."]
    parts += ["## How to read this", _listed(interpretation.EXPLANATIONS)]
    write_text(data.folder / "table.md", "\n\n".join(part for part in parts if part) + "\n")
    write_text(data.folder / "table_body.tex", "\n\n".join(latex) + "\n")
    write_text(data.folder / "table.tex", tables.TEX_PAGE)
    write_text(data.folder / "table.csv", tables.csv_text(data.rows))


def _listed(lines: Sequence[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _names_of(rest: pd.DataFrame) -> str:
    return ", ".join(rest["setting"].replace("", tables.NOTHING).unique())


def _left_over(rest: pd.DataFrame) -> dict[str, Any] | None:
    if rest.empty:
        return None
    title = f"{len(rest)} figures of {_names_of(rest)}"
    return {"title": title, "table": left_over_table(rest), "notes": published_notes(rest)[1:]}


def _pictures(data: _Data, setting: str) -> list[html.Picture]:
    methods = data.scores.methods(setting)
    suffix = "" if len(data.scores.settings) < 2 else "_" + re.sub(r"[^\w-]", "_", setting)
    over_labels = draw.dice_over_labels(data.scores, data.rows, setting)
    training = draw.training_curves(data.curves, setting, methods)
    out = []
    for name, figure, caption, shown in (
        ("dice_over_labels", over_labels, CURVE_CAPTION, "Dice of {} over the number of labelled cases"),
        ("training_curves", training, TRAINING_CAPTION, "Training curves of {}"),
    ):
        if figure is not None:
            svg = draw.save(figure, data.folder / f"{name}{suffix}")
            out.append(html.Picture(svg, caption, shown.format(", ".join(methods))))
    return out


def _setting(data: _Data, setting: str) -> dict[str, Any]:
    shown, drawn = data.about.get("pictures") is not False, []
    if shown:
        images = read_json_file(data.folder / "images.json")
        drawn = write_overlays(data.scores, data.rows, images, setting, data.folder / "overlays") if images else []
    return {
        "answers": interpretation.answers(data.of(setting)),
        "tables": _tables(data, setting),
        "published_notes": published_notes(data.figures(setting)),
        "notes": tables.notes(data.of(setting)),
        "pictures": _pictures(data, setting),
        "without_cases": not shown,
        "cases": drawn,
        "baseline": data.scores.methods(setting)[0] if drawn else "",
        "legend": list(zip(itertools.cycle(COLOURS), data.scores.label_names(setting))),
    }


def write(folder: str | Path, published: str | Path | None = None) -> Path:
    """Write tables, pictures and ``report.html`` from whatever an experiment has measured so far.

    Args:
        folder: the result folder, with the files that :mod:`nnssl.experiments.scores` describes; any may be missing.
        published: a CSV of published figures to put beside ours, see :mod:`nnssl.experiments.published`.

    Returns:
        ``report.html``.

    Raises:
        NnsslError: a line of a CSV makes no sense, naming file and line.
    """
    folder = Path(folder)
    data = _read(folder, published)
    _write_tables(data)
    remove_overlays(folder / "overlays")
    failed = read_table(folder / "failures.csv")
    page = html.template().render(
        title=data.title,
        lead=provenance.lead(data.about, data.rows, failed),
        settings={setting: _setting(data, setting) for setting in data.scores.settings},
        others=_left_over(left_over(data.published, data.scores.settings)),
        failures=provenance.failures(failed),
        reading=interpretation.EXPLANATIONS,
        made=provenance.made(data.about),
        published=PUBLISHED,
    )
    write_text(folder / "report.html", page)
    log.info("Wrote %s.", folder / "report.html")
    return folder / "report.html"
