"""What a probe reads: preprocessed cases with their labels, and which of them are fitted on and scored."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class

from nnssl.case_lists import read_known_cases
from nnssl.errors import NnsslError
from nnssl.paths import preprocessed_folder
from nnssl.plans import Plan, dataset_id
from nnssl.plans.labels import case_order, choose_cases, folds_of, restrict

MOST_LABELLED = 16
"""Labelled cases that are taken where nobody says how many."""
MOST_LEFT_OUT = 10
"""Up to so many labelled cases each is left out by itself, of more a fifth at a time."""
GROUPS = 5


@dataclass(frozen=True)
class Fold:
    """One linear layer: the cases that it is fitted on, and those that it is scored on."""

    fit: tuple[str, ...]
    score: tuple[str, ...]


@dataclass(frozen=True)
class Classes:
    """What is segmented: labels, one of which each voxel has, or regions, any number of which it lies in.

    Attributes:
        names: of the foreground classes.
        members: label values of each.
        regions: whether they are regions.
        ignore: the label of voxels that nobody has looked at; None without one.
    """

    names: tuple[str, ...]
    members: tuple[tuple[int, ...], ...]
    regions: bool
    ignore: int | None

    @classmethod
    def of(cls, plan: Plan) -> Classes:
        """The classes of a plan's dataset, as nnU-Net reads its ``dataset.json``.

        Raises:
            NnsslError: the dataset has no foreground labels.
        """
        if not plan.dataset_json.get("labels"):
            raise NnsslError(
                f"{plan.dataset_name} names no labels in dataset.json: a probe is fitted on labelled cases."
            )
        manager = plan.manager.get_label_manager(plan.dataset_json)
        groups = manager.foreground_regions if manager.has_regions else manager.foreground_labels
        members = tuple(map(_values, groups))
        if not members:
            raise NnsslError(f"{plan.dataset_name} has no label but the background: there is nothing to segment.")
        labels = {_values(value): str(name) for name, value in plan.dataset_json["labels"].items()}
        names = tuple(labels.get(m, "+".join(map(str, m))) for m in members)
        return cls(names, members, bool(manager.has_regions), manager.ignore_label)

    @property
    def n_outputs(self) -> int:
        """Outputs of the linear layer: one per region, or one per label and one for the background."""
        return len(self.names) + (not self.regions)

    def targets(self, labels: np.ndarray) -> np.ndarray:
        """``(R, N)`` bool for regions, else ``(N,)`` int64 with 0 for the background, of label values ``(N,)``."""
        if self.regions:
            return np.stack([np.isin(labels, m) for m in self.members])
        out = np.zeros(labels.shape, np.int64)
        for i, member in enumerate(self.members):
            out[np.isin(labels, member)] = i + 1
        return out

    def masks(self, labels: np.ndarray) -> np.ndarray:
        """``(classes, *size)`` bool of label values ``(*size)``."""
        return np.stack([np.isin(labels, m) for m in self.members])


def _values(value: Any) -> tuple[int, ...]:
    return tuple(int(v) for v in value) if isinstance(value, (tuple, list)) else (int(value),)


@dataclass(frozen=True, eq=False)
class Case:
    """A preprocessed case.

    Attributes:
        name: its identifier.
        image: ``(C, Z, Y, X)`` float, read from disk where it is sliced.
        labels: ``(Z, Y, X)`` int16, -1 where the label is to be ignored.
    """

    name: str
    image: Any
    labels: np.ndarray

    def rng(self, seed: int) -> np.random.Generator:
        """Random numbers that depend on the seed and the case's name alone."""
        digest = hashlib.sha256(self.name.encode("utf-8", "surrogateescape")).digest()
        return np.random.default_rng([seed, int.from_bytes(digest[:8], "little")])


def read_case(plan: Plan, classes: Classes, name: str) -> Case:
    """Open a case of ``nnUNet_preprocessed``.

    Raises:
        NnsslError: it cannot be read, has no segmentation, or another number of channels than the plan.
    """
    folder = preprocessed_folder() / plan.dataset_name / plan.data_identifier
    try:
        opened: Any = infer_dataset_class(str(folder))(str(folder), [name]).load_case(name)
        image, seg = opened[:2]
        labels = np.asarray(seg[0] if isinstance(seg, np.ndarray) else seg[:][0]).astype(np.int16)
    except (OSError, RuntimeError, ValueError, KeyError, AssertionError, TypeError) as error:
        raise NnsslError(
            f"Case '{name}' in {folder} cannot be read with its labels: {error}. "
            f"Type: nnUNetv2_preprocess -d {dataset_id(plan.dataset_name)} -plans_name {plan.base_plans} -c {plan.configuration}"
        ) from error
    if image.shape[0] != plan.n_channels:
        raise NnsslError(f"Case '{name}' has {image.shape[0]} channels, the plan {plan.n_channels}.")
    labels[labels < 0] = 0  # outside of the cropped image, nnU-Net's background
    if classes.ignore is not None:
        labels[labels == classes.ignore] = -1
    return Case(name, image, labels)


def choose_folds(
    plan: Plan,
    *,
    labels: str | int | None = None,
    fold: int | str = "all",
    evaluate: str = "loo",
    seed: int = 0,
) -> list[Fold]:
    """Which cases are fitted on and which are scored.

    Args:
        plan: a plain one, or a few-label variant, whose cases are then the labelled ones.
        labels: as ``nnssl_plan --labels``; by default the variant's cases, else all training cases of the fold, of more than
            :data:`MOST_LABELLED` so many of them, chosen by the seed.
        fold: nnU-Net's fold that labelled cases come from; ``"all"`` for every preprocessed case.
        evaluate: ``"loo"`` leaves each labelled case out once (of more than ten a fifth at a time); ``"val"`` fits on all of
            them and scores the fold's validation cases, in ``"all"`` those that are not labelled; or a file with case names.
        seed: which cases ``labels`` takes.

    Raises:
        NnsslError: no such fold or case, too few cases, or cases that would be fitted on and scored.
    """
    folds = folds_of(plan)
    if str(fold) not in folds:
        raise NnsslError(f"-f {fold}: there is no such fold. There are: {', '.join(folds)}.")
    train, val = folds[str(fold)]
    named = plan.nnssl.get("train_cases") or {}
    if labels is not None:
        chosen = choose_cases({str(fold): (train, val)}, labels, seed)
    elif named:
        chosen = named
    else:
        chosen = {str(fold): case_order(train, seed)[:MOST_LABELLED] if len(train) > MOST_LABELLED else list(train)}
    fit, rest = restrict(fold, train, val, chosen, plan.nnssl.get("val_cases"))
    if evaluate == "loo":
        return _left_out(fit, seed)
    score = rest if evaluate == "val" else _listed(Path(evaluate), set(folds["all"][0]))
    both = sorted(set(fit) & set(score))
    if both:
        raise NnsslError(
            f"'{both[0]}'{f' and {len(both) - 1} more' if len(both) > 1 else ''} would be fitted on and scored. "
            "Fewer --labels, other cases to --evaluate, or --evaluate loo."
        )
    if not score:
        raise NnsslError(f"--evaluate {evaluate}: no case is left to score. Fewer --labels, or --evaluate loo.")
    return [Fold(tuple(fit), tuple(score))]


def _left_out(cases: Sequence[str], seed: int) -> list[Fold]:
    if len(cases) < 2:
        raise NnsslError(
            "One labelled case cannot be left out and fitted on: score others with --evaluate val or --evaluate FILE, or label "
            "a second case."
        )
    order = case_order(cases, seed)
    n = len(order) if len(order) <= MOST_LEFT_OUT else GROUPS
    groups = [tuple(sorted(order[i::n])) for i in range(n)]
    return [Fold(tuple(c for c in sorted(order) if c not in out), out) for out in groups]


def _listed(path: Path, known: set[str]) -> list[str]:
    if not path.is_file():
        raise NnsslError(f"--evaluate {path}: neither loo, val nor a file of case names.")
    return read_known_cases(path, "--evaluate", known)


def check_foreground(cases: Mapping[str, Case], classes: Classes, fit: Sequence[str]) -> None:
    """Refuse labelled cases of which none holds any foreground."""
    wanted = [value for member in classes.members for value in member]
    if not any(bool(np.isin(cases[name].labels, wanted).any()) for name in fit):
        raise NnsslError(
            f"None of the {len(fit)} labelled cases holds a label of {', '.join(classes.names)}: nothing can be fitted."
        )
