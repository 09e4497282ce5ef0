"""What a checkpoint was trained on, as far as its file tells, and where that differs from a plan."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import nn

from nnssl.networks import unwrap
from nnssl.plans import Plan
from nnssl.weights.layout import Layout
from nnssl.weights.load import Checkpoint


class _Trained(NamedTuple):
    """What nnU-Net's trainer puts into its files."""

    plans: dict[str, Any]
    configuration: str
    values: dict[str, Any]
    """Of the configuration, with what it inherits."""
    channels: list[str] | None


def _nnunet(checkpoint: Checkpoint) -> _Trained | None:
    init_args = checkpoint.content.get("init_args")
    if not isinstance(init_args, Mapping) or not isinstance(init_args.get("plans"), Mapping):
        return None
    plans, configuration = dict(init_args["plans"]), str(init_args.get("configuration"))
    known = plans.get("configurations") or {}
    name: Any = configuration
    values: dict[str, Any] = {}
    passed = []
    while name in known and name not in passed:
        values = {**known[name], **values}
        passed.append(name)
        name = known[name].get("inherits_from")
    description = init_args.get("dataset_json")
    described = description if isinstance(description, Mapping) else {}
    channels = described.get("channel_names", described.get("modality"))
    if not isinstance(channels, Mapping) or not channels:
        return _Trained(plans, configuration, values, None)
    order = sorted(channels, key=lambda k: int(k) if str(k).isdecimal() else 0)
    return _Trained(plans, configuration, values, [str(channels[k]) for k in order])


def second_stage(checkpoint: Checkpoint) -> bool:
    """Whether a file of nnU-Net's is of the second stage of a cascade, whose network also sees a segmentation."""
    trained = _nnunet(checkpoint)
    return trained is not None and trained.values.get("previous_stage") is not None


def image_channels(checkpoint: Checkpoint) -> int | None:
    """Number of the image's channels in a file of nnU-Net's; None where it does not tell."""
    trained = _nnunet(checkpoint)
    return len(trained.channels) if trained and trained.channels else None


def trained_on(checkpoint: Checkpoint) -> dict[str, Any]:
    """Plan, patch, spacing, normalisation and channel names, as files of nnssl, of MIC-DKFZ's nnssl and of nnU-Net tell them.

    Returns:
        ``plan`` (names of dataset, plans and configuration), ``patch_size`` (voxels), ``spacing`` (mm), ``normalization_schemes``
        and ``channels``; what the file does not tell is left out.
    """
    ours, trained = checkpoint.nnssl, _nnunet(checkpoint)
    values: Mapping[str, Any]
    channels = None
    if ours.get("plan"):
        plan, channels = ours["plan"], ours.get("channels")
        values = {**ours, "patch_size": plan.get("patch_size")}
    elif trained is not None:
        plan = {**trained.plans, "configuration": trained.configuration}
        values, channels = trained.values, trained.channels
    else:
        plan = dict((checkpoint.adaptation_plan or {}).get("pretrain_plan") or {})
        plan["configuration"], values = next(iter((plan.get("configurations") or {}).items()), (None, {}))
    found = {key: values.get(key) for key in ("patch_size", "spacing", "normalization_schemes")}
    names = {k: plan[k] for k in ("dataset_name", "plans_name", "configuration") if plan.get(k) is not None}
    told = {"plan": names, **found, "channels": channels}
    return {k: (v if isinstance(v, dict) else list(v)) for k, v in told.items() if v}


def _sizes(values: Sequence[Any]) -> str:
    return "x".join(f"{float(v):.4g}" for v in values)


def _is_ct(channels: Sequence[str]) -> bool:
    """nnU-Net's own rule: a channel that is called CT is CT."""
    return any(c.lower() == "ct" for c in channels)


def differences(checkpoint: Checkpoint, plan: Plan) -> list[str]:
    """One line for each thing besides the network in which pretraining and plan differ; empty where nothing does or is known."""
    before, lines = trained_on(checkpoint), []
    here = [plan.channel_names[i] for i in sorted(plan.channel_names)]
    there = before.get("channels")
    if there is not None and there != here:
        what = "channels" if _is_ct(there) == _is_ct(here) else "modality"
        lines.append(f"{what}: {', '.join(there)} in pretraining, {', '.join(here)} here")
    schemes = before.get("normalization_schemes")
    if schemes is not None and schemes != list(plan.normalization_schemes):
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


def _other_strides(checkpoint: Checkpoint, network: nn.Module) -> list[str]:
    """One line for each encoder stage whose stride was another in pretraining: it is in no tensor's shape."""
    architecture = (checkpoint.adaptation_plan or {}).get("architecture_plans") or {}
    before = (architecture.get("arch_kwargs") or {}).get("strides")
    now = getattr(getattr(unwrap(network), "encoder", None), "strides", None)
    lines = []
    for i, (given, wanted) in enumerate(zip(before or (), now or ())):
        there = [given] * len(wanted) if isinstance(given, int) else [int(k) for k in given]
        here = [int(k) for k in wanted]
        if there != here:
            lines.append(
                f"encoder stage {i}: stride {_sizes(there)} in pretraining, {_sizes(here)} here; weights as they are"
            )
    return lines


def notes(checkpoint: Checkpoint, plan: Plan | None, network: nn.Module, stale: int) -> list[str]:
    """What a person should know of a transfer besides its table; ``stale`` tensors have aliases that disagree in the file."""
    lines, layout = list(checkpoint.remarks), Layout.of(checkpoint.weights)
    if checkpoint.verdict is not None and not checkpoint.verdict[0]:
        lines.append(f"WARNING, the pretraining's own verdict: {checkpoint.verdict[1]}")
    if plan is not None:
        lines += differences(checkpoint, plan)
    if layout.stem is None and not layout.is_transformer:
        lines.append("the file holds no first convolution (stem); the network's stays random")
    if stale:
        lines.append(
            f"{stale} tensors have several names in the file with different values; those under 'encoder.' and 'conv'/'norm' "
            "were taken, stock nnU-Net would take the others"
        )
    made_for = checkpoint.nnssl.get("plan", {})
    if plan is not None and made_for.get("architecture_hash") not in (None, plan.architecture_hash):
        lines.append(
            f"the weights were made for another network ({made_for.get('dataset_name')}, {made_for.get('plans_name')}, "
            f"{made_for.get('configuration')}) whose shapes agree; strides or kernels may differ"
        )
    return lines + _other_strides(checkpoint, network)
