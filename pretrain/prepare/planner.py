"""Runs one of nnU-Net's own planners on a fingerprint, without images and without touching nnU-Net's folders."""

from __future__ import annotations

import contextlib
import importlib
import io
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from nnssl.errors import NnsslError, nearest
from nnssl.files import read_json, write_json

__all__ = ["PLANNERS", "plans_name", "run_planner"]

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
    """The plans' name: as given; where it was not (``"nnUNetPlans"``), the name that the planner gives.

    Raises:
        NnsslError: no such planner.
    """
    if planner is None:
        return plans
    if planner not in PLANNERS:
        raise NnsslError(
            f"--planner {planner} is not known.{nearest(planner, PLANNERS)} There are: {', '.join(PLANNERS)}."
        )
    return PLANNERS[planner][2] if plans == "nnUNetPlans" else plans


@contextlib.contextmanager
def _workspace(owner: str) -> Iterator[tuple[Path, Path]]:
    """nnU-Net's planning pointed at an empty pair of folders, which are yielded."""
    base = importlib.import_module(PLANNERS["default"][0])
    with tempfile.TemporaryDirectory(prefix="nnssl_planning_") as name, contextlib.ExitStack() as stack:
        raw, preprocessed = Path(name, "raw", owner), Path(name, "preprocessed", owner)
        raw.mkdir(parents=True)
        preprocessed.mkdir(parents=True)
        for attribute, value in {
            "nnUNet_raw": str(raw.parent),
            "nnUNet_preprocessed": str(preprocessed.parent),
            "maybe_convert_to_dataset_name": str,
            "get_allowed_n_proc_DA": torch.get_num_threads,  # the planner gives it to torch, which refuses 0
        }.items():
            stack.enter_context(patch.object(base, attribute, value))
        yield raw, preprocessed


def run_planner(
    owner: str,
    planner: str,
    wanted: str,
    gpu_memory_target: float | None,
    description: Mapping[str, Any],
    fingerprint: Mapping[str, Any],
    reader: str,
) -> dict[str, Any]:
    """Run one of nnU-Net's planners.

    Args:
        owner: dataset name.
        planner: key of :data:`PLANNERS`.
        wanted: name of the plans.
        gpu_memory_target: GB; the planner's own default where None.
        description: dataset.json.
        fingerprint: dataset_fingerprint.json.
        reader: name of nnU-Net's reader for the images.

    Returns:
        The plans as their file holds them.
    """
    module, name, _ = PLANNERS[planner]
    one = {"any": {"images": ["any"], "label": ""}}  # the planner lists images only to try a reader on one
    labels = {"background": 0, "foreground": 1}  # of the network whose memory is estimated
    options = {} if gpu_memory_target is None else {"gpu_memory_target_in_gb": gpu_memory_target}
    with _workspace(owner) as (raw, preprocessed):
        told = {**description, "labels": labels, "dataset": one, "overwrite_image_reader_writer": reader}
        write_json(raw / "dataset.json", told)
        write_json(preprocessed / "dataset_fingerprint.json", fingerprint)
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            getattr(importlib.import_module(module), name)(owner, plans_name=wanted, **options).plan_experiment()
        return read_json(preprocessed / f"{wanted}.json")
