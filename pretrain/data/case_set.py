"""What a run may draw from: the cases, which of them are held out, and what is known of them without opening any."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from nnssl.errors import NnsslError
from nnssl.files import hash_of
from nnssl.preprocessed import CaseRef
from nnssl.pretrain.types import SourceStats

__all__ = ["BadCase", "CaseRef", "CaseSet", "make_case_set"]

log = logging.getLogger("nnssl")

FEWEST_FOR_HELD_OUT = 4


@dataclass(frozen=True)
class BadCase:
    """An image that cannot be used.

    Attributes:
        case: its identifier, or the file's name where that has no identifier.
        file: the file that is to blame.
        reason: what is wrong with it.
    """

    case: str
    file: str
    reason: str

    def __str__(self) -> str:
        return f"{self.case} ({self.file}): {self.reason}"


@dataclass(frozen=True)
class CaseSet:
    """The pretraining images of one run. It holds names only, and pickles.

    Attributes:
        cases: all of them, sorted by source and name.
        train: those that crops are drawn from.
        held_out: those that only the held-out loss sees; empty where there are too few.
        median_shape: median case shape after preprocessing, three axes (z, y, x after transpose), also for 2d plans.
        fingerprint_hash: sha256 (hex) of the cases, of who is held out and of the plan's preprocessing.
        leaks: cases that are also test images of the target dataset, as ``"<source>/<name>"``.
        bad: images that were left out because they cannot be used.
        reports: files that list bad images and leaks.
        pending: cases that are not preprocessed yet; more than 0 only with ``preprocess=False``.
        contents: ``"<source>/<name>"`` -> what tells another content of the image, where it is known.
    """

    cases: list[CaseRef]
    train: list[CaseRef]
    held_out: list[CaseRef]
    median_shape: tuple[int, int, int]
    fingerprint_hash: str
    leaks: list[str] = field(default_factory=list)
    bad: list[BadCase] = field(default_factory=list)
    reports: list[Path] = field(default_factory=list)
    pending: int = 0
    contents: dict[str, str] = field(default_factory=dict)

    def stats(self) -> SourceStats:
        """What methods choose their crop by."""
        return SourceStats(median_shape=self.median_shape, n_cases=len(self.train))


def _held_out_keys(refs: Sequence[CaseRef], share: float) -> set[str]:
    """Cases with the smallest hash of their name: another case more or less leaves nearly all others where they were."""
    if share <= 0:
        return set()
    if len(refs) < FEWEST_FOR_HELD_OUT:
        log.warning(
            "No case is held out: there are only %d, and %d are needed. There will be no held-out loss.",
            len(refs),
            FEWEST_FOR_HELD_OUT,
        )
        return set()
    ordered = sorted(refs, key=lambda r: (hash_of(r.name), r.key))
    return {r.key for r in ordered[: max(1, round(share * len(refs)))]}


def make_case_set(
    refs: Iterable[CaseRef], shapes: Sequence[Sequence[int]] | np.ndarray, *, data_hash: str, held_out: float
) -> CaseSet:
    """Split the cases and sum up what is known of them.

    Args:
        refs: the cases.
        shapes: ``(n, 3)`` shapes after preprocessing, of all cases or of a sample.
        data_hash: of the plan.
        held_out: share of the cases that is held out, in [0, 1).
    """
    if not 0 <= held_out < 1:
        raise NnsslError(f"The held-out share must be at least 0 and below 1, not {held_out}.")
    cases = sorted(refs, key=lambda r: (r.source, r.name))
    chosen = _held_out_keys(cases, held_out)
    lines = sorted(f"{'held_out' if r.key in chosen else 'train'} {hash_of(r.key)}" for r in cases)
    z, y, x = (int(round(m)) for m in np.median(np.asarray(shapes, dtype=float), axis=0))
    return CaseSet(
        cases=cases,
        train=[r for r in cases if r.key not in chosen],
        held_out=[r for r in cases if r.key in chosen],
        median_shape=(z, y, x),
        fingerprint_hash=hash_of("\n".join([data_hash, *lines])),
    )
