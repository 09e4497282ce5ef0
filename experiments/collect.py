"""Gathers what the finished jobs have left into the files that the report reads (see :mod:`nnssl.experiments.scores`)."""

from __future__ import annotations

import logging
import os
import platform
import shlex
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pandas as pd

from nnssl.errors import NnsslError
from nnssl.experiments.cases import Resolved, TestCase, cases_in
from nnssl.experiments.executor import Outcome
from nnssl.experiments.jobs import Job, Run
from nnssl.experiments.launch import typed
from nnssl.experiments.session import Session
from nnssl.files import read_json, write_json, write_text
from nnssl.variables import variables
from nnssl.weights.save import package_versions

log = logging.getLogger("nnssl")

CELL_COLUMNS = ("method", "labels", "setting", "seed", "fold")
CASE_COLUMNS = (*CELL_COLUMNS, "case", "label", "dice", "surface_dice", "hd95", "reference_voxels", "prediction_voxels")
CURVE_COLUMNS = (*CELL_COLUMNS, "epoch", "step", "pseudo_dice", "train_loss", "val_loss", "minutes")
FAILURE_COLUMNS = ("job", "phase", *CELL_COLUMNS, "reason", "log", "command")


def collect(session: Session, outcome: Outcome) -> int:
    """Write cases.csv, runs.csv, failures.csv, images.json and experiment.json; returns the number of runs that are evaluated.

    A call that runs nothing leaves what an earlier one has noted of commands, hardware and versions.
    """
    folder = session.folder
    results = [(run, found) for run in session.graph.runs if (found := _result(run.result)) is not None]
    for name, part, columns in (("cases.csv", "cases", CASE_COLUMNS), ("runs.csv", "curve", CURVE_COLUMNS)):
        _write_csv(folder / name, columns, [{**run.about, **row} for run, found in results for row in found[part]])
    _write_csv(folder / "failures.csv", FAILURE_COLUMNS, _failures(session, outcome))
    labels = {name: value for _, found in results for name, value in found["labels"].items()}
    write_json(folder / "images.json", _images([run for run, _ in results], labels))
    about, file = describe(session), folder / "experiment.json"
    if session.command is None and file.is_file():
        with suppress(NnsslError):
            before = read_json(file)
            about |= {k: before[k] for k in ("commands", "hardware", "versions") if before.get(k)}
    write_json(file, about)
    return len(results)


def _result(file: Path) -> dict[str, Any] | None:
    """What an evaluation has written; None, with a warning, where that is damaged, and where it is not there."""
    if not file.is_file():
        return None
    try:
        found = read_json(file)
        rows = [*found["cases"], *found["curve"]]
        if isinstance(found["labels"], dict) and all(isinstance(row, dict) for row in rows):
            return found
        why = "its parts are of another kind"
    except (NnsslError, KeyError, TypeError) as error:
        why = f"{error} is missing" if isinstance(error, KeyError) else str(error)
    log.warning("%s is damaged (%s) and is left out. Delete it, and the same command evaluates anew.", file, why)
    return None


def _write_csv(file: Path, columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
    text = pd.DataFrame(rows, columns=columns, dtype=object).to_csv(index=False, lineterminator="\n")
    write_text(file, text, errors="surrogateescape")


def _failures(session: Session, outcome: Outcome) -> list[dict[str, Any]]:
    graph, records = session.graph, session.records
    logs = {i: os.path.relpath(records.log(i), records.folder) for i in outcome.failed}
    reasons = {**outcome.failed, **{i: f"not run: {need} failed" for i, need in outcome.blocked.items()}}
    return [
        {**graph.jobs[i].about, "job": i, "phase": graph.jobs[i].phase, "reason": reason, "log": logs.get(i, ""),
         "command": graph.jobs[i].shown} for i, reason in reasons.items()
    ]  # fmt: skip


def _images(runs: Sequence[Run], labels: Mapping[str, Any]) -> dict[str, Any]:
    """Where images, references and predictions lie; by setting, since two datasets may name a case alike."""
    cases: dict[str, dict[str, Any]] = {}
    for run in runs:
        shown: Iterable[TestCase] = run.resolved.test
        if run.resolved.by_folds:
            found = cases_in(run.resolved.plan, "Tr")
            shown = [found[c] for c in run.subset.validating if c in found]
        mine = cases.setdefault(run.resolved.name, {})
        mine.update({c.name: {"image": c.images[0], "reference": c.reference} for c in shown})
    predictions = [{**run.about, "folder": str(run.predictions)} for run in runs]
    return {"cases": cases, "labels": dict(labels), "predictions": predictions}


def describe(session: Session) -> dict[str, Any]:
    """``experiment.json``: everything resolved, with how long it took and on what."""
    experiment, graph = session.experiment, session.graph
    records = {i: session.records.read(i) for i in graph.jobs}
    starts = [float(r["started"]) for r in records.values() if r.get("started")]
    seconds = sum(float(r.get("seconds") or 0) for r in records.values())
    settings = [_axes(s) for s in graph.settings]
    first = settings[0]
    return {
        "name": experiment.name,
        "title": experiment.title,
        **{k: v for k, v in first.items() if k != "name" and all(s[k] == v for s in settings)},
        "settings": settings,
        "pictures": experiment.pictures,
        "started": _clock(min(starts)) if starts else None,
        "finished": _clock(time.time()),
        "minutes": round(seconds / 60, 2),
        "notes": list(experiment.notes),
        "versions": package_versions(),
        "hardware": _hardware(session.device),
        "commands": _commands(session),
        "asked": [_asked(s) for s in graph.settings],
        "jobs": {i: _told(job, records[i]) for i, job in graph.jobs.items()},
    }


def _axes(resolved: Resolved) -> dict[str, Any]:
    """The rows and columns that the table of a setting will have."""
    return {
        "name": resolved.name,
        "methods": [arm.name for arm in resolved.setting.arms],
        "labels": sorted({d.count for d in resolved.subsets}),
        "seeds": list(resolved.setting.seeds),
        "folds": list(dict.fromkeys(d.fold for d in resolved.subsets)),
    }


def _clock(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def _told(job: Job, record: Mapping[str, Any]) -> dict[str, Any]:
    """The command that was run where it is known, else what would be, and how it went."""
    run = [str(word) for word in record.get("command") or job.command]
    command = shlex.join(typed(run[:-1] if run[-1] == "--c" else run))
    return {"command": command, **{k: record[k] for k in ("status", "seconds", "reason") if k in record}}


def _commands(session: Session) -> list[str]:
    """What repeats the experiment; nnU-Net's three folders are each machine's own."""
    environment = {**variables(), **session.experiment.environment}
    command = session.command or f"nnssl_label_efficiency {session.experiment.file.name}"
    return [*(f"export {k}={shlex.quote(v)}" for k, v in environment.items()), command]


def _asked(resolved: Resolved) -> dict[str, Any]:
    """What a setting came to: network, lengths, and the labelled cases of each draw."""
    plan, setting = resolved.network, resolved.setting
    return {
        "setting": resolved.name,
        "dataset": plan.dataset_name,
        "configuration": plan.configuration,
        "plans": plan.plans_name,
        "network": plan.network_class,
        "features": list(plan.features),
        "patch": list(plan.patch_size),
        "batch_size": plan.batch_size,
        "evaluated_on": "validation cases of the folds" if resolved.by_folds else "test cases",
        "test_cases": [t.name for t in resolved.test],
        "surface_tolerance_mm": setting.surface_tolerance_mm,
        "mirroring": setting.mirroring,
        "arms": {
            arm.name: {
                "method": Path(arm.method).name or "checkpoint",
                "schedule": arm.training.schedule,
                "figures": arm.training.figures,
                **arm.training.lengths,
                "pretraining": {} if arm.method == "scratch" else {
                    "epochs": arm.pretraining.epochs, "iterations": arm.pretraining.iterations,
                    "options": arm.pretraining.options, "datasets": list(arm.pretraining.datasets),
                },
            }
            for arm in setting.arms
        },
        "labelled": [{"labels": d.text, "seed": d.seed, "fold": d.fold, "cases": list(d.cases)} for d in resolved.subsets],
    }  # fmt: skip


def _hardware(device: str) -> dict[str, Any]:
    import torch

    out: dict[str, Any] = {
        "device": device,
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
    }
    if device == "cuda" and torch.cuda.is_available():
        out["gpu"] = torch.cuda.get_device_name(0)
        out["gpus"] = torch.cuda.device_count()
    return out
