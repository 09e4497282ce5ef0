"""Pseudo-labels of whole cases as NIfTI files (or what the dataset uses), by nnU-Net's own sliding window and export."""

from __future__ import annotations

import logging
import os
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from nnunetv2.inference.export_prediction import export_prediction_from_logits
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from torch import Tensor

from nnssl.errors import NnsslError
from nnssl.networks import unwrap
from nnssl.plans import Plan
from nnssl.plans.labels import case_order
from nnssl.preprocessed import CaseRef, open_array
from nnssl.pretrain.omni.cases import head_names
from nnssl.pretrain.omni.dice import Counts, class_masks, mean_dice
from nnssl.pretrain.omni.loss import ignore_value
from nnssl.pretrain.omni.method import omni_of
from nnssl.properties import read_properties

if TYPE_CHECKING:
    from nnssl.pretrain.engine.loop import Engine
    from nnssl.pretrain.omni.auxiliary import OmniLoaders

log = logging.getLogger("nnssl")


def choose_volumes(auxiliary: OmniLoaders, count: int) -> list[CaseRef]:
    """Cases to write: images that were not learnt from with labels, half of them with labels to compare with where there are.

    The same for each epoch of a run, so that a person sees the same cases change.
    """
    cases, seed = auxiliary.cases, auxiliary.seed
    learnt = {c.name for c in cases.train}
    labelled = {f"{cases.dataset}/{c.name}": CaseRef(c.name, cases.folder, cases.dataset) for c in cases.held_out}
    others = {
        r.key: r
        for r in auxiliary.case_set.cases
        if r.key not in labelled and not (r.source == cases.dataset and r.name in learnt)
    }
    known, new = case_order(labelled, seed), case_order(others, seed)
    half = min(len(known), max(count - len(new), (count + 1) // 2))
    return [labelled[k] for k in known[:half]] + [others[k] for k in new[: count - half]]


def write_volumes(engine: Engine, auxiliary: OmniLoaders, count: int, folder: Path) -> list[dict[str, Any]]:
    """Predict and write some cases, as ``<source>_<case><file ending>``, with the network that makes pseudo-labels.

    Returns:
        One row for each: ``case``, ``file``, and ``dice`` and ``dice_<class>`` with the labels (at the plan's spacing) where it
        has some.
    """
    plan, method = engine.spec.plan, omni_of(engine.method)
    predictor = _predictor(engine)
    predictor.network = deepcopy(unwrap(method.omni_network())).eval()
    folder.mkdir(parents=True, exist_ok=True)
    labelled = {c.name for c in auxiliary.cases.held_out}
    rows = []
    for ref in choose_volumes(auxiliary, count):
        try:
            data = torch.from_numpy(np.asarray(open_array(ref.image)[:]))
            properties = read_properties(ref.properties)
        except Exception as error:  # blosc2 and pickle raise several kinds
            raise NnsslError(f"Case {ref.name} of {ref.source} cannot be read from {ref.folder}: {error!r}") from error
        logits = predictor.predict_sliding_window_return_logits(data).cpu().float()
        file = folder / f"{ref.source}_{ref.name}"
        row: dict[str, Any] = {"case": ref.key, "file": os.path.relpath(file, engine.spec.folder.path)}
        if ref.source == auxiliary.cases.dataset and ref.name in labelled:
            label = torch.from_numpy(np.asarray(open_array(ref.labels)[:1]))
            row.update(_dice(plan, method.omni_labels(logits[None]), label[None].long()))
        export_prediction_from_logits(
            logits,
            properties,
            plan.config,
            plan.manager,
            plan.dataset_json,
            str(file),
            num_threads_torch=torch.get_num_threads(),
        )
        rows.append(row)
    return rows


def _predictor(engine: Engine) -> nnUNetPredictor:
    """nnU-Net's predictor, without mirroring."""
    spec = engine.spec
    where = {"device": spec.device, "perform_everything_on_device": spec.device.type == "cuda"}
    predictor = _Quiet(use_mirroring=False, allow_tqdm=False, **where)
    predictor.plans_manager, predictor.configuration_manager = spec.plan.manager, spec.plan.config
    predictor.dataset_json = spec.plan.dataset_json
    predictor.list_of_parameters = predictor.allowed_mirroring_axes = None
    predictor.label_manager = spec.plan.manager.get_label_manager(spec.plan.dataset_json)
    return predictor


class _Quiet(nnUNetPredictor):
    """Without the line that nnU-Net prints on a CPU, and with cuDNN's settings left as they are."""

    def __init__(self, **settings: Any) -> None:
        benchmark = torch.backends.cudnn.benchmark
        device, on_device = settings.pop("device"), settings.pop("perform_everything_on_device")
        super().__init__(device=torch.device("cuda"), **settings)
        self.device, self.perform_everything_on_device = device, on_device
        torch.backends.cudnn.benchmark = benchmark


def _dice(plan: Plan, made: Tensor, label: Tensor) -> dict[str, float]:
    """Dice by class and their mean, over the voxels that are labelled."""
    counts = Counts(list(head_names(plan)), label.device)
    counts.add(class_masks(plan, made), class_masks(plan, label), label != ignore_value(plan))
    dice = counts.dice()
    return {"dice": mean_dice(dice), **{f"dice_{n}": v for n, v in dice.items()}}
