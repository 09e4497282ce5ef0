"""Writes plan variants: with the checkpoint that they name brought into nnU-Net's folders, and the cases that they train on."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from nnssl.errors import NnsslError
from nnssl.files import write_json
from nnssl.paths import preprocessed_folder
from nnssl.plans.plan import Plan
from nnssl.plans.variants import derive
from nnssl.weights.imports import check_fits, import_checkpoint

log = logging.getLogger("nnssl")


def write_variant(
    plan: Plan,
    name: str,
    *,
    checkpoint: str | Path | None = None,
    **changes: Any,
) -> Path:
    """Derive a variant, see :func:`nnssl.plans.derive`, and write it beside its base.

    Args:
        plan: what it is derived from; read from ``nnUNet_preprocessed``.
        name: the variant's name.
        checkpoint: a checkpoint file. Outside nnU-Net's folders it is copied to
            ``nnUNet_results/<Dataset>/nnssl_imported/<sha256>_<name>.pth``.
        changes: what it has besides, by the names of :class:`nnssl.plans.Changes`.

    Returns:
        ``nnUNet_preprocessed/<Dataset>/<plans>_<name>.json``.

    Raises:
        NnsslError: as :func:`nnssl.plans.derive`; also where the variant exists already, or the checkpoint cannot be read or
            does not fit the variant's network.
    """
    variant = derive(plan, name, **changes)
    path = preprocessed_folder() / plan.dataset_name / f"{variant.plans_name}.json"
    taken = NnsslError(f"{path} exists already and is left as it is. Choose another --name.")
    if path.exists():
        raise taken
    if checkpoint is not None:
        report = check_fits(checkpoint, variant, **(changes.get("place") or {}))
        if report.adaptations or report.left_out:
            log.info("%s", report)
        else:
            for note in report.notes:
                log.info("  note      %s", note)
        changes["backbone"] = [part.part for part in report.parts if part.loaded or part.adapted]
        if variant.nnssl.get("schedule") == "linear_probe" and report.random_decoder:
            changes["figures"] = {"levels": "encoder", **(changes.get("figures") or {})}
        encoded, digest = import_checkpoint(checkpoint, variant.dataset_name, name)
        variant = derive(plan, name, checkpoint=encoded, sha256=digest, **changes)
    elif {"features", "network"} & {k for k, v in changes.items() if v is not None} and plan.nnssl.get("checkpoint"):
        raise NnsslError(
            f"{plan.plans_name} names a checkpoint for its own network; another one cannot use it. "
            f"Derive from {plan.base_plans} instead (-p {plan.base_plans})."
        )
    try:
        write_json(path, variant.plans, overwrite=False)
    except FileExistsError:
        raise taken from None
    return path
