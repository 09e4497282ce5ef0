"""Builds a checkpoint's content and writes it whole or not at all."""

from __future__ import annotations

import hashlib
import os
import platform
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, is_dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor, nn

from nnssl.files import write_atomic
from nnssl.networks import full_state_dict
from nnssl.parts import DECODER, promised_parts
from nnssl.plans import Plan
from nnssl.weights.adaptation_plan import adaptation_plan, citation_entries
from nnssl.weights.load import SCHEMA

_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.Size, torch.dtype, torch.device)
_PACKAGES = ("nnssl", "nnunetv2", "torch", "dynamic-network-architectures", "numpy")


def plain(value: Any, where: str = "checkpoint") -> Any:
    """Reduce a value to what ``torch.load(weights_only=True)`` reads: tensors, numbers, text, lists, tuples, dicts.

    Numpy scalars become Python numbers, dataclasses dicts, paths text; tensors are kept as they are.

    Raises:
        TypeError: for anything else, naming where it is.
    """
    if type(value) in _PLAIN or isinstance(value, Tensor):
        return value
    if isinstance(value, str):
        return str(value)
    if isinstance(value, np.generic):
        return plain(value.item(), where)
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value), where)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Mapping):
        kind = OrderedDict if type(value) is OrderedDict else dict
        return kind((plain(k, where), plain(v, f"{where}[{k!r}]")) for k, v in value.items())
    if type(value) in (list, tuple):
        return type(value)(plain(v, f"{where}[{i}]") for i, v in enumerate(value))
    if isinstance(value, (set, frozenset)):
        return sorted(plain(v, where) for v in value)
    raise TypeError(
        f"{where} holds a {type(value).__module__}.{type(value).__qualname__}, which weights_only loading cannot read; "
        "store a tensor or plain Python values instead"
    )


def save(path: str | os.PathLike[str], payload: Mapping[str, Any]) -> None:
    """Write a checkpoint: temporary file in the same folder, synced, then renamed. The old file stays whole until then.

    Args:
        path: the file; its folder must exist.
        payload: from :func:`build_payload`, or any dict of tensors and plain values.

    Raises:
        TypeError: for content that ``torch.load(weights_only=True)`` could not read back; nothing is written.
        OSError: no space, no permission; the old file is untouched.
    """
    content = plain(payload)

    def write(file: BinaryIO) -> None:
        try:
            torch.save(content, file)
        except RuntimeError as error:
            # on a full disk, and after Ctrl-C, torch's own closing of the archive fails too, and hides why
            hidden = error.__context__
            while hidden is not None and not isinstance(hidden, (OSError, KeyboardInterrupt)):
                hidden = hidden.__context__
            if hidden is None:
                raise
            raise hidden from error

    write_atomic(path, write)


def package_versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide what the weights mean."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "unknown"
    return found


def fingerprint_names(names: Iterable[str]) -> dict[str, Any]:
    """Number and one joint sha256 of case names (or content hashes), independent of their order; names do not leave."""
    ordered = sorted(set(names))
    digest = hashlib.sha256("\n".join(hashlib.sha256(n.encode()).hexdigest() for n in ordered).encode())
    return {"cases": len(ordered), "sha256": digest.hexdigest()}


def plan_entries(plan: Plan, crop_size: Sequence[int]) -> dict[str, Any]:
    """The entries of a checkpoint that say which plan, network and images the weights were made for."""
    return {
        "plan": {
            "dataset_name": plan.dataset_name,
            "plans_name": plan.plans_name,
            "base_plans": plan.base_plans,
            "configuration": plan.configuration,
            "network_class": plan.network_class,
            "architecture_hash": plan.architecture_hash,
            "data_hash": plan.data_hash,
            "patch_size": list(plan.patch_size),
            "transpose_forward": list(plan.transpose_forward),
        },
        "patch_size": [int(i) for i in crop_size],
        "spacing": list(plan.spacing),
        "normalization_schemes": list(plan.normalization_schemes),
        "channels": [plan.channel_names[i] for i in sorted(plan.channel_names)],
    }


def build_payload(
    network: nn.Module,
    plan: Plan,
    *,
    method: str,
    config: Any,
    crop_size: Sequence[int],
    pretrained_parts: Mapping[str, Any],
    data: Mapping[str, Any],
    citations: Sequence[str] = (),
    training: Mapping[str, Any] | None = None,
    **extra: Any,
) -> dict[str, Any]:
    """Everything that a checkpoint holds.

    Args:
        network: the plan's stock network, also wrapped by DDP or torch.compile.
        plan: its plan.
        method: registry name of the objective.
        config: the resolved options, a dict or dataclass.
        crop_size: voxels per axis that the network saw.
        pretrained_parts: ``{"encoder": bool, "decoder_stages": [indices from the bottom]}``: what the weights promise.
        data: fingerprint of the images learnt from; hashes only, never case names (see :func:`fingerprint_names`).
        citations: papers to cite.
        training: the engine's own state for an exact resume, kept under ``nnssl_training``.
        extra: more plain values for the ``nnssl`` entry, for example ``robustness`` or ``epoch``; ``versions`` in place of those
            of the installed packages; ``transfer``, ``{"parts": one of nnssl.plans.parts.CHOICES, "why": ...}``: which of the
            parts segmentation networks get by default, and the reason; all of them where it is not given.

    Returns:
        ``network_weights`` (every alias of the stock network, on the CPU), ``nnssl_adaptation_plan``, ``citations``, ``nnssl``
        and, where given, ``nnssl_training``.
    """
    promise = {
        "encoder": bool(pretrained_parts.get("encoder")),
        "decoder_stages": [part.stage for part in promised_parts(pretrained_parts) if part.kind == DECODER],
    }
    payload: dict[str, Any] = {
        "network_weights": full_state_dict(network),
        "nnssl_adaptation_plan": adaptation_plan(plan, crop_size),
        "citations": citation_entries(method, citations),
        "nnssl": {
            "schema": SCHEMA,
            "method": method,
            "config": config,
            **plan_entries(plan, crop_size),
            "pretrained_parts": promise,
            "data": dict(data),
            "versions": package_versions(),
            **extra,
        },
    }
    return payload if training is None else {**payload, "nnssl_training": training}
