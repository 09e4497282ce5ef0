"""Runs one of nnU-Net's own planners on a fingerprint, without images and without touching nnU-Net's folders."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from nnssl.errors import NnsslError, did_you_mean
from nnssl.files import read_json, write_json

_PACKAGE = "nnunetv2.experiment_planning.experiment_planners"
_RESENC = f"{_PACKAGE}.residual_unets.residual_encoder_unet_planners"
PLANNERS: dict[str, tuple[str, str, str]] = {
    "default": (f"{_PACKAGE}.default_experiment_planner", "ExperimentPlanner", "nnUNetPlans"),
    "resenc_m": (_RESENC, "nnUNetPlannerResEncM", "nnUNetResEncUNetMPlans"),
    "resenc_l": (_RESENC, "nnUNetPlannerResEncL", "nnUNetResEncUNetLPlans"),
    "resenc_xl": (_RESENC, "nnUNetPlannerResEncXL", "nnUNetResEncUNetXLPlans"),
}
"""``--planner`` -> nnU-Net's module, class, and the name that it gives its plans."""


def plans_name(planner: str | None, plans: str) -> str:
    """The plans' name: as given; where it was not (``"nnUNetPlans"``), the name that the planner gives."""
    if planner is None:
        return plans
    if planner not in PLANNERS:
        raise NnsslError(
            f"--planner {planner} is not known.{did_you_mean(planner, PLANNERS)} There are: {', '.join(PLANNERS)}."
        )
    return PLANNERS[planner][2] if plans == "nnUNetPlans" else plans


def _in_own_process(module: str, name: str, owner: str, options: Mapping[str, Any], folder: Path) -> None:
    """nnU-Net reads its folders from the environment when it is imported: another process plans in other folders."""
    code = (
        "import importlib, json, sys\n"
        "module, name, owner, options = json.loads(sys.argv[1])\n"
        "getattr(importlib.import_module(module), name)(owner, **options).plan_experiment()\n"
    )
    variables = {f"nnUNet_{kind}": str(folder / kind) for kind in ("raw", "preprocessed", "results")}
    # the planner gives torch this number of threads, and torch refuses 0
    variables["nnUNet_n_proc_DA"] = str(torch.get_num_threads())
    command = [sys.executable, "-W", "ignore", "-c", code, json.dumps([module, name, owner, dict(options)])]
    done = subprocess.run(command, env={**os.environ, **variables}, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip() or "no message").splitlines()[-1]
        raise NnsslError(f"nnU-Net's planner {name} failed for {owner} (exit status {done.returncode}): {last}")


def run_planner(
    planner: str,
    wanted: str,
    gpu_memory_target: float | None,
    *,
    owner: str,
    dataset_json: Mapping[str, Any],
    fingerprint: Mapping[str, Any],
    reader: str,
) -> dict[str, Any]:
    """The plans that one of nnU-Net's planners (a key of :data:`PLANNERS`) makes; raises :class:`NnsslError` with its last line.

    Args:
        planner, wanted: which, and the name of the plans.
        gpu_memory_target: GB; the planner's own default where None.
        owner, dataset_json, fingerprint: the dataset.
        reader: name of nnU-Net's reader for the images.
    """
    module, name, _ = PLANNERS[planner]
    one = {"any": {"images": ["any"], "label": ""}}  # the planner lists images only to try a reader on one
    labels = {"background": 0, "foreground": 1}  # of the network whose memory is estimated
    options = {} if gpu_memory_target is None else {"gpu_memory_target_in_gb": gpu_memory_target}
    with tempfile.TemporaryDirectory(prefix="nnssl_planning_") as place:
        raw, preprocessed = Path(place, "raw", owner), Path(place, "preprocessed", owner)
        for folder in (raw, preprocessed, Path(place, "results")):
            folder.mkdir(parents=True)
        content = {**dataset_json, "labels": labels, "dataset": one, "overwrite_image_reader_writer": reader}
        write_json(raw / "dataset.json", content)
        write_json(preprocessed / "dataset_fingerprint.json", fingerprint)
        _in_own_process(module, name, owner, {"plans_name": wanted, **options}, Path(place))
        return read_json(preprocessed / f"{wanted}.json")
