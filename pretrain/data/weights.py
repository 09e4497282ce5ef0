"""How often the cases of each dataset are drawn: ``-d 500:8 501:1``.

A weight is VoCo's index repetition (Wu et al. 2024, arXiv:2410.09890; their code lists abdominal scans eight times): each
*case* of a dataset with weight 8 is drawn eight times as often as each case of one with weight 1. The share of a dataset in the
crops is therefore proportional to weight times number of cases. For equal shares of datasets whatever their size give each a
weight of 1 / its number of cases.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from nnssl.errors import NnsslError
from nnssl.plans import resolve_dataset
from nnssl.pretrain.data.case_set import CaseRef
from nnssl.pretrain.options import Sources

__all__ = ["case_weights", "parse_sources", "relative"]


def _split(given: int | str) -> tuple[int | str, float | None]:
    if isinstance(given, int) or ":" not in given:
        return given, None
    name, _, text = given.rpartition(":")
    try:
        return name, float(text)
    except ValueError:
        raise NnsslError(f"-d {given}: a number is wanted after the colon, for example {name or '500'}:8.") from None


def parse_sources(sources: Sources) -> tuple[dict[str, float], bool]:
    """Full dataset name -> weight, sorted by name, and whether any weight was given."""
    if isinstance(sources, Mapping):
        pairs: list[tuple[int | str, float | None]] = [(s, float(w)) for s, w in sources.items()]
    else:
        pairs = [_split(s) for s in ([sources] if isinstance(sources, (int, str)) else sources)]
    found: dict[str, float | None] = {}
    for given, weight in pairs:
        if weight is not None and not (math.isfinite(weight) and weight > 0):
            raise NnsslError(
                f"-d {given}:{weight:g}: a weight is a number above 0. Leave a dataset out to give it none."
            )
        name = resolve_dataset(given)
        if name in found and found[name] != weight:
            raise NnsslError(f"-d names {name} twice, with different weights.")
        found[name] = weight
    if not found:
        raise NnsslError("no dataset to learn from: name at least one with -d.")
    weights = {name: 1.0 if weight is None else weight for name, weight in sorted(found.items())}
    return weights, any(weight is not None for weight in found.values())


def relative(weights: Mapping[str, float]) -> dict[str, float] | None:
    """Weights relative to the smallest, which is what makes a run what it is; None where all are equal."""
    least = min(weights.values())
    scaled = {name: float(f"{weight / least:.9g}") for name, weight in sorted(weights.items())}
    return None if all(w == 1 for w in scaled.values()) else scaled


def case_weights(refs: Sequence[CaseRef], weights: Mapping[str, float] | None) -> np.ndarray | None:
    """Weight of each case, ``(len(refs),)`` float64, of weights by dataset name; None for equal ones."""
    if weights is None:
        return None
    missing = sorted(set(weights) - {r.source for r in refs})
    if missing:
        raise NnsslError(
            f"There is no case to learn from of {', '.join(missing)}, which has a weight. Leave it out of -d."
        )
    return np.asarray([weights[r.source] for r in refs], dtype=float)
