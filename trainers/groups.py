"""Parameter groups by stage, selected by name: ``decoder.parameters()`` of nnU-Net's networks contains the encoder.

The names are those of the network itself, each tensor once, so that groups are disjoint and complete.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from nnssl.networks import canonical_state_dict, unwrap
from nnssl.parts import DECODER, ENCODER, Part, encoder_stage, part_of

_STAGE = re.compile(r"(?:decoder\.)?encoder\.stages\.(\d+)\.")
_BLOCK = re.compile(r"eva\.blocks\.(\d+)\.")
_LAST = Part("encoder norm")


def group_of(name: str) -> Part:
    """The group of a parameter: ``"encoder stage 0"`` (with the stem), ..., ``"decoder stage 0"``, ..., ``"seg_layers"``.

    Of a Primus: ``"encoder stage 0"`` is the embedding with its positions, then come the transformer blocks from 1 on,
    ``"encoder norm"`` behind the last of them, and ``"up_projection"``.
    """
    part = part_of(name)
    if part != ENCODER:
        return part
    block = _BLOCK.match(name)
    if block:
        return encoder_stage(int(block[1]) + 1)
    if name.startswith("eva.norm."):
        return _LAST
    stage = _STAGE.match(name)
    return encoder_stage(int(stage[1]) if stage else 0)


def _depth(group: Part) -> tuple[int, int]:
    """Sorts from the heads down to the stem."""
    if group == _LAST:
        return 3, -(10**6)
    kind = 0 if group.is_head else {DECODER: 1, ENCODER: 3}.get(group.kind, 2)
    return kind, -(group.stage or 0)


def parameter_groups(network: nn.Module) -> list[dict[str, Any]]:
    """All parameters of a network, also a wrapped one, each in one named group; the heads' first and the stem's last."""
    groups: dict[Part, list[nn.Parameter]] = {}
    for name, parameter in unwrap(network).named_parameters():
        groups.setdefault(group_of(name), []).append(parameter)
    return [{"name": str(name), "params": groups[name]} for name in sorted(groups, key=_depth)]


def backbone_groups(parts: Iterable[str], groups: Iterable[str]) -> tuple[str, ...]:
    """The groups that lie in the given parts (``"encoder"``, ``"decoder stage 0"``, ...) of a transfer report."""
    wanted = set(parts)
    return tuple(g for g in groups if g in wanted or (ENCODER in wanted and Part(g).kind == ENCODER))


def hold_statistics(network: nn.Module, frozen: Iterable[nn.Parameter]) -> None:
    """Put batch normalisations whose parameters are frozen into evaluation mode, the others into training mode.

    A frozen part must compute the same at each step; instance normalisation does so by itself.
    """
    held = {id(p) for p in frozen}
    for module in unwrap(network).modules():
        if isinstance(module, _BatchNorm) and module.affine:
            module.train(id(module.weight) not in held)


def changed_parts(network: nn.Module, names: Iterable[str]) -> list[Part]:
    """The parts that the named tensors lie in, in the order of the network."""
    wanted = set(names)
    return list(dict.fromkeys(part_of(name) for name in canonical_state_dict(network) if name in wanted))


def build_optimizer(parameters: Any, kind: str, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """nnU-Net's SGD, Adam without weight decay, or AdamW as nnU-Net's Primus trainers have it; of parameters or groups."""
    if kind == "adamw":
        return torch.optim.AdamW(parameters, lr, weight_decay=weight_decay, betas=(0.9, 0.98))
    if kind == "adam":
        return torch.optim.Adam(parameters, lr)
    return torch.optim.SGD(parameters, lr, momentum=0.99, weight_decay=weight_decay, nesterov=True)
