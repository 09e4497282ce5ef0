"""Where a pretraining lies, and which pretrainings a trainer may use. Reads small JSON only, never a checkpoint."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnssl.errors import NnsslError
from nnssl.files import read_json
from nnssl.paths import results_folder
from nnssl.plans import Plan, check_name, dataset_id, list_datasets

log = logging.getLogger("nnssl")

LONGEST_SOURCES = 80
"""Characters of a folder's name that may list the datasets learnt from; of more of them a range, their number and a hash tell."""

LONGEST_NAME = 255
"""Bytes in a folder's name on nearly all file systems."""

CONFIG, FINAL, LATEST = "config.json", "checkpoint_final.pth", "checkpoint_latest.pth"
CHECKPOINTS = (FINAL, LATEST, "checkpoint_best.pth", "checkpoint_robust.pth")
"""Of a run, in the order in which they are meant by its folder."""


def checkpoint_in(path: Path) -> Path:
    """The checkpoint that is meant by the folder of a run; a file is meant itself.

    Raises:
        NnsslError: the folder holds none.
    """
    if not path.is_dir():
        return path
    for name in CHECKPOINTS:
        if (path / name).is_file():
            return path / name
    folds = [fold for fold in sorted(path.glob("fold_*")) if any((fold / name).is_file() for name in CHECKPOINTS)]
    instead = f"Name a fold of this training: {folds[0]}" if folds else "Name the file itself."
    raise NnsslError(f"{path} is a folder without {', '.join(CHECKPOINTS[:-1])} or {CHECKPOINTS[-1]}. {instead}")


@dataclass(frozen=True)
class PretrainingRun:
    """One pretraining below ``nnUNet_results``; the last five are of the plan whose network was trained."""

    folder: Path
    checkpoint: Path | None  # checkpoint_final.pth where it is finished, else checkpoint_latest.pth where there is one
    method: str  # registry name of the objective
    sources: tuple[str, ...]  # names of the datasets it learnt from
    finished: bool
    architecture_hash: str
    base_plans: str
    plans_name: str
    configuration: str
    dataset_name: str

    def made_for(self, plan: Plan) -> bool:
        """Whether a trainer with this plan may take it: same plans (or same base), configuration and network.

        The dataset is not compared.
        """
        same_plans = self.base_plans == plan.base_plans or self.plans_name == plan.plans_name
        same_network = self.architecture_hash == plan.architecture_hash
        return same_plans and same_network and self.configuration == plan.configuration


def output_folder(plan: Plan, method_folder_name: str, sources: Sequence[int | str], name: str | None = None) -> Path:
    """``nnUNet_results/<Dataset>/nnssl<Method>[_d500_d502][_<name>]__<plans>__<configuration>``; it is not created.

    Args:
        plan: the plan whose network is trained.
        method_folder_name: the objective's name as it is written in folders, for example ``"MACL"``.
        sources: numbers or full names of the datasets learnt from; the plan's own dataset alone is not spelt out.
        name: the user's ``--name``.

    Raises:
        NnsslError: for a name that nnU-Net's tools would split or that is too long, or ``nnUNet_results`` unset.
    """
    own = dataset_id(plan.dataset_name)
    ids = sorted({int(s) if str(s).isdecimal() else dataset_id(str(s)) for s in sources})
    first = "nnssl" + check_name(method_folder_name, "method")
    if ids and ids != [own]:
        listed = "".join(f"_d{i:03d}" for i in ids)
        if len(listed) > LONGEST_SOURCES:
            listed = f"_d{ids[0]:03d}to{ids[-1]:03d}n{len(ids)}x{hashlib.sha256(listed.encode()).hexdigest()[:8]}"
        first += listed
    if name is not None:
        first += f"_{check_name(name)}"
    check_name(plan.plans_name, "plans name")
    folder = f"{first}__{plan.plans_name}__{plan.configuration}"
    if len(os.fsencode(folder)) > LONGEST_NAME:
        raise NnsslError(
            f"the name of the output folder would have {len(os.fsencode(folder))} bytes, and file systems allow "
            f"{LONGEST_NAME}: {folder}. Choose a shorter --name."
        )
    return results_folder() / plan.dataset_name / folder


def _read_run(folder: Path) -> PretrainingRun | None:
    try:
        config: dict[str, Any] = read_json(folder / CONFIG)
        checkpoints = [folder / name for name in (FINAL, LATEST) if (folder / name).is_file()]
        return PretrainingRun(
            folder=folder,
            checkpoint=checkpoints[0] if checkpoints else None,
            method=str(config["method"]),
            sources=tuple(str(s) for s in config["sources"]),
            finished=(folder / FINAL).is_file(),
            architecture_hash=str(config["architecture_hash"]),
            base_plans=str(config["base_plans"]),
            plans_name=str(config["plans_name"]),
            configuration=str(config["configuration"]),
            dataset_name=folder.parent.name,
        )
    except KeyError as error:
        log.warning("%s is left out: its %s has no %s.", folder, CONFIG, error)
    except NnsslError as error:
        log.warning("%s is left out: %s", folder, error)
    return None


def list_pretrainings(dataset_name: str) -> list[PretrainingRun]:
    """All pretrainings below a dataset's results, whatever plan they were made for, sorted by folder name.

    Folders without ``config.json`` are not runs; one that cannot be read is left out with a warning.
    """
    folder = results_folder() / dataset_name
    if not folder.is_dir():
        return []
    candidates = sorted(f for f in folder.glob("nnssl*__*__*") if (f / CONFIG).is_file())
    runs = (_read_run(candidate) for candidate in candidates)
    return [run for run in runs if run is not None]


def find_pretrainings(plan: Plan) -> list[PretrainingRun]:
    """The pretrainings, finished or not, that were made for this dataset's plan, configuration and network."""
    return [run for run in list_pretrainings(plan.dataset_name) if run.made_for(plan)]


def find_pretrainings_elsewhere(plan: Plan) -> list[PretrainingRun]:
    """The pretrainings that exist under other datasets, to be named where a trainer finds none of its own."""
    others = (
        name for name, where in list_datasets().items() if "nnUNet_results" in where and name != plan.dataset_name
    )
    return [run for name in others for run in list_pretrainings(name)]
