"""What a checkpoint was trained on, as far as its file tells, and where that differs from a plan."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from nnssl.plans import Plan
from nnssl.weights.load import Checkpoint


def _inherited(plans: Mapping[str, Any], name: Any) -> dict[str, Any]:
    """A configuration of a plans file with what it inherits."""
    known = plans.get("configurations") or {}
    chain: list[Mapping[str, Any]] = []
    while name in known and known[name] not in chain:
        chain.append(known[name])
        name = known[name].get("inherits_from")
    return {k: v for values in reversed(chain) for k, v in values.items()}


def _nnunet(checkpoint: Checkpoint) -> tuple[dict[str, Any], str, dict[str, Any]] | None:
    """Plans, configuration and dataset.json that nnU-Net's trainer puts into its files."""
    init_args = checkpoint.content.get("init_args")
    if not isinstance(init_args, Mapping) or not isinstance(init_args.get("plans"), Mapping):
        return None
    description = init_args.get("dataset_json")
    return (
        dict(init_args["plans"]),
        str(init_args.get("configuration")),
        dict(description) if isinstance(description, Mapping) else {},
    )


def _names(channels: Any) -> list[str] | None:
    if not isinstance(channels, Mapping) or not channels:
        return None
    return [str(channels[k]) for k in sorted(channels, key=lambda k: int(k) if str(k).isdecimal() else 0)]


def second_stage(checkpoint: Checkpoint) -> bool:
    """Whether a file of nnU-Net's is of the second stage of a cascade, whose network also sees a segmentation."""
    nnunet = _nnunet(checkpoint)
    return nnunet is not None and _inherited(nnunet[0], nnunet[1]).get("previous_stage") is not None


def image_channels(checkpoint: Checkpoint) -> int | None:
    """Number of the image's channels in a file of nnU-Net's; None where it does not tell."""
    nnunet = _nnunet(checkpoint)
    names = _names(nnunet[2].get("channel_names", nnunet[2].get("modality"))) if nnunet else None
    return len(names) if names else None


def trained_on(checkpoint: Checkpoint) -> dict[str, Any]:
    """Plan, patch, spacing, normalisation and channel names, as files of nnssl, of MIC-DKFZ's nnssl and of nnU-Net tell them.

    Returns:
        ``plan`` (names of dataset, plans and configuration), ``patch_size`` (voxels), ``spacing`` (mm), ``normalization_schemes``
        and ``channels``; what the file does not tell is left out.
    """
    ours, nnunet = checkpoint.nnssl, _nnunet(checkpoint)
    values: Mapping[str, Any]
    if ours.get("plan"):
        plan, values, channels = ours["plan"], ours, ours.get("channels")
        patch = plan.get("patch_size")
    elif nnunet is not None:
        plan, values = {**nnunet[0], "configuration": nnunet[1]}, _inherited(nnunet[0], nnunet[1])
        patch, channels = values.get("patch_size"), _names(nnunet[2].get("channel_names", nnunet[2].get("modality")))
    else:
        plan = dict((checkpoint.adaptation_plan or {}).get("pretrain_plan") or {})
        configurations: dict[str, dict[str, Any]] = plan.get("configurations") or {}
        name, values = next(iter(configurations.items()), (None, {}))
        plan["configuration"] = name
        patch, channels = values.get("patch_size"), None
    found = {
        "plan": {k: plan[k] for k in ("dataset_name", "plans_name", "configuration") if plan.get(k) is not None},
        "patch_size": patch,
        "spacing": values.get("spacing"),
        "normalization_schemes": values.get("normalization_schemes"),
        "channels": channels,
    }
    return {k: (v if isinstance(v, dict) else list(v)) for k, v in found.items() if v}


def _sizes(values: Sequence[Any]) -> str:
    return "x".join(f"{float(v):.4g}" for v in values)


def _modality(channels: Sequence[str]) -> str:
    """nnU-Net's own rule: a channel that is called CT is CT."""
    return "CT" if any(c.lower() == "ct" for c in channels) else "not CT"


def differences(checkpoint: Checkpoint, plan: Plan) -> list[str]:
    """One line for each thing besides the network in which pretraining and plan differ; empty where nothing does or is known."""
    before, lines = trained_on(checkpoint), []
    here = [plan.channel_names[i] for i in sorted(plan.channel_names)]
    there = before.get("channels")
    if there is not None and _modality(there) != _modality(here):
        lines.append(f"modality: {', '.join(there)} in pretraining, {', '.join(here)} here")
    elif there is not None and there != here:
        lines.append(f"channels: {', '.join(there)} in pretraining, {', '.join(here)} here")
    schemes = before.get("normalization_schemes")
    if schemes is not None and list(schemes) != list(plan.normalization_schemes):
        lines.append(
            f"normalisation: {', '.join(schemes)} in pretraining, {', '.join(plan.normalization_schemes)} here"
        )
    spacing = before.get("spacing")
    if spacing is not None and (
        len(spacing) != len(plan.spacing)
        or not all(math.isclose(a, b, rel_tol=0.02) for a, b in zip(spacing, plan.spacing))
    ):
        lines.append(f"spacing: {_sizes(spacing)} mm in pretraining, {_sizes(plan.spacing)} mm here")
    patch = before.get("patch_size")
    if patch is not None and [int(p) for p in patch] != list(plan.patch_size):
        lines.append(f"patch: {_sizes(patch)} voxels in pretraining, {_sizes(plan.patch_size)} here")
    return [f"differs in {line}" for line in lines]
