"""The network that a checkpoint's weights belong to, from what its file says about it."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from torch import Tensor, nn

from nnssl.errors import NnsslError
from nnssl.networks import alias_map
from nnssl.plans import Plan
from nnssl.weights.compare import second_stage
from nnssl.weights.layout import Layout
from nnssl.weights.load import Checkpoint

_CLASSES = "dynamic_network_architectures.architectures.unet"
_ENCODER_CONV = re.compile(r"encoder\.stages\.(\d+)\.(?:\d+\.convs|blocks)\.(\d+)\.conv1?\.")
_DECODER_CONV = re.compile(r"decoder\.stages\.(\d+)\.convs\.(\d+)\.conv\.")
_IMPORTED = ("conv_op", "norm_op", "dropout_op", "nonlin")
_RES_ENC_L: dict[str, Any] = {
    "n_stages": 6,
    "features_per_stage": [32, 64, 128, 256, 320, 320],
    "conv_op": "torch.nn.modules.conv.Conv3d",
    "kernel_sizes": [[3, 3, 3]] * 6,
    "strides": [[1, 1, 1]] + [[2, 2, 2]] * 5,
    "n_blocks_per_stage": [1, 3, 4, 6, 6, 6],
    "n_conv_per_stage_decoder": [1] * 5,
    "conv_bias": True,
    "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
    "norm_op_kwargs": {"eps": 1e-5, "affine": True},
    "dropout_op": None,
    "dropout_op_kwargs": None,
    "nonlin": "torch.nn.LeakyReLU",
    "nonlin_kwargs": {"inplace": True},
}


def preset(name: str) -> tuple[str, dict[str, Any]] | None:
    """Class and arguments of an architecture that MIC-DKFZ's nnssl names without arguments: ``"ResEncL"`` (Wald et al. 2024)."""
    return ("ResidualEncoderUNet", deepcopy(_RES_ENC_L)) if name == "ResEncL" else None


def architecture_of(checkpoint: Checkpoint) -> tuple[str, dict[str, Any]] | None:
    """Class name and arguments of a checkpoint's U-Net, as the file or else its tensors tell; None of another network."""
    return recorded_architecture(checkpoint) or inferred(checkpoint.weights)


def recorded_architecture(checkpoint: Checkpoint) -> tuple[str, dict[str, Any]] | None:
    """Class name and arguments of a checkpoint's U-Net; None where the file does not tell, or it is another network."""
    plan = plan_of(checkpoint)
    if plan is not None:
        return plan.network_class, dict(plan.config.network_arch_init_kwargs)
    recorded = (checkpoint.adaptation_plan or {}).get("architecture_plans") or {}
    name = str(recorded.get("arch_class_name", "")).rsplit(".", 1)[-1]
    kwargs = recorded.get("arch_kwargs") or (checkpoint.adaptation_plan or {}).get("architecture_kwargs")
    if kwargs and name in ("PlainConvUNet", "ResidualEncoderUNet", "ResEncL"):
        return ("ResidualEncoderUNet" if name == "ResEncL" else name), dict(kwargs)
    return preset(name)


def inferred(weights: Mapping[str, Tensor]) -> tuple[str, dict[str, Any]] | None:
    """Class and arguments of a U-Net as its tensors tell them, for its names; None of another network.

    Strides are those of the transposed convolutions. Where the decoder is missing they are unknown: 2 is put there, since they
    change no name and no shape of an encoder.
    """
    layout = Layout.of(weights)
    convs = {n: t for n, t in weights.items() if n.endswith("conv.weight") and ".all_modules." not in n}
    first: dict[int, Tensor] = {}
    number: dict[int, set[str]] = defaultdict(set)
    in_decoder: dict[int, set[str]] = defaultdict(set)
    for name, tensor in convs.items():
        if match := _ENCODER_CONV.match(name):
            first.setdefault(int(match[1]), tensor)
            number[int(match[1])].add(match[2])
        elif match := _DECODER_CONV.match(name):
            in_decoder[int(match[1])].add(match[2])
    n, dim = len(first), layout.dim
    if not n or dim is None or sorted(first) != list(range(n)) or any(".conv3." in name for name in convs):
        return None
    strides = [[1] * dim, *([2] * dim for _ in range(n - 1))]
    for i in range(n - 1):
        up = weights.get(f"decoder.transpconvs.{i}.weight")
        if up is not None and up.ndim == dim + 2:
            strides[n - 1 - i] = [int(k) for k in up.shape[2:]]
    norm = "BatchNorm" if any(name.endswith("running_mean") for name in weights) else "InstanceNorm"
    per_stage = [len(number[i]) for i in range(n)]
    arguments = {
        **deepcopy(_RES_ENC_L),
        "n_stages": n,
        "features_per_stage": [int(first[i].shape[0]) for i in range(n)],
        "conv_op": f"torch.nn.modules.conv.Conv{dim}d",
        "kernel_sizes": [[int(k) for k in first[i].shape[2:]] for i in range(n)],
        "strides": strides,
        "n_blocks_per_stage": per_stage,
        "n_conv_per_stage_decoder": [len(in_decoder.get(i, "1")) for i in range(n - 1)],
        "conv_bias": any(name.endswith(".conv.bias") for name in weights),
        "norm_op": f"torch.nn.modules.{norm.lower()}.{norm}{dim}d",
    }
    if layout.kind != "ResidualEncoderUNet":
        arguments["n_conv_per_stage"] = arguments.pop("n_blocks_per_stage")
    return layout.kind, arguments


def plan_of(checkpoint: Checkpoint) -> Plan | None:
    """The plan that a checkpoint of nnU-Net's trainer carries; None in other files. Refuses the second stage of a cascade."""
    init_args = checkpoint.content.get("init_args")
    if (
        not isinstance(init_args, dict)
        or not isinstance(init_args.get("plans"), dict)
        or "dataset_json" not in init_args
    ):
        return None
    if second_stage(checkpoint):
        raise NnsslError(
            f"{checkpoint.path} is the second stage of a cascade, whose network also sees a segmentation; it is not converted. "
            "Name it in a plan, which takes the image's weights: nnssl_plan --checkpoint FILE --adapt channels=first --name NAME"
        )
    return Plan.from_dicts(init_args["plans"], init_args["configuration"], init_args["dataset_json"])


def build(class_name: str, arguments: dict[str, Any], n_channels: int, n_classes: int) -> nn.Module:
    """An uninitialised network, without memory for its tensors: for names and shapes alone."""
    with torch.device("meta"):
        return get_network_from_plans(
            f"{_CLASSES}.{class_name}",
            arguments,
            [key for key in _IMPORTED if key in arguments],
            n_channels,
            n_classes,
            allow_init=False,
            deep_supervision=False,
        )


def complete_aliases(
    weights: dict[str, Tensor], architecture: tuple[str, dict[str, Any]], where: str
) -> dict[str, Tensor]:
    """The same weights under every name of the stock network, tensors of other modules left out.

    Refuses a tensor of another shape than in the network that the file describes.
    """
    head = weights.get("decoder.seg_layers.0.weight")
    network = build(*architecture, Layout.of(weights).channels or 1, 1 if head is None else int(head.shape[0]))
    names, shapes = alias_map(network), {n: t.shape for n, t in network.state_dict().items()}
    found: dict[str, Tensor] = {}
    for name, canonical in names.items():
        if name in weights and canonical not in found:
            found[canonical] = weights[name]
    wrong = [n for n, t in found.items() if t.shape != shapes[n] and ".seg_layers." not in n]
    if wrong:
        raise NnsslError(
            f"{where} describes a {architecture[0]} in which '{wrong[0]}' has the shape {tuple(shapes[wrong[0]])}, "
            f"but holds {tuple(found[wrong[0]].shape)}."
        )
    return {name: found[canonical] for name, canonical in names.items() if canonical in found}
