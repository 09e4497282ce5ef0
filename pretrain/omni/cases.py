"""Which labelled cases a run learns from, what is annotated in each, and which of them stay held out."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnssl.case_lists import read_case_list
from nnssl.errors import NnsslError, did_you_mean, raise_problems
from nnssl.files import read_text
from nnssl.paths import preprocessed_folder
from nnssl.plans import Plan, dataset_id
from nnssl.plans.labels import ALL, folds_of
from nnssl.preprocessed import LABELS, PROPERTIES, case_names
from nnssl.properties import read_properties
from nnssl.weights import case_hash
from nnssl.words import counted

log = logging.getLogger("nnssl")


@dataclass(frozen=True)
class LabelledCase:
    """A preprocessed case with labels; ``annotated``: segmentation heads, but the background's, whose class or region is
    annotated, None: all.
    """

    name: str
    annotated: tuple[int, ...] | None = None


@dataclass(frozen=True)
class LabelledSet:
    """The labelled cases of a run.

    Attributes:
        dataset: name of the labelled dataset, which is the plan's.
        folder: of its preprocessed cases.
        train: cases whose labels are learnt from.
        held_out: labelled cases that are not; their labels are only compared with.
        why: half a sentence on the choice.
    """

    dataset: str
    folder: Path
    train: list[LabelledCase]
    held_out: list[LabelledCase]
    why: str

    def identity(self) -> dict[str, Any]:
        """What a continued run must have in common; no case names."""
        lines = sorted(f"{case_hash(c.name)} {c.annotated}" for c in self.train)
        digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
        return {"dataset": self.dataset, "cases": len(self.train), "fingerprint": digest}


def head_names(plan: Plan) -> dict[str, int]:
    """Classes or regions of the dataset -> index of the segmentation head; the background and the ignore label not among them."""
    manager = plan.manager.get_label_manager(plan.dataset_json)
    labels = {k: v for k, v in plan.dataset_json.get("labels", {}).items() if k != "ignore"}
    if manager.has_regions:
        regions = list(manager.foreground_regions)
        names = [k for k, v in labels.items() if (tuple(v) if isinstance(v, list) else v) in regions]
        return {name: i for i, name in enumerate(names)}
    return {name: int(value) for name, value in labels.items() if int(value) != 0}


def class_locations(folder: Path, name: str) -> dict[Any, Any]:
    """nnU-Net's record of some voxels of each class; empty for a case that was preprocessed without labels."""
    file = folder / f"{name}{PROPERTIES}"
    try:
        return read_properties(file).get("class_locations") or {}
    except Exception as error:  # unpickling raises anything
        raise NnsslError(
            f"Labelled case {name}: {file} cannot be read ({error!r}). Preprocess the dataset again."
        ) from error


def _has_labels(folder: Path, name: str) -> bool:
    return any(len(v) for v in class_locations(folder, name).values())


def _list_cases(plan: Plan) -> tuple[Path, list[str]]:
    """Folder and names of the preprocessed cases with a segmentation file."""
    number, folder = dataset_id(plan.dataset_name), preprocessed_folder() / plan.dataset_name / plan.data_identifier
    advice = f"Type: nnUNetv2_preprocess -d {number} -plans_name {plan.base_plans} -c {plan.configuration}"
    if not folder.is_dir():
        raise NnsslError(
            f"--labelled {number}: {plan.dataset_name} is not preprocessed ({folder} does not exist). {advice}"
        )
    files = {entry.name for entry in os.scandir(folder)}
    names = [n for n in case_names(files) if f"{n}{LABELS}" in files and f"{n}{PROPERTIES}" in files]
    if not head_names(plan) or not names or not any(_has_labels(folder, n) for n in names):
        what = "dataset.json names no class" if not head_names(plan) else f"no case in {folder} has labels"
        raise NnsslError(
            f"--labelled {number}: {plan.dataset_name} has no labels ({what}). Give a dataset with labels in labelsTr that "
            f"nnUNetv2_plan_and_preprocess has been through; to learn without labels, leave out --labelled."
        )
    return folder, names


def _named(path: Path) -> dict[str, list[str] | None]:
    """Case -> annotated classes (None: as for all) of the file of ``--labelled-cases``."""
    option = "--labelled-cases"
    try:
        content = json.loads(read_text(path))
    except (OSError, ValueError):
        content = None
    if isinstance(content, dict):
        if not all(isinstance(v, list) and v and all(isinstance(c, str) for c in v) for v in content.values()):
            raise NnsslError(f'{option} {path}: {{"case": ["class", ...]}} is wanted where it is a JSON object.')
        return {str(k): list(v) for k, v in content.items()}
    out: dict[str, list[str] | None] = {}
    for line in read_case_list(path, option):
        case, colon, classes = line.partition(":")
        listed = [c.strip() for c in classes.split(",") if c.strip()]
        if colon and not listed:
            raise NnsslError(f"{option} {path}: '{line}' names no class after the colon.")
        out[case.strip()] = listed if colon else None
    return out


def _heads(names: Sequence[str] | None, known: Mapping[str, int], where: str) -> tuple[int, ...] | None:
    """Head indices of class names; None where they are all."""
    if not names:
        return None
    problems = [f"'{n}' is no class of the dataset.{did_you_mean(n, known)}" for n in names if n not in known]
    raise_problems(problems, where)
    chosen = tuple(sorted({known[n] for n in names}))
    return None if len(chosen) == len(known) else chosen


def find_labelled(
    plan: Plan, *, fold: str = "0", annotated: Sequence[str] = (), cases: Path | None = None
) -> LabelledSet:
    """Choose the labelled cases of the plan's own dataset.

    Args:
        plan: of the labelled dataset.
        fold: learn from this fold's training cases (nnU-Net's split), or from ``"all"``.
        annotated: names of the classes (or regions) that are annotated where not all are.
        cases: file of ``--labelled-cases``, which comes before ``fold``: one case a line, ``case: class, class`` where only
            some classes are annotated in it; or JSON, a list of names or ``{"case": ["class"]}``.

    Raises:
        NnsslError: no labels, an unknown case or class, a fold that the dataset does not have.
    """
    folder, names = _list_cases(plan)
    known = head_names(plan)
    default = _heads(annotated, known, "-o omni.annotated")
    if cases is not None:
        named = _named(cases)
        unknown = [n for n in named if n not in set(names)]
        raise_problems(
            [f"'{n}' is no preprocessed case of {plan.dataset_name}.{did_you_mean(n, names)}" for n in unknown[:10]],
            f"--labelled-cases {cases}",
        )
        train = [
            LabelledCase(n, default if c is None else _heads(c, known, f"--labelled-cases {cases}, case {n}"))
            for n, c in sorted(named.items())
        ]
        why = f"listed in {Path(cases).name}"
    else:
        folds = folds_of(plan)
        if fold not in folds:
            raise NnsslError(
                f"-o omni.fold={fold}: {plan.dataset_name} has the folds {', '.join(folds)}. With all, it has no held-out case."
            )
        missing = [n for n in folds[fold][0] if n not in set(names)]
        if missing:
            raise NnsslError(
                f"-o omni.fold={fold}: splits_final.json of {plan.dataset_name} names '{missing[0]}', which is not preprocessed "
                "with labels. Preprocess the dataset again, or name the cases with --labelled-cases."
            )
        train = [LabelledCase(n, default) for n in sorted(folds[fold][0])]
        why = "all of the dataset" if fold == ALL else f"training cases of fold {fold}"
    empty = [c.name for c in train if not _has_labels(folder, c.name)]
    if len(empty) == len(train):
        raise NnsslError(
            f"None of the {len(train)} labelled cases ({why}) has a labelled voxel. Name others: --labelled-cases"
        )
    if empty:
        log.warning("Labelled with background only: %s, first %s.", counted(len(empty), "case"), empty[0])
    chosen = {c.name for c in train}
    rest = [LabelledCase(n, default) for n in names if n not in chosen]
    return LabelledSet(plan.dataset_name, folder, train, rest, why)
