"""What a run writes of itself: ``config.json`` and its checkpoints."""

from __future__ import annotations

import logging
from dataclasses import fields
from pathlib import Path
from typing import Any

from nnssl import checkpoint
from nnssl.distributed import world_size
from nnssl.errors import NnsslError
from nnssl.plans.unlabelled import case_key_hash
from nnssl.pretrain.engine.loop import Engine
from nnssl.pretrain.engine.messages import disk_reason
from nnssl.pretrain.engine.spec import RunSpec
from nnssl.pretrain.methods.registry import origin

log = logging.getLogger("nnssl")


def continued_record(spec: RunSpec, record: dict[str, Any]) -> dict[str, Any]:
    """The record of a run that goes on: what began it stays, and what continues it is added."""
    before, own = spec.folder.saved_config() or {}, origin(spec.method) or {}
    if (before.get("objective") or own).get("sha256") != own.get("sha256"):
        file = own.get("file", spec.method.name)
        log.warning("%s has changed since this run was started: it goes on with the objective as it is now.", file)
    first: dict[str, Any] = {k: before[k] for k in ("asked", "command", "environment") if k in before}
    return {**record, **first, "continued": [*before.get("continued", ()), record["command"]]}


def run_record(spec: RunSpec) -> dict[str, Any]:
    """``config.json``: what finds the run again, and everything resolved."""
    keys = ("method", "sources", "dataset", "plans_name", "configuration", "architecture_hash")
    return {
        "schema": 1,
        **{k: spec.identity[k] for k in keys},
        "base_plans": spec.plan.base_plans,
        "identity": spec.identity,
        "runtime": {"device": str(spec.device), "processes": world_size(), "workers": spec.workers},
        "objective": origin(spec.method),
        "crop_explanation": spec.request.explanation,
        "held_out_cases": len(spec.case_set.held_out),
        "versions": checkpoint.package_versions(),
    }


def payload(engine: Engine, training: dict[str, Any] | None = None) -> dict[str, Any]:
    """What a checkpoint holds: weights that nnU-Net reads, what they were made from, and the state of the training if given."""
    spec = engine.spec
    extra: dict[str, Any] = {}
    for hook in spec.hooks:
        extra.update(hook.checkpoint_info())
    if engine.verdict is not None:
        extra["verdict"] = engine.verdict
    if engine.started_from is not None:
        extra["started_from"] = engine.started_from
    return checkpoint.build_payload(
        engine.method.network,
        spec.plan,
        method=spec.method.name,
        config={f.name: getattr(spec.config, f.name) for f in fields(spec.config)},
        crop_size=spec.request.size,
        pretrained_parts=engine.method.pretrained_parts(),
        transfer={"parts": engine.method.default_transfer, "why": engine.method.transfer_reason},
        data={
            "sources": spec.identity["sources"],
            "cases": len(spec.case_set.cases),
            "fingerprint": spec.case_set.fingerprint_hash,
            "case_hashes": sorted(case_key_hash(ref.key) for ref in spec.case_set.cases),
        },
        citations=spec.method.citation,
        training=training,
        epoch=engine.step // spec.iterations,
        step=engine.step,
        steps=spec.steps,
        **extra,
    )


def save_checkpoint(engine: Engine, path: Path, state: dict[str, Any] | None) -> None:
    """Write a checkpoint whole; of the latest one, the one before is kept."""
    folder = engine.spec.folder
    try:
        if path == folder.latest:
            folder.keep_previous()
        checkpoint.save(path, payload(engine, state))
    except OSError as error:
        earlier = folder.latest.is_file() or folder.previous.is_file()
        whole = "The checkpoint saved before is whole. " if earlier else ""
        advice = disk_reason(error) or "See to the file system"
        raise NnsslError(
            f"cannot save {path}: {error.strerror or error}. {whole}{advice}, then continue with --c."
        ) from error
