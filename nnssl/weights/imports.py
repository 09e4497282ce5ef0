"""Brings the checkpoint that a plan variant names into nnU-Net's folders."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from nnssl.errors import NnsslError
from nnssl.files import sha256_of, write_atomic
from nnssl.networks import build_network
from nnssl.paths import FOLDERS, encode_path, results_folder
from nnssl.plans.plan import Plan
from nnssl.weights.apply import apply
from nnssl.weights.load import load
from nnssl.weights.refusals import agreement
from nnssl.weights.report import TransferReport
from nnssl.weights.wrappers import OtherNetwork


def check_fits(
    path: str | os.PathLike[str], plan: Plan, key: str | None = None, prefix: str | None = None
) -> TransferReport:
    """Load a checkpoint into a fresh network of the plan, to see whether fine-tuning could.

    Raises:
        NnsslError: the file cannot be read, holds another network, or does not fit the plan's (says why).
    """
    if not Path(path).exists():
        raise NnsslError(f"--checkpoint: There is no checkpoint {path}.")
    network = build_network(plan)
    try:
        return apply(network, load(path, key=key, prefix=prefix), plan)
    except OtherNetwork as error:
        agree = f"With this plan's network {agreement(network.state_dict(), error.tensors)}."
        raise NnsslError(
            f"--checkpoint does not fit plans '{plan.plans_name}' ({plan.configuration}): {error} {agree}"
        ) from error
    except NnsslError as error:
        raise NnsslError(
            f"--checkpoint does not fit plans '{plan.plans_name}' ({plan.configuration}): {error}"
        ) from error


def import_checkpoint(path: str | os.PathLike[str], dataset_name: str, name: str) -> tuple[str, str]:
    """The form in which plans name a checkpoint, so that they stay valid on another machine.

    A file below one of nnU-Net's folders stays where it is. Any other is copied, once, to
    ``nnUNet_results/<dataset_name>/nnssl_imported/<first 12 digits of its sha256>_<name>.pth`` (or ``.safetensors``, as it is).

    Returns:
        the path as :func:`nnssl.paths.encode_path` writes it, and the sha256 (hex) of the file.
    """
    path = Path(path)
    digest = sha256_of(path)
    encoded = encode_path(path)
    if encoded.startswith(tuple(f"{folder}:" for folder in FOLDERS)):
        return encoded, digest
    folder = results_folder() / dataset_name / "nnssl_imported"
    for copy in sorted(folder.glob(f"{digest[:12]}_*")):
        if sha256_of(copy) == digest:
            return encode_path(copy), digest
    folder.mkdir(parents=True, exist_ok=True)
    copy = folder / f"{digest[:12]}_{name}{'.safetensors' if path.suffix == '.safetensors' else '.pth'}"
    with open(path, "rb") as source:
        write_atomic(copy, lambda target: shutil.copyfileobj(source, target))
    return encode_path(copy), digest
