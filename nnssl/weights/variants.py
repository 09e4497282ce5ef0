"""Writes plan variants, with the checkpoint that they name brought into nnU-Net's folders."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

from nnssl.errors import NnsslError
from nnssl.files import sha256_of, write_atomic, write_json
from nnssl.networks import build_network
from nnssl.paths import FOLDERS, encode_path, preprocessed_folder, results_folder
from nnssl.plans.plan import Plan
from nnssl.plans.variants import derive
from nnssl.weights.apply import apply
from nnssl.weights.load import load
from nnssl.weights.refusals import agreement
from nnssl.weights.report import TransferReport
from nnssl.weights.wrappers import OtherNetwork

log = logging.getLogger("nnssl")


def write_variant(plan: Plan, name: str, *, checkpoint: str | Path | None = None, **changes: Any) -> Path:
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
        variant = derive(plan, name, **changes | _with_checkpoint(variant, name, Path(checkpoint), changes))
    elif plan.nnssl.get("checkpoint") and any(changes.get(key) is not None for key in ("features", "network")):
        raise NnsslError(
            f"{plan.plans_name} names a checkpoint for its own network; another one cannot use it. "
            f"Derive from {plan.base_plans} instead (-p {plan.base_plans})."
        )
    try:
        write_json(path, variant.plans, overwrite=False)
    except FileExistsError:
        raise taken from None
    return path


def _with_checkpoint(variant: Plan, name: str, checkpoint: Path, changes: dict[str, Any]) -> dict[str, Any]:
    """What a variant has besides where it names a checkpoint, which is tried and brought in; says what does not go as it is."""
    report = _check_fits(checkpoint, variant, **(changes.get("place") or {}))
    if report.adaptations or report.left_out:
        log.info("%s", report)
    else:
        for note in report.notes:
            log.info("  note      %s", note)
    digest = sha256_of(checkpoint)
    encoded = _import_checkpoint(checkpoint, digest, variant.dataset_name, name)
    backbone = [str(row.part) for row in report.parts if row.loaded or row.adapted]
    more: dict[str, Any] = {"checkpoint": encoded, "sha256": digest, "backbone": backbone}
    if variant.nnssl.get("schedule") == "linear_probe" and report.random_decoder:
        more["figures"] = {"levels": "encoder", **(changes.get("figures") or {})}
    return more


def _check_fits(path: Path, plan: Plan, key: str | None = None, prefix: str | None = None) -> TransferReport:
    """Load a checkpoint into a fresh network of the plan, to see whether fine-tuning could."""
    if not path.exists():
        raise NnsslError(f"--checkpoint: There is no checkpoint {path}.")
    network = build_network(plan)
    try:
        return apply(network, load(path, key=key, prefix=prefix), plan)
    except NnsslError as error:
        text = f"--checkpoint does not fit plans '{plan.plans_name}' ({plan.configuration}): {error}"
        if isinstance(error, OtherNetwork):
            text += f" With this plan's network {agreement(network.state_dict(), error.tensors)}."
        raise NnsslError(text) from error


def _import_checkpoint(path: Path, digest: str, dataset_name: str, name: str) -> str:
    """The form in which plans name a checkpoint, so that they stay valid on another machine.

    A file below one of nnU-Net's folders stays where it is. Any other is copied, once, to
    ``nnUNet_results/<dataset_name>/nnssl_imported/<first 12 digits of its sha256>_<name>.pth`` (or ``.safetensors``, as it is).
    """
    encoded = encode_path(path)
    if encoded.startswith(tuple(f"{folder}:" for folder in FOLDERS)):
        return encoded
    folder = results_folder() / dataset_name / "nnssl_imported"
    for copy in sorted(folder.glob(f"{digest[:12]}_*")):
        if sha256_of(copy) == digest:
            return encode_path(copy)
    folder.mkdir(parents=True, exist_ok=True)
    copy = folder / f"{digest[:12]}_{name}{'.safetensors' if path.suffix == '.safetensors' else '.pth'}"
    with open(path, "rb") as source:
        write_atomic(copy, lambda target: shutil.copyfileobj(source, target))
    return encode_path(copy)
