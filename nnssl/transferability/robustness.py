"""The robustness criterion: are two views of one volume closer to each other than to other volumes?

Hidy, Bakos, Lukács 2024, arXiv:2410.18677. With an anchor ``q_i = f(view 0 of i)``, its positive ``p_i = f(view 1 of i)``
and negatives ``p_j`` from view 1 of *other* cases::

    delta_ij = dist(q_i, p_i) - dist(q_i, p_j)
    R_m      = mean over i of mean over negatives j of max(0, delta_ij + m)

**R is a loss: lower is better.** ``score = m - R``: 0 for a collapsed network (every volume the same vector), negative for worse.
Differs from the published code: all pairs instead of one mirrored negative each (the same expectation, lower variance,
independent of the order); ``negatives="mirror"`` keeps theirs and refuses odd N, where it makes a sample its own negative.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nnssl.errors import NnsslError, did_you_mean
from nnssl.transferability.distances import degenerate, distance_matrix

NEGATIVES = ("all", "mirror")


@dataclass(frozen=True)
class Separation:
    """How far N anchors are from their positives and from their K candidates for a negative.

    Attributes:
        positive: ``(N,)`` distance of each anchor to its positive.
        negative: ``(N,)`` mean distance to its negatives.
        delta: ``(N, K)`` positive minus negative distance; K = N (all pairs) or 1 (mirror).
        mask: ``(N, K)`` bool, True where the column is a negative of the row.
    """

    positive: Tensor
    negative: Tensor
    delta: Tensor
    mask: Tensor

    def mean_over_negatives(self, x: Tensor) -> Tensor:
        """Mean of ``x`` ``(N, K)`` over each anchor's negatives: ``(N,)``."""
        return _masked_mean(x, self.mask)


def mirror_index(n: int) -> Tensor:
    """The published choice of one negative per anchor, ``(1 - i) mod n``: ``(n,)`` int64, an involution."""
    return (1 - torch.arange(n)) % n


def separate(
    anchors: Tensor,
    positives: Tensor,
    *,
    distance: str = "cosine",
    negatives: str = "all",
    groups: Sequence[object] | Tensor | None = None,
    check: bool = True,
) -> Separation:
    """Measure the distances that the criterion compares, of two views ``(N, D)`` of the same N volumes.

    Args:
        anchors, positives, distance: see :func:`distance_matrix`.
        negatives: ``all`` pairs, or ``mirror``, the published single one.
        groups: case of each sample; samples of one case are never each other's negative. None: all differ. A tensor
            ``(N,)`` of numbers is not looked at on the host: a sample without a negative then simply has none.
        check: raise for :func:`degenerate` vectors. Checking synchronises a GPU.

    Raises:
        NnsslError: degenerate vectors, fewer than two cases, odd N with ``mirror``, an unknown option.
    """
    n = len(anchors)
    if negatives not in NEGATIVES:
        raise NnsslError(f"unknown negatives '{negatives}'.{did_you_mean(negatives, NEGATIVES)} Known: all, mirror.")
    if n < 2:
        raise NnsslError(f"the robustness criterion compares volumes and needs at least 2, got {n}.")
    if check:
        bad = degenerate(anchors, distance) | degenerate(positives, distance)
        if bool(bad.any()):
            which = ", ".join(map(str, bad.nonzero().flatten().tolist()[:8]))
            raise NnsslError(
                f"{int(bad.sum())} of {n} representations are zero, constant or not finite (samples {which}): their "
                f"{distance} distance is undefined. The network has collapsed or diverged there."
            )
    candidate = distance_matrix(anchors, positives, distance)
    positive = candidate.diagonal()
    mask = _other_cases(n, groups, anchors.device)
    if negatives == "mirror":
        if n % 2:
            raise NnsslError(f"negatives='mirror' needs an even number of samples (one would be its own), got {n}.")
        index = mirror_index(n).to(anchors.device)[:, None]
        candidate, mask = candidate.gather(1, index), mask.gather(1, index)
        if not bool(mask.all()):
            raise NnsslError("negatives='mirror' would compare two samples of one case; use one sample per case.")
    return Separation(positive, _masked_mean(candidate, mask), positive[:, None] - candidate, mask)


def _other_cases(n: int, groups: Sequence[object] | Tensor | None, device: torch.device) -> Tensor:
    if groups is None:
        return ~torch.eye(n, dtype=torch.bool, device=device)
    if len(groups) != n:
        raise ValueError(f"{n} samples but {len(groups)} groups")
    if isinstance(groups, Tensor):
        return groups[:, None] != groups[None, :]
    number = {g: i for i, g in enumerate(dict.fromkeys(groups))}
    if len(number) < 2:
        raise NnsslError("all samples come from one case: the robustness criterion needs other cases as negatives.")
    ids = torch.tensor([number[g] for g in groups], device=device)
    return ids[:, None] != ids[None, :]


def _masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, x, torch.zeros_like(x)).sum(dim=1) / mask.sum(dim=1).clamp_min(1)


def hinge(separation: Separation, margin: float = 0.5) -> Tensor:
    """Each anchor's mean hinge over its negatives: ``(N,)``, non-decreasing, 1-Lipschitz and convex in the margin, at least 0."""
    return separation.mean_over_negatives((separation.delta + margin).clamp_min(0))


def robustness_loss(separation: Separation, margin: float = 0.5) -> Tensor:
    """``R_m``, the mean hinge; **lower is better**. A collapsed network has exactly ``margin``. Scalar."""
    return hinge(separation, margin).mean()


def robustness_score(separation: Separation, margin: float = 0.5) -> Tensor:
    """``margin - R_m``; higher is better, at most ``margin``, 0 for a collapsed network. Scalar."""
    return margin - robustness_loss(separation, margin)
