"""The table on the terminal, and what a probe writes: JSON, CSV, picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nnssl.files import write_atomic, write_csv, write_json
from nnssl.paths import encode_path
from nnssl.probe.picture import draw
from nnssl.probe.result import Probe
from nnssl.weights import package_versions
from nnssl.words import aligned

SCHEMA = 1


def _number(value: float, sign: bool = False) -> str:
    return f"{value:{'+' if sign else ''}.1f}" if math.isfinite(value) else "-"


def table(found: Probe) -> str:
    """One line for each network and kind of stages: Dice in points, SD over cases, and the difference to random weights."""
    names = found.setup.classes.names if len(found.setup.classes.names) > 1 else ()
    lines = [["weights", "linear layer on", "Dice", "SD", "vs random", "95 % over cases", *names]]
    for row in found.rows:
        d, against, spread = row.difference, "", ""
        if d is not None:
            against, spread = _number(d.mean, True), f"{_number(d.low, True)} to {_number(d.high, True)}"
        elif len(row.inits) > 1:
            spread = f"{min(row.inits):.1f} to {max(row.inits):.1f}"
        each = [_number(dice) for dice, _ in zip(row.classes, names)]
        lines.append([row.name, row.stages, _number(row.mean), _number(row.sd), against, spread, *each])
    note = "(of random weights: lowest to highest initialisation in place of the interval)"
    return f"{_cases_text(found)}\n\n{aligned(lines, left=2)}\n{note}"


def _cases_text(found: Probe) -> str:
    setup = found.setup
    plan, n, folds = setup.plan, len(setup.scored), setup.folds
    where = f"{plan.dataset_name}, {plan.plans_name}, {plan.configuration}"
    if len(folds) == 1:
        return f"{where}: fitted on {len(folds[0].fit)} labelled cases, scored on {n} others."
    if len(folds) == n:
        others = f"the {n - 1} others" if n > 2 else "the other one"
        return f"{where}: {n} labelled cases, each scored by a layer that was fitted on {others}."
    return f"{where}: {n} labelled cases, scored in {len(folds)} parts by layers that were fitted on the others."


def as_json(found: Probe) -> dict[str, Any]:
    """Everything as plain values; Dice in points."""
    setup, names = found.setup, found.setup.classes.names
    rows = []
    for row in found.rows:
        entry: dict[str, Any] = {
            "name": row.name,
            "stages": row.stages,
            "decoder_stages": row.n_decoder,
            "dice": _plain(row.mean),
            "sd": _plain(row.sd),
            "inits": [_plain(v) for v in row.inits],
            "cases": {case: _plain(v) for case, v in zip(setup.scored, row.cases)},
            "classes": {name: _plain(v) for name, v in zip(names, row.classes)},
        }
        if row.difference is not None:
            entry["difference"] = {k: _plain(v) for k, v in row.difference._asdict().items()}
        rows.append(entry)
    checkpoints = [
        {
            "name": s.name,
            "path": encode_path(s.path),
            "sha256": s.sha256,
            "method": s.method,
            "labels_seen": len(s.seen),
            "report": s.report.to_dict(),
        }
        for s in found.sources
    ]
    return {
        "schema": SCHEMA,
        "asked": found.asked,
        "dataset": setup.plan.dataset_name,
        "plans": setup.plan.plans_name,
        "configuration": setup.plan.configuration,
        "seed": setup.seed,
        "step": setup.step,
        "device": str(setup.device),
        "folds": [{"fit": list(f.fit), "score": list(f.score)} for f in setup.folds],
        "voxels_per_label_and_case": setup.per_label,
        "rows": rows,
        "checkpoints": checkpoints,
        "sentences": found.sentences,
        "warnings": found.warnings,
        "seconds": round(found.seconds, 1),
        "versions": package_versions(),
    }


def _plain(value: float) -> float | int | None:
    if isinstance(value, int):
        return value
    return round(float(value), 3) if math.isfinite(value) else None


def write_all(folder: Path, found: Probe) -> list[Path]:
    """Write ``probe.json``, ``probe.csv`` (a line per case) and ``probe.png``; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / name for name in ("probe.json", "probe.csv", "probe.png")]
    write_json(files[0], as_json(found))
    lines: list[Sequence[object]] = [("weights", "stages", "case", "dice")]
    for row in found.rows:
        lines += [(row.name, row.stages, case, _plain(dice)) for case, dice in zip(found.setup.scored, row.cases)]
    write_csv(files[1], lines)
    picture = draw(found)
    write_atomic(files[2], lambda file: file.write(picture))
    return files
