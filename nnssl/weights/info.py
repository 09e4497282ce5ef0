"""What a checkpoint is, for a person and for a program."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from nnssl.errors import NnsslError
from nnssl.files import sha256_of
from nnssl.parts import part_names, part_of
from nnssl.results import checkpoint_in
from nnssl.weights.architecture import inferred, recorded_architecture
from nnssl.weights.compare import second_stage, trained_on
from nnssl.weights.continuing import has_state, how_to_continue
from nnssl.weights.formats import one_name_each
from nnssl.weights.layout import Layout
from nnssl.weights.load import UNTOLD, Checkpoint, load
from nnssl.weights.names import looks_like
from nnssl.words import size_text

_LENGTHS = {"current_epoch": "epochs", "epoch": "epochs", "global_step": "steps"}
_LABELS = {"upstream_can_read_it": "MIC-DKFZ's nnssl reads it", "bytes": "size", "config": "options"}
"""What a person reads where the key does not say it."""
_FEW = 8
"""Entries of a list of hashes that a person is shown; of more of them their number."""
_ORIGINS = {
    "nnssl": "pretraining of nnssl",
    "nnssl-mic": "pretraining of MIC-DKFZ's nnssl",
    "nnU-Net": "training of nnU-Net",
    "others": "a network in a file of others",
    "nnssl_finetuning": "fine-tuning with a trainer of nnssl",
}


def describe(
    path: str | os.PathLike[str], *, trusted: bool = False, key: str | None = None, prefix: str | None = None
) -> dict[str, Any]:
    """Everything that a checkpoint says about itself, as plain values; absent things are left out.

    Args:
        path: a checkpoint of nnssl, MIC-DKFZ's nnssl or nnU-Net, a safetensors file, a file of others, or the folder of a run.
        trusted: let the file run code while it is read; only for files of a known origin.
        key, prefix: where the weights lie in a file of others, see :func:`nnssl.checkpoint.load`.

    Raises:
        NnsslError: as :func:`nnssl.weights.load`.
    """
    path = checkpoint_in(Path(path))
    checkpoint = load(path, trusted=trusted, key=key, prefix=prefix, any_network=True)
    content, ours = checkpoint.content, checkpoint.nnssl
    tuned = content.get("nnssl_finetuning")
    kind = _ORIGINS["nnssl_finetuning" if tuned else checkpoint.origin]
    same_name = ("patch_size", "spacing", "normalization_schemes", "channels", "config", "data")
    found: dict[str, Any] = {
        "file": str(checkpoint.path),
        "bytes": checkpoint.path.stat().st_size,
        "sha256": sha256_of(path),
        "kind": f"{kind}, second stage of a cascade" if second_stage(checkpoint) else kind,
        "read_as": list(checkpoint.remarks),
        "method": None if checkpoint.method == UNTOLD else checkpoint.method,
        "verdict": checkpoint.verdict and checkpoint.verdict[1],
        "length": _length(checkpoint),
        "network": _network(checkpoint),
        "pretrained_parts": checkpoint.pretrained_parts,
        "transferred_by_default": checkpoint.transfer,
        "plan": ours.get("plan"),
        **{key: ours.get(key) for key in same_name},
        "epoch": ours.get("epoch", content.get("current_epoch", content.get("epoch"))),
        "trainer_name": content.get("trainer_name"),
        "fine_tuning": tuned,
        "robustness": ours.get("robustness"),
        "converted_from": ours.get("converted_from"),
        "started_from": ours.get("started_from"),
        "versions": ours.get("versions"),
        "citations": [text for entry in checkpoint.citations for text in entry.get("apa_citations", ())],
        "can_be_continued": has_state(checkpoint),
        "how_to_continue": how_to_continue(checkpoint),
        "upstream_can_read_it": checkpoint.adaptation_plan is not None,
    }
    if ours.get("plan") is None:
        found |= trained_on(checkpoint)
    kept = {key: numbers(value) for key, value in found.items() if value is not None}
    return {key: value for key, value in kept.items() if value not in ([], {})}


def _length(checkpoint: Checkpoint) -> str | None:
    """How long was trained, in the file's own words."""
    ours, content = checkpoint.nnssl, checkpoint.content
    if ours.get("step") is not None:
        return f"{ours['step']:,} of {ours.get('steps', ours['step']):,} steps"
    parts = [
        f"{content[key]} {word}"
        for key, word in _LENGTHS.items()
        if isinstance(content.get(key), (int, float, np.number))
    ]
    return ", ".join(parts) or None


def numbers(value: Any) -> Any:
    """The same with Python's numbers and lists in place of numpy's and torch's."""
    if isinstance(value, Mapping):
        return {str(k): numbers(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [numbers(v) for v in value]
    return value.tolist() if hasattr(value, "tolist") else value


def _network(checkpoint: Checkpoint) -> dict[str, Any]:
    names = len(checkpoint.weights)
    weights = one_name_each(checkpoint.weights)
    layout = Layout.of(weights)
    if not layout.stages:
        other = looks_like(weights) if layout.kind == "network" else None
        kind = f"{layout}: its names look like {other}" if other else str(layout)
        return {"kind": kind, "parameters": sum(t.numel() for t in weights.values()), "names": names}
    architecture = None
    with suppress(NnsslError):  # a plan of nnU-Net's for another network: the weights still say enough
        architecture = recorded_architecture(checkpoint)
        if architecture is None and "decoder.transpconvs.0.weight" in weights:
            architecture = inferred(weights)
    name, arguments = architecture or (layout.kind, {})
    sizes = dict.fromkeys(part_names(weights), 0)
    for tensor_name, tensor in weights.items():
        sizes[part_of(tensor_name)] += tensor.numel()
    return {
        "kind": name,
        "dimensions": layout.dim,
        "input_channels": layout.channels,
        "features": layout.widths,
        **{key: arguments[key] for key in ("strides", "kernel_sizes") if arguments},
        "parameters": sum(sizes.values()),
        "parameters_by_part": sizes,
        "tensors": len(weights),
        "names": names,
        "finite": all(bool(t.isfinite().all()) for t in weights.values() if t.is_floating_point()),
    }


def as_text(found: Mapping[str, Any]) -> str:
    """The same for a person: one line for each thing, entries of entries indented."""
    lines: list[str] = []
    for key, value in found.items():
        label = _LABELS.get(key, key.replace("_", " "))
        text = f"{label:<26} {_short(value)}"
        if key == "how_to_continue":
            continue
        if key == "can_be_continued" and found.get("how_to_continue"):
            lines.append(f"{text}: {found['how_to_continue']}".replace("\n", "\n  "))
        elif key == "bytes":
            lines.append(f"{text} bytes")
        elif isinstance(value, Mapping):
            lines.append(f"{label}:")
            names = {k: k if key == "config" else k.replace("_", " ") for k in value}  # options as they are typed
            lines += [f"  {names[k]:<24} {_short(v, hashes=k == 'case_hashes')}" for k, v in value.items()]
        elif key in ("citations", "read_as"):
            lines += [f"{label}:", *(f"  - {entry}" for entry in value)]
        else:
            lines.append(text)
    return "\n".join(lines)


def _short(value: Any, hashes: bool = False) -> str:
    if value is None:
        return "auto"  # of an option: chosen by the method
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {_short(v)}" for k, v in value.items())
    if isinstance(value, (list, tuple)):
        if hashes and len(value) > _FEW:
            return f"{len(value):,} (--json lists them)"
        return ", ".join(_item(v) for v in value)
    return str(value)


def _item(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return size_text(value)
    return f"{value:.6g}" if isinstance(value, float) else str(value)
