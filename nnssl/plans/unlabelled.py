"""Preprocessed images without labels that a training may learn from: which, where they lie, and which are held back.

A case is never taken from the labelled training cases or from those that the plan leaves out (``excluded``), nor, unless the plan
says so (``transductive``), from the fold's validation part or from the images that were found to be the target's test images.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nnssl import preprocessed
from nnssl.case_lists import find_cases, read_case_list
from nnssl.errors import NnsslError
from nnssl.files import hash_of
from nnssl.paths import preprocessed_folder
from nnssl.plans.commands import plan_command, preprocess_command
from nnssl.plans.plan import Plan
from nnssl.preprocessed import CaseRef

UnlabelledCase = CaseRef
"""As it was called here before."""


@dataclass(frozen=True)
class UnlabelledPool:
    """The images without labels of one training.

    Attributes:
        cases: sorted.
        why: one line for each place that they come from.
        held_back: what was left out and why -> how many.
    """

    cases: list[CaseRef]
    why: list[str]
    held_back: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{len(self.cases)} images without labels", *(f"  {line}" for line in self.why)]
        lines += [f"  left out: {n} that are {reason}" for reason, n in self.held_back.items() if n]
        return "\n".join(lines)


def case_key_hash(key: str) -> str:
    """A short hash of ``"<source>/<case>"``: how a checkpoint names the images it has seen."""
    return hash_of(key)[:16]


def prepared_folder(plan: Plan, source: str) -> Path:
    """``nnUNet_preprocessed/<source>/nnssl_<target>_<data identifier>_<data hash>``: images that we preprocess with the plan."""
    return preprocessed_folder() / source / f"nnssl_{plan.dataset_name}_{plan.data_identifier}_{plan.data_hash}"


def source_folder(plan: Plan, source: str) -> Path:
    """Where a dataset's images lie that were preprocessed with the plan: of its own dataset nnU-Net's folder, if there is one."""
    own = preprocessed_folder() / plan.dataset_name / plan.data_identifier
    return own if source == plan.dataset_name and own.is_dir() else prepared_folder(plan, source)


def list_cases(plan: Plan, source: str) -> list[CaseRef]:
    """The preprocessed images of a dataset, sorted; empty where it is not preprocessed. Nothing is opened."""
    folder = source_folder(plan, source)
    return [CaseRef(name, folder, source) for name in preprocessed.list_cases(folder)]


def _named(plan: Plan, sources: Iterable[str]) -> dict[str, list[CaseRef]]:
    """The images of the datasets that the plans name, by why they are learnt from."""
    found = {}
    for source in sources:
        cases = list_cases(plan, source)
        if not cases:
            raise NnsslError(
                f"Plans '{plan.plans_name}' name {source} as images without labels, and it is not preprocessed for them "
                f"({source_folder(plan, source)} holds no case). Type: {preprocess_command(plan, [source])}"
            )
        found[f"of {source}, named by the plans"] = cases
    return found


def _pretrained_on(plan: Plan, data: Mapping[str, Any]) -> dict[str, list[CaseRef]]:
    """The pool of a pretraining: the images of its datasets whose hashes the checkpoint holds, or all where it holds none."""
    hashes = set(data.get("case_hashes") or ())
    return {
        f"of {source}, which the weights were pretrained on": [
            c for c in list_cases(plan, str(source)) if not hashes or case_key_hash(c.key) in hashes
        ]
        for source in data.get("sources") or ()
    }


def _leaks(plan: Plan) -> set[str]:
    """Cases that earlier runs have found to be test images of the dataset, as ``"<source>/<case>"``."""
    found: set[str] = set()
    for file in (preprocessed_folder() / plan.dataset_name).glob("nnssl_leaks_*.txt"):
        found |= {line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()}
    return found


def choose_excluded(plan: Plan, path: Path, unlabelled: Iterable[str] = ()) -> list[str]:
    """The cases that a file leaves out of the images without labels, as ``"<dataset>/<case>"``, sorted.

    Args:
        plan: whose dataset, with the ``unlabelled`` ones, has the cases that a name without dataset means.
        path: ``CASE`` or ``DATASET/CASE``, one a line.
        unlabelled: datasets of images without labels.

    Raises:
        NnsslError: the file cannot be read, or a name that no preprocessed case has.
    """
    names = read_case_list(path, "--exclude")
    sources = dict.fromkeys([plan.dataset_name, *unlabelled, *(n.split("/")[0] for n in names if "/" in n)])
    known = {source: {case.name for case in list_cases(plan, source)} for source in sources}
    found = find_cases(names, known, path, "--exclude")
    return sorted(f"{source}/{case}" for source, cases in found.items() for case in cases)


def find_unlabelled(
    plan: Plan,
    train: Collection[str],
    val: Collection[str],
    *,
    rest: Sequence[str] = (),
    pretrained_on: Mapping[str, Any] | None = None,
) -> UnlabelledPool:
    """The images without labels of a training.

    Those of the datasets that ``plans["nnssl"]["unlabelled"]`` names; where it names none, the training cases that a few-label
    variant leaves out together with the images that the weights were pretrained on.

    Args:
        plan: of the training.
        train: its labelled cases.
        val: its validation cases.
        rest: the fold's training cases that are not among ``train``.
        pretrained_on: ``Checkpoint.nnssl["data"]`` of the weights that it starts from.

    Raises:
        NnsslError: a named dataset that is not preprocessed, or no image is left; the message says how to name some.
    """
    named = plan.nnssl.get("unlabelled")
    if named:
        found = _named(plan, named)
    else:
        wanted = set(rest)
        own = [c for c in list_cases(plan, plan.dataset_name) if c.name in wanted]
        left_out = {f"of {plan.dataset_name}, whose labels the plans leave out": own}
        found = {**left_out, **_pretrained_on(plan, pretrained_on or {})}
    why = [f"{len(cases)} {place}" for place, cases in found.items() if cases]
    unique = sorted({c.key: c for cases in found.values() for c in cases}.values(), key=lambda c: (c.source, c.name))
    mine = {f"{plan.dataset_name}/{name}" for name in train}
    held = {"labelled training cases": mine, "excluded by the plans": set(plan.nnssl.get("excluded") or ())}
    if not plan.nnssl.get("transductive"):
        held["validation cases"] = {f"{plan.dataset_name}/{name}" for name in val} - mine
        held["test images of the dataset"] = _leaks(plan)
    counts = {reason: sum(c.key in keys for c in unique) for reason, keys in held.items()}
    left = [c for c in unique if not any(c.key in keys for keys in held.values())]
    if not left:
        raise NnsslError(
            f"There are no images without labels to learn from for plans '{plan.plans_name}' of {plan.dataset_name}"
            + "".join(f"; {n} are {reason}" for reason, n in counts.items() if n)
            + f". Name a dataset of images: {plan_command(plan, '--unlabelled DATASET')} (preprocessed before by: "
            f"{preprocess_command(plan, ['DATASET'])}), or start from weights that were pretrained on some."
        )
    return UnlabelledPool(left, why, counts)
