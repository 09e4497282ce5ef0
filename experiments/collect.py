"""Gathers what the finished jobs have left into the files that the report reads (see :mod:`nnssl.experiments.scores`)."""

from __future__ import annotations

import logging
import math
import os
import platform
import shlex
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from nnssl.errors import NnsslError
from nnssl.experiments.cases import Resolved, cases_in
from nnssl.experiments.executor import Outcome
from nnssl.experiments.experiment import Experiment
from nnssl.experiments.jobs import Graph, Job, Run
from nnssl.experiments.launch import typed
from nnssl.experiments.records import Records
from nnssl.files import read_json, write_csv, write_json
from nnssl.variables import variables
from nnssl.weights.save import package_versions

log = logging.getLogger("nnssl")

CASE_COLUMNS = ("method", "labels", "setting", "seed", "fold", "case", "label", "dice", "surface_dice", "hd95",
                "reference_voxels", "prediction_voxels")  # fmt: skip
CURVE_COLUMNS = ("method", "labels", "setting", "seed", "fold", "epoch", "step", "pseudo_dice", "train_loss", "val_loss",
                 "minutes")  # fmt: skip
FAILURE_COLUMNS = ("job", "phase", "method", "labels", "setting", "seed", "fold", "reason", "log", "command")


def collect(
    folder: Path,
    experiment: Experiment,
    graph: Graph,
    records: Records,
    outcome: Outcome | None,
    device: str,
    command: str | None = None,
) -> int:
    """Write cases.csv, runs.csv, failures.csv, images.json and experiment.json.

    Args:
        folder: the output folder.
        experiment, graph: what is asked for.
        records: of the jobs.
        outcome: of this call's jobs, for the failures; None leaves failures.csv empty.
        device: that the jobs ran on.
        command: the command line of this call; None where it runs nothing, and what an earlier call has noted of commands,
            hardware and versions stays.

    Returns:
        The number of runs that are evaluated.
    """
    cases, curves, done, labels = [], [], [], {}
    for run in graph.runs:
        found = _result(run.result)
        if found is None:
            continue
        done.append(run)
        labels.update(found["labels"])
        cases += [{**run.about, **row} for row in found["cases"]]
        curves += [{**run.about, **row} for row in found["curve"]]
    _write_csv(folder / "cases.csv", CASE_COLUMNS, cases)
    _write_csv(folder / "runs.csv", CURVE_COLUMNS, curves)
    _write_csv(folder / "failures.csv", FAILURE_COLUMNS, _failures(graph, records, outcome))
    write_json(folder / "images.json", _images(done, labels))
    about = describe(experiment, graph, records, device, command or f"nnssl_label_efficiency {experiment.file.name}")
    file = folder / "experiment.json"
    if command is None and file.is_file():
        with suppress(NnsslError):
            before = read_json(file)
            about |= {k: before[k] for k in ("commands", "hardware", "versions") if before.get(k)}
    write_json(file, about)
    return len(done)


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


def _write_csv(file: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    values = ([row.get(k, "") for k in columns] for row in rows)
    empty = (["" if isinstance(v, float) and math.isnan(v) else v for v in row] for row in values)
    write_csv(file, [columns, *empty])


def _failures(graph: Graph, records: Records, outcome: Outcome | None) -> list[dict[str, Any]]:
    rows = []
    for job_id, reason in (outcome.failed if outcome else {}).items():
        job = graph.jobs[job_id]
        log = os.path.relpath(records.log(job_id), records.folder)
        rows.append(
            {**job.about, "job": job_id, "phase": job.phase, "reason": reason, "log": log, "command": job.shown}
        )
    for job_id, need in (outcome.blocked if outcome else {}).items():
        job = graph.jobs[job_id]
        rows.append(
            {**job.about, "job": job_id, "phase": job.phase, "reason": f"not run: {need} failed", "command": job.shown}
        )
    return rows


def _images(runs: Sequence[Run], labels: Mapping[str, Any]) -> dict[str, Any]:
    """Where images, references and predictions lie; by setting, since two datasets may name a case alike."""
    cases: dict[str, dict[str, Any]] = {}
    for run in runs:
        mine = cases.setdefault(run.resolved.name, {})
        for case in run.resolved.test:
            mine[case.name] = {"image": case.images[0], "reference": case.reference}
        if run.resolved.by_folds:
            mine.update(_fold_images(run))
    predictions = [{**run.about, "folder": str(run.predictions)} for run in runs]
    return {"cases": cases, "labels": dict(labels), "predictions": predictions}


def _fold_images(run: Run) -> dict[str, Any]:
    found = cases_in(run.resolved.plan, "Tr")
    return {
        c: {"image": found[c].images[0], "reference": found[c].reference} for c in run.draw.validating if c in found
    }


def describe(experiment: Experiment, graph: Graph, records: Records, device: str, command: str) -> dict[str, Any]:
    """``experiment.json``: everything resolved, with how long it took and on what."""
    all_records = records.all()
    mine = [all_records[i] for i in graph.jobs if i in all_records]
    starts = [float(r["started"]) for r in mine if r.get("started")]
    seconds = sum(float(r.get("seconds") or 0) for r in mine)
    settings = [_axes(s) for s in graph.settings]
    return {
        "name": experiment.name,
        "title": experiment.title,
        **{
            k: settings[0][k]
            for k in ("methods", "labels", "seeds", "folds")
            if all(s[k] == settings[0][k] for s in settings)
        },
        "settings": settings,
        "pictures": experiment.pictures,
        "started": _clock(min(starts)) if starts else None,
        "finished": _clock(time.time()),
        "minutes": round(seconds / 60, 2),
        "notes": list(experiment.notes),
        "versions": package_versions(),
        "hardware": _hardware(device),
        "commands": _commands(experiment, command),
        "asked": [_asked(s) for s in graph.settings],
        "jobs": {
            i: {"command": _command(job, all_records.get(i, {})), **_short(all_records.get(i, {}))}
            for i, job in graph.jobs.items()
        },
    }


def _axes(resolved: Resolved) -> dict[str, Any]:
    """The rows and columns that the table of a setting will have."""
    return {
        "name": resolved.name,
        "methods": [arm.name for arm in resolved.setting.arms],
        "labels": sorted({d.count for d in resolved.draws}),
        "seeds": list(resolved.setting.seeds),
        "folds": list(dict.fromkeys(d.fold for d in resolved.draws)),
    }


def _clock(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def _short(record: Mapping[str, Any]) -> dict[str, Any]:
    return {k: record[k] for k in ("status", "seconds", "reason") if k in record}


def _command(job: Job, record: Mapping[str, Any]) -> str:
    """What was run where it is known, else what would be."""
    run = [str(word) for word in record.get("command") or job.command]
    return shlex.join(typed(run[:-1] if run[-1] == "--c" else run))


def _commands(experiment: Experiment, command: str) -> list[str]:
    """What repeats the experiment; nnU-Net's three folders are each machine's own."""
    environment = {**variables(), **experiment.environment}
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
                "method": arm.method or "checkpoint",
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
        "labelled": [{"labels": d.text, "seed": d.seed, "fold": d.fold, "cases": list(d.cases)} for d in resolved.draws],
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
