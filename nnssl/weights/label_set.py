"""What a checkpoint has learnt of labels: of which cases, and of which label set its segmentation heads are.

Heads are kept where the target's label set is the very same. An evaluation on cases whose labels were learnt from is none.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from nnssl.files import hash_of
from nnssl.plans import Plan
from nnssl.weights.load import Checkpoint


def case_hash(name: str) -> str:
    """sha256 (hex) of a case's name: what checkpoints tell of labelled cases."""
    return hash_of(name)


def labels_seen(description: Mapping[str, Any], dataset: str, cases: Iterable[str]) -> list[str]:
    """The cases whose labels the weights have learnt from.

    Args:
        description: ``Checkpoint.nnssl``.
        dataset: name of the dataset that the cases are of.
        cases: their names.
    """
    omni = description.get("omni") or {}
    if omni.get("labelled") != dataset:
        return []
    known = set(omni.get("case_hashes", ()))
    return sorted(case for case in cases if case_hash(case) in known)


def label_set(dataset_json: Mapping[str, Any], learnt: Iterable[str] | None = None) -> dict[str, Any]:
    """What decides the meaning of segmentation heads: classes or regions, their values, and their order.

    Args:
        dataset_json: nnU-Net's ``dataset.json``.
        learnt: names of the classes or regions that were annotated; None: all.

    Returns:
        ``{"labels": {name: value or values}, "regions_class_order": list or None, "learnt": [names]}``, without the ignore label,
        which has no head.
    """
    labels = {
        str(name): [int(v) for v in value] if isinstance(value, (list, tuple)) else int(value)
        for name, value in dataset_json.get("labels", {}).items()
        if name != "ignore"
    }
    order = dataset_json.get("regions_class_order")
    regions = any(isinstance(value, list) for value in labels.values())
    names = [name for name, value in labels.items() if value not in (0, [0])]
    return {
        "labels": labels,
        "regions_class_order": [int(c) for c in order] if regions and order is not None else None,
        "learnt": names if learnt is None else sorted(learnt),
    }


def keep_heads(checkpoint: Checkpoint, plan: Plan | None, whole_decoder: bool) -> tuple[bool, list[str]]:
    """Whether a checkpoint's heads are taken, and a note where it has learnt any; they are made for its whole decoder."""
    heads = checkpoint.nnssl.get("heads")
    if plan is None or not isinstance(heads, Mapping) or not isinstance(heads.get("labels"), Mapping):
        return False, []
    here = label_set(plan.dataset_json)
    if heads["labels"] != here["labels"] or heads.get("regions_class_order") != here["regions_class_order"]:
        there, wanted = (", ".join(f"{k} {v}" for k, v in s["labels"].items()) for s in (heads, here))
        order = " in another order" if there == wanted else ""
        return False, [
            f"new heads: those of the checkpoint are for another label set ({there}){order}, the target has {wanted}"
        ]
    missing = [name for name in here["learnt"] if name not in (heads.get("learnt") or ())]
    if missing:
        return False, [f"new heads: no case of the pretraining was annotated with {', '.join(missing)}"]
    if not whole_decoder:
        return False, ["new heads: those of the checkpoint are made for its whole decoder, which is not taken"]
    return True, ["heads kept: the checkpoint has learnt this very label set"]
