"""TIS of measured runs from a table of downstream results."""

from __future__ import annotations

import csv
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from nnssl.errors import NnsslError, raise_problems
from nnssl.transferability.checkpoints import Run
from nnssl.transferability.indicator import baselines, rank_correlation, select_robust, tis

log = logging.getLogger("nnssl")

NO_PRETRAINING = ("scratch", "none", "no pretraining")


@dataclass(frozen=True)
class TISRow:
    """TIS of one run in one setup, with what makes it honest."""

    run: str
    setup: str
    selected: int | None  # epoch chosen by robustness; None where nothing could be chosen
    best: int  # epoch with the best Dice
    scores: dict[str, float]  # selector -> TIS: "robustness", and those of indicator.baselines
    spearman: float  # of robustness score and Dice over the trained checkpoints
    checkpoints: int  # trained ones with a Dice


def read_dice(path: Path) -> list[tuple[str, str, float]]:
    """Read downstream results, one line per fine-tuning, as ``(checkpoint, setup, dice)``.

    The CSV has the columns ``checkpoint`` (path or file name of a pretraining checkpoint, or ``scratch``) and ``dice``;
    optionally ``setup`` (for example the number of labels), and others such as ``seed``, which are not used.

    Raises:
        NnsslError: the file cannot be read, a column is missing, or a Dice is not a number in [0, 100].
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            rows = [{(k or "").strip().lower(): (v or "").strip() for k, v in r.items() if k} for r in reader]
            names = [(n or "").strip().lower() for n in reader.fieldnames or []]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise NnsslError(f"--dice {path} cannot be read: {error}") from error
    missing = [c for c in ("checkpoint", "dice") if c not in names]
    if missing:
        held = ", ".join(names) or "nothing"
        raise NnsslError(f"--dice {path} has no column {' and '.join(missing)}; it has {held}.")
    found, problems = [], []
    for i, row in enumerate(rows, start=2):
        try:
            value = float(row["dice"])
        except ValueError:
            value = math.nan
        if not 0 <= value <= 100:
            problems.append(f"line {i}: dice '{row['dice']}' is not a number from 0 to 1 or 0 to 100")
            continue
        found.append((row["checkpoint"], row.get("setup", ""), value))
    if not rows:
        problems.append("it has no lines")
    raise_problems(problems, f"--dice {path}")
    return found


def _matches(text: str, path: Path) -> bool:
    """Whether a name in the CSV means a file: the same path, or the end of it."""
    given = Path(text)
    if given.is_absolute() or given.exists():
        return given.resolve() == path.resolve()
    return path.resolve().parts[-len(given.parts) :] == given.parts


def tis_rows(runs: Sequence[Run], results: Sequence[tuple[str, str, float]]) -> list[TISRow]:
    """TIS of each run and setup from the lines of :func:`read_dice`.

    Several lines of one checkpoint and setup (seeds) are averaged, ``scratch`` counts as epoch 0 of every run.

    Raises:
        NnsslError: a result names no measured checkpoint, or several.
    """
    files = [(run, row) for run in runs for row in run.rows]
    problems: list[str] = []
    values: dict[tuple[str, str], dict[int, list[float]]] = {}
    scratch: dict[str, list[float]] = {}
    for text, setup, dice in results:
        if text.lower() in NO_PRETRAINING:
            scratch.setdefault(setup, []).append(dice)
            continue
        hits = [(run, row) for run, row in files if _matches(text, row.path)]
        if len(hits) == 1:
            run, row = hits[0]
            values.setdefault((run.name, setup), {}).setdefault(int(row.epoch or 0), []).append(dice)
        else:
            problems.append(f"'{text}' is {'none' if not hits else 'more than one'} of the measured checkpoints")
    raise_problems(list(dict.fromkeys(problems)), "--dice")
    out = []
    for run in runs:
        for setup in [s for name, s in values if name == run.name]:
            quality = {e: fmean(v) for e, v in values[run.name, setup].items()}
            if setup in scratch:
                quality.setdefault(0, fmean(scratch[setup]))
            out.append(_tis_row(run, setup, quality))
    return out


def _tis_row(run: Run, setup: str, quality: dict[int, float]) -> TISRow:
    losses = {e: v for e, v in run.losses.items() if e in quality and e > 0}
    lacking = sorted(e for e in run.losses if e not in quality and e > 0)
    if lacking:
        log.warning("%s %s: no Dice for epochs %s; they are left out.", run.name, setup, ", ".join(map(str, lacking)))
    selected = select_robust(losses)
    scores = {"robustness": tis(quality, selected), **baselines(quality)}
    best = max(sorted(quality), key=lambda e: quality[e])
    return TISRow(run.name, setup, selected, best, scores, rank_correlation(losses, quality), len(losses))
