"""Which cases' labels a checkpoint has learnt from: an evaluation on these is none."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from nnssl.files import hash_of


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
