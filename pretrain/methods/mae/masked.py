"""What masked reconstruction of any kind shares: whether its options fit the network, and how it is optimised."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from nnssl.errors import NnsslError
from nnssl.plans import Plan
from nnssl.pretrain.geometry import size_text

PRIMUS_CLIP = 1.0
PRIMUS_BETAS = (0.9, 0.98)


def check_options(config: Any, plan: Plan) -> None:
    """Whether the options of masking (:class:`nnssl.pretrain.methods.mae.method.MaskedConfig`) fit together, and the network.

    Raises:
        NnsslError: they do not.
    """
    if config.masking == "sparse" and (config.fill == "learned" or config.per_channel):
        raise NnsslError(
            "masking=sparse computes nothing where voxels are hidden: fill=learned and per_channel need dense."
        )
    if not plan.is_primus:
        return
    given = {"masking=sparse": config.masking == "sparse", "fill=learned": config.fill == "learned"}
    wrong = [text for text, asked in {**given, "per_channel=true": config.per_channel}.items() if asked]
    if wrong:
        raise NnsslError(
            f"{', '.join(wrong)}: of a {plan.network_class} hidden blocks are tokens of all channels that are left out, so that "
            "there is nothing to fill or to compute sparsely. Leave it out."
        )
    token = plan.total_stride
    if config.block is not None and any(b % t for b, t in zip(config.block, token)):
        raise NnsslError(
            f"block={','.join(map(str, config.block))}: a {plan.network_class} hides whole tokens of {size_text(token)} "
            "voxels, so that a block must be a multiple of that on each axis."
        )


def uses_adamw(config: Any, plan: Plan) -> bool:
    """Whether the optimiser is AdamW: as asked, else for Primus."""
    return plan.is_primus if config.optimiser == "auto" else config.optimiser == "adamw"


def make_optimiser(config: Any, module: nn.Module, plan: Plan) -> torch.optim.Optimizer:
    """SGD as nnU-Net's, or AdamW without decay of norms, biases, tokens and positions.

    Args:
        config: learning rate and decay; where they are None, what its papers have for such a network.
        module: whose parameters that require gradients are trained.
        plan: of the network.
    """
    params = {n: p for n, p in module.named_parameters() if p.requires_grad}
    lr, decay = config.lr, config.weight_decay
    if not uses_adamw(config, plan):
        return torch.optim.SGD(
            params.values(),
            1e-2 if lr is None else lr,
            momentum=config.momentum,
            weight_decay=3e-5 if decay is None else decay,
            nesterov=config.momentum > 0,
        )
    usual = (3e-4, PRIMUS_BETAS) if plan.is_primus else (5e-4, (0.9, 0.999))
    still = {n for n, p in params.items() if p.squeeze().ndim <= 1 or n.endswith("pos_embed")}
    groups: list[dict[str, Any]] = [
        {"params": [p for n, p in params.items() if n not in still]},
        {"params": [p for n, p in params.items() if n in still], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups, lr=usual[0] if lr is None else lr, weight_decay=0.05 if decay is None else decay, betas=usual[1]
    )
