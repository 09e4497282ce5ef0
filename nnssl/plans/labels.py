"""Fewer labels: which of a fold's training cases a plan variant trains on. No data is touched, and no split is written."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from nnssl.case_lists import read_known_cases
from nnssl.errors import NnsslError
from nnssl.files import hash_of
from nnssl.paths import preprocessed_folder
from nnssl.plans.datasets import dataset_id
from nnssl.plans.plan import Plan

ALL = "all"
"""nnU-Net's name for the fold that holds every case."""
FOLDS = 5
SPLITS = "splits_final.json"
SEED = 12345

Split = tuple[list[str], list[str]]


def case_order(cases: Iterable[str], seed: int) -> list[str]:
    """Cases in a random order that depends on the seed and their names alone.

    The first n are a subset: nested over n, and the same for every method, machine and version. Over folds the order is one, so
    that two folds share as many of their cases as they can.
    """
    return sorted(set(cases), key=lambda case: (hash_of(f"{seed}:{case}"), case))


def small_split(cases: Sequence[str]) -> list[Split]:
    """Folds for fewer cases than nnU-Net can split: each of two to four cases is left out once, one case alone has none."""
    ordered = sorted(cases)
    return [([c for c in ordered if c != out], [out]) for out in ordered] if len(ordered) > 1 else []


def too_few(plan: Plan) -> int:
    """The number of preprocessed cases where nnU-Net cannot split so few; 0 where there are enough, or none, or own folds."""
    folder = preprocessed_folder() / plan.dataset_name
    if plan.nnssl.get("train_cases") or (folder / SPLITS).is_file():
        return 0
    cases = len(_preprocessed_cases(folder / plan.data_identifier))
    return cases if cases < FOLDS else 0


def fold_to_type(plan: Plan) -> str:
    """The fold of a command that is suggested: ``"0"``, or ``"all"`` where nnU-Net has no such fold."""
    chosen = plan.nnssl.get("train_cases")
    return ALL if (chosen and "0" not in chosen) or too_few(plan) else "0"


def _preprocessed_cases(data: Path) -> list[str]:
    """The cases in a folder of preprocessed data, sorted; none where there is no such folder or nnU-Net cannot read it."""
    if not data.is_dir():
        return []
    try:
        from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class

        return sorted(str(case) for case in infer_dataset_class(str(data)).get_identifiers(str(data)))
    except AssertionError:  # nnU-Net's, for a folder without cases or with files of several kinds
        return []


def folds_of(plan: Plan) -> dict[str, Split]:
    """The (training, validation) cases of each fold as nnU-Net will have them, and those of ``"all"``.

    ``splits_final.json`` where there is one, else the five folds that nnU-Net would write there, else (fewer than five cases,
    which nnU-Net refuses) :func:`small_split`.

    Raises:
        NnsslError: the configuration has not been preprocessed, or the file cannot be read.
    """
    folder = preprocessed_folder() / plan.dataset_name
    data = folder / plan.data_identifier
    if not data.is_dir():
        raise NnsslError(
            f"{data} does not exist: the cases are chosen from the preprocessed ones. "
            f"Type: nnUNetv2_preprocess -d {dataset_id(plan.dataset_name)} -plans_name {plan.base_plans} -c {plan.configuration}"
        )
    cases = _preprocessed_cases(data)
    if not cases:
        raise NnsslError(f"{data} holds no preprocessed cases that nnU-Net can read.")
    file = folder / SPLITS
    if file.is_file():
        splits = _read_splits(file)
    elif len(cases) >= FOLDS:
        from nnunetv2.utilities.crossval_split import generate_crossval_split  # scikit-learn takes a second

        made = generate_crossval_split(cases, seed=SEED, n_splits=FOLDS)
        splits = [([str(c) for c in s["train"]], [str(c) for c in s["val"]]) for s in made]
    else:
        splits = small_split(cases)
    return {**{str(i): split for i, split in enumerate(splits)}, ALL: (cases, cases)}


def _read_splits(file: Path) -> list[Split]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        return [([str(c) for c in fold["train"]], [str(c) for c in fold["val"]]) for fold in content]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise NnsslError(f"{file} cannot be read as nnU-Net's splits: {error!r}") from error


def choose_cases(folds: Mapping[str, Split], labels: str | int, seed: int = 0) -> dict[str, list[str]]:
    """The training cases of each fold.

    Args:
        folds: from :func:`folds_of`.
        labels: a number of cases (``8``), a share of each fold's training cases (``"25%"``, at least one), or a file with one
            case name per line; of a file each fold takes those that it does not validate on.
        seed: decides which; see :func:`case_order`.

    Returns:
        fold -> case names. Folds in which a file leaves no training case are left out.

    Raises:
        NnsslError: more cases than there are, an unknown case, or nothing left to train on.
    """
    text = str(labels).strip()
    neither = f"--labels {text}: neither a number, a percentage such as 25%, nor a file."
    if text.endswith("%"):
        try:
            share = float(text[:-1])
        except ValueError:
            raise NnsslError(neither) from None
        if not 0 < share <= 100:
            raise NnsslError(f"--labels {text}: a share lies above 0 % and at most at 100 %.")
        return {f: case_order(tr, seed)[: max(1, int(share / 100 * len(tr) + 0.5))] for f, (tr, _) in folds.items()}
    if text.lstrip("+-").isdecimal():
        number = int(text)
        if number < 1:
            raise NnsslError(f"--labels {number}: at least 1.")
        few = ", ".join(f"fold {f}: {len(tr)}" for f, (tr, _) in folds.items() if len(tr) < number)
        if few:
            raise NnsslError(f"--labels {number}: there are fewer training cases ({few}).")
        return {f: case_order(tr, seed)[:number] for f, (tr, _) in folds.items()}
    if not Path(text).is_file():
        raise NnsslError(neither)
    named = read_known_cases(Path(text), "--labels", _all_cases(folds))
    chosen = {fold: [case for case in named if case in train] for fold, (train, _) in folds.items()}
    if not any(chosen.values()):
        raise NnsslError(f"--labels {text} names no case to train on.")
    return {fold: cases for fold, cases in chosen.items() if cases}


def _all_cases(folds: Mapping[str, Split]) -> set[str]:
    return {case for train, val in folds.values() for case in (*train, *val)}


def choose_validating(folds: Mapping[str, Split], path: Path) -> dict[str, list[str]]:
    """The validation cases of fold ``"all"``, which has none of its own: those that a file names, one a line.

    Raises:
        NnsslError: no such file, an unknown case, or no case.
    """
    if not path.is_file():
        raise NnsslError(f"--validate {path}: there is no such file.")
    return {ALL: read_known_cases(path, "--validate", _all_cases(folds))}


def restrict(
    fold: int | str,
    train: Sequence[str],
    val: Sequence[str],
    chosen: Mapping[str, Sequence[str]],
    validating: Mapping[str, Sequence[str]] | None = None,
) -> Split:
    """The split of a fold, with only the chosen training cases.

    In fold ``"all"``, where nnU-Net trains and validates on every case, the cases that are not chosen validate, or of these the
    ``validating`` ones.

    Raises:
        NnsslError: the plan chooses none for this fold, or cases that this fold does not train on (the split has changed).
    """
    mine = list(chosen.get(str(fold), ()))
    if not mine:
        raise NnsslError(f"The plan chooses training cases for fold {', '.join(chosen)}, not for fold {fold}.")
    if str(fold) == ALL:
        asked = list((validating or {}).get(ALL, ())) or train
        val = [case for case in asked if case not in set(mine)] or list(asked)
        unknown = sorted(set(val) - set(train))
        if unknown:
            raise NnsslError(f"The plan validates on '{unknown[0]}', which is no preprocessed case.")
    validated = set() if str(fold) == ALL else set(mine) & set(val)
    wrong = sorted(set(mine) - set(train)) or sorted(validated)
    if wrong:
        raise NnsslError(
            f"The plan trains fold {fold} on '{wrong[0]}', which is not among the fold's training cases: splits_final.json has "
            "changed since the plan was written. Restore it, or write a new variant: nnssl_plan --labels ..."
        )
    return mine, list(val)
