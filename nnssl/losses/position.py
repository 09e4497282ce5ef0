"""Position prediction by similarity: the losses of volume contrast (VoCo), with the switches that tell its versions apart.

Wu et al. 2024, "Large-Scale 3D Medical Image Pre-training with Geometric Context Priors" (arXiv:2410.09890) and its released
code; the first form is arXiv:2402.17300. No temperature and no softmax: similarities themselves are to equal overlaps.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nnssl.amp import at_least_float32

EPS = 1e-6
WEIGHTINGS = ("overlap", "binary", "all")
NEGATIVES = ("log", "square")
POOLS = ("volume", "batch")
REGULARISATIONS = ("square", "linear")


def similarity(u: Tensor, v: Tensor, *, relu: bool = True) -> Tensor:
    """``ReLU(cos(u, v))`` (or ``cos``) of all pairs of ``(..., N, D)`` and ``(..., M, D)``: ``(..., N, M)``, in float32 at least.

    ``cos = u.v / (max(|u|, 1e-8) max(|v|, 1e-8))``, 0 for a zero vector.
    """
    with torch.autocast(u.device.type, enabled=False):
        a, b = (F.normalize(at_least_float32(x), dim=-1, eps=1e-8) for x in (u, v))
        cosine = a @ b.transpose(-1, -2)
        return cosine.relu() if relu else cosine


class PositionLoss(nn.Module):
    """How far similarities are from overlaps.

    With ``d = |y - s|``, ``Z = {y == 0}`` and ``eps = 1e-6``, sums over the crops and cells of one volume::

        positive = sum(-y log(1 - d + eps)) / (sum(y) + eps)      "overlap"
                   mean over y > 0 of -log(1 - d + eps)           "binary"
                   mean over all cells of -log(1 - d + eps)       "all", which has no negative term
        negative = sum_Z(-log(1 - s + eps)) / (|Z| + eps)         "log"
                   mean over Z of s^2                             "square"

    and the loss is the mean over volumes of ``positive + negative``. ``1 - d`` and ``1 - s`` are cut off at 0.

    Args:
        weighting, negatives: which of these.
        pool: ``"volume"``, or ``"batch"``: sums over the whole batch at once (MIC-DKFZ's code).

    Raises:
        ValueError: for an unknown switch.
    """

    def __init__(self, *, weighting: str = "overlap", negatives: str = "log", pool: str = "volume") -> None:
        super().__init__()
        for value, known in ((weighting, WEIGHTINGS), (negatives, NEGATIVES), (pool, POOLS)):
            if value not in known:
                raise ValueError(f"'{value}' is none of {', '.join(known)}")
        self.weighting, self.negatives, self.pool = weighting, negatives, pool

    def forward(self, target: Tensor, predicted: Tensor, valid: Tensor | None = None) -> Tensor:
        """Compute the loss.

        Args:
            target: y, ``(B, S, n)`` in [0, 1]: overlaps, or a teacher's similarities; no gradient.
            predicted: s, ``(B, S, n)`` in [-1, 1].
            valid: ``(B, S, n)`` bool, pairs that count; a volume without any is left out of the mean.

        Returns:
            ``()`` float32; 0, connected to the graph, where nothing counts.
        """
        with torch.autocast(predicted.device.type, enabled=False):
            y, s = at_least_float32(target).detach(), at_least_float32(predicted)
            valid = torch.ones_like(y, dtype=torch.bool) if valid is None else valid
            if self.pool == "batch":
                y, s, valid = (x.reshape(1, -1, x.shape[-1]) for x in (y, s, valid))
            each = self._positive(y, s, valid)
            if self.weighting != "all":
                each = each + self._negative(s, valid & (y == 0))
            return _mean(each, valid.flatten(1).any(1))

    def _positive(self, y: Tensor, s: Tensor, valid: Tensor) -> Tensor:
        cost = -((1 - (y - s).abs()).clamp_min(0) + EPS).log()
        if self.weighting == "overlap":
            weight = torch.where(valid, y, 0.0)
            return (weight * cost).sum((1, 2)) / (weight.sum((1, 2)) + EPS)
        chosen = valid & (y > 0) if self.weighting == "binary" else valid
        return _sum(cost, chosen) / chosen.sum((1, 2)).clamp_min(1)

    def _negative(self, s: Tensor, chosen: Tensor) -> Tensor:
        if self.negatives == "square":
            return _sum(s.square(), chosen) / chosen.sum((1, 2)).clamp_min(1)
        return _sum(-((1 - s).clamp_min(0) + EPS).log(), chosen) / (chosen.sum((1, 2), dtype=s.dtype) + EPS)


def orthogonality(
    bases: Tensor, *, kind: str = "square", detach: bool = False, relu: bool = True, valid: Tensor | None = None
) -> Tensor:
    """Push the base crops of a volume apart: the mean over pairs i < j of ``ReLU(cos(q_i, q_j))^2``, then over volumes.

    Args:
        bases: ``(B, n, D)``, n >= 2.
        kind: ``"square"``, or ``"linear"``: ``|s_ij|``.
        detach: no gradient to j, as in the released code; the last base then gets none at all, the first n - 1 of them.
        relu: see :func:`similarity`.
        valid: ``(B, n)`` bool, bases that count.

    Returns:
        ``()`` float32, 0 for orthogonal bases and 1 for equal ones.

    Raises:
        ValueError: for an unknown kind.
    """
    if kind not in REGULARISATIONS:
        raise ValueError(f"'{kind}' is none of {', '.join(REGULARISATIONS)}")
    s = similarity(bases, bases.detach() if detach else bases, relu=relu)
    valid = torch.ones(bases.shape[:2], dtype=torch.bool, device=bases.device) if valid is None else valid
    pairs = (valid[:, :, None] & valid[:, None]).triu(1)
    each = _sum(s.square() if kind == "square" else s.abs(), pairs) / pairs.sum((1, 2)).clamp_min(1)
    return _mean(each, pairs.flatten(1).any(1))


def _sum(x: Tensor, chosen: Tensor) -> Tensor:
    """Per volume; what is not chosen has no gradient."""
    return torch.where(chosen, x, 0.0).sum((1, 2))


def _mean(each: Tensor, used: Tensor) -> Tensor:
    return torch.where(used, each, 0.0).sum() / used.sum().clamp_min(1)
