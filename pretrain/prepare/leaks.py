"""Finds test images of the target among the pretraining images."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path

from nnssl.errors import NnsslError
from nnssl.files import read_json, sha256_of, write_atomic, write_json
from nnssl.paths import preprocessed_folder
from nnssl.plans import Plan
from nnssl.pretrain.prepare.processes import run_tasks
from nnssl.pretrain.prepare.raw import RawCase, find_raw
from nnssl.pretrain.prepare.worker import HashWorker

log = logging.getLogger("nnssl")

FEW_BYTES = 200e6  # up to here test images are hashed in this process: sooner done than processes are started

MOST_FILES_HASHED = 1000
"""Files of a preprocessed dataset that are read for comparison; sizes are equal by chance or in uncompressed formats."""

NAMED = 10


def list_test_images(plan: Plan) -> dict[str, RawCase]:
    """The target's test images, ``nnUNet_raw/<target>/imagesTs``; {} where there are none."""
    found = find_raw(plan.dataset_name, plan, "imagesTs")
    return found.cases if found else {}


def test_hashes(plan: Plan, images: Mapping[str, RawCase], n_processes: int) -> set[str]:
    """Content hashes of the target's test images.

    Kept in ``nnUNet_preprocessed/<target>/nnssl_test_hashes.json`` with sizes and times, so that each image is read once.
    """
    path = preprocessed_folder() / plan.dataset_name / "nnssl_test_hashes.json"
    stamps = {name: list(map(list, case.stamps)) for name, case in images.items()}
    try:
        cache = read_json(path)
    except NnsslError:
        cache = {}
    kept = {n: k for n, k in cache.items() if isinstance(k, list) and len(k) == 2 and isinstance(k[1], str)}
    current = {name: known for name, known in kept.items() if known[0] == stamps.get(name)}
    tasks = [case for name, case in images.items() if name not in current]
    if tasks:
        n = n_processes if sum(s[1] for case in tasks for s in case.stamps) > FEW_BYTES else 0
        for name, sha in run_tasks(HashWorker(plan), tasks, n, f"Hashing test images of {plan.dataset_name}"):
            current[name] = [stamps[name], sha]
        with contextlib.suppress(OSError):  # a read-only folder: they are read again the next time
            write_json(path, current)
    return {sha for _, sha in current.values() if sha}


def find_leaks(images: Mapping[str, RawCase], candidates: Mapping[str, RawCase]) -> list[str]:
    """Names of candidates one of whose files equals a test image's file byte by byte.

    Only files that are as large as a test file are opened, and at most :data:`MOST_FILES_HASHED`.
    """
    tests: dict[int, list[str]] = {}
    for case in images.values():
        for path, (_, size, _) in zip(case.files, case.stamps):
            tests.setdefault(size, []).append(path)
    suspects = [
        (name, path, stamp[1])
        for name, case in sorted(candidates.items())
        for path, stamp in zip(case.files, case.stamps)
        if stamp[1] in tests
    ]
    if len(suspects) > MOST_FILES_HASHED:
        text = "%d images are as large as a test image; the first %d are compared with the test images, the others are not."
        log.warning(text, len(suspects), MOST_FILES_HASHED)
        suspects = suspects[:MOST_FILES_HASHED]
    hashes: dict[int, set[str]] = {}
    leaks = []
    for name, path, size in suspects:
        try:
            if size not in hashes:
                hashes[size] = {sha256_of(p) for p in tests[size]}
            if sha256_of(path) in hashes[size]:
                leaks.append(name)
        except OSError as error:
            log.warning("%s could not be compared with the test images: %s", path, error)
    return list(dict.fromkeys(leaks))


def warn_of_leaks(leaks: list[str], plan: Plan, report: Path) -> Path | None:
    """Name the leaks, ``"<source>/<case>"``, in the log and in a file that ``--exclude`` takes; an outdated one is removed."""
    written = None
    with contextlib.suppress(OSError):
        if leaks:
            write_atomic(report, lambda file: file.write(("\n".join(leaks) + "\n").encode()))
            written = report
        else:
            report.unlink(missing_ok=True)
    if leaks:
        more = f" and {len(leaks) - NAMED} more" if len(leaks) > NAMED else ""
        log.warning(
            "Among the pretraining images are test images of %s (%d): %s%s. Results on its test images will look better "
            "than they are. To leave them out: --exclude %s",
            *(plan.dataset_name, len(leaks), ", ".join(leaks[:NAMED]), more, written or "FILE (one name a line)"),
        )
    return written


def duplicates(hashes: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """Pairs (first, other) of cases with the same hash, from (case, hash) pairs."""
    first: dict[str, str] = {}
    found = ((first.setdefault(sha, case), case) for case, sha in sorted(hashes) if sha)
    return [(one, other) for one, other in found if one != other]
