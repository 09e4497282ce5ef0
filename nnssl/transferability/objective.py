"""The robustness criterion as a training objective: the hinge, and forms of it that do not fall silent once it is satisfied.

With ``u_ij = delta_ij + m`` for anchor ``i`` and its negatives ``j`` (see :mod:`nnssl.transferability.robustness`)::

    hinge      mean_j max(0, u_ij)                       the criterion; no gradient from a satisfied pair
    hardest    the same over the k largest u_ij          fewer, harder pairs; still silent once these are satisfied
    softplus   mean_j t log(1 + exp(u_ij / t))           a smooth hinge; every pair keeps a little gradient
    lse        t log(1 + sum_j exp(u_ij / t))            a smooth maximum: the hardest pairs weigh most, none falls silent

``softplus`` and ``lse`` tend to the hinge's mean and maximum as t goes to 0. ``lse`` is InfoNCE at temperature t with an
additive margin, over negatives of the other view only.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nnssl.errors import NnsslError, did_you_mean
from nnssl.transferability.robustness import Separation

FORMS = ("hinge", "hardest", "softplus", "lse")


def separation_loss(
    separation: Separation, *, margin: float = 0.5, form: str = "lse", temperature: float = 0.1, hardest: int = 4
) -> Tensor:
    """Mean loss over the anchors that have a negative: ``()``; 0 with a zero gradient where none has.

    Args:
        separation: distances of N anchors.
        margin: m.
        form: one of :data:`FORMS`.
        temperature: t of the smooth forms, in units of the distance.
        hardest: k of ``hardest``.
    """
    if form not in FORMS:
        raise NnsslError(f"unknown form '{form}'.{did_you_mean(form, FORMS)} Known: {', '.join(FORMS)}.")
    u, mask = separation.delta + margin, separation.mask
    if form == "hinge":
        each = separation.mean_over_negatives(u.clamp_min(0))
    elif form == "softplus":
        each = separation.mean_over_negatives(temperature * F.softplus(u / temperature))
    elif form == "hardest":
        k = min(hardest, u.shape[1])
        top, index = u.masked_fill(~mask, -torch.inf).topk(k, dim=1)
        counted = mask.gather(1, index)
        each = torch.where(counted, top.clamp_min(0), 0.0).sum(1) / counted.sum(1).clamp_min(1)
    else:
        logits = (u / temperature).masked_fill(~mask, -torch.inf)
        each = temperature * torch.logsumexp(F.pad(logits, (1, 0)), dim=1)  # the 0 in front is the 1 of log(1 + ...)
    anchors = mask.any(dim=1)
    return torch.where(anchors, each, 0.0).sum() / anchors.sum().clamp_min(1)
