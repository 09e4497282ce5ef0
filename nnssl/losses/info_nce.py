"""InfoNCE over pairs of voxels (or of anything), in row blocks so that ten thousand pairs fit in memory.

Kats et al. 2024, arXiv:2401.06473, equation 1, read as in the authors' code and in vox2vec: both views are anchors,
negatives come from both views, the mean is taken over all anchors.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class InfoNCE(nn.Module):
    r"""Voxel contrast between two views of the same places.

    .. math::
        l(k,i) = -s(z_k^i, z_{k'}^i) +
        \log\Big(e^{s(z_k^i, z_{k'}^i)} + \sum_{j \ne i} \sum_{m \in \{A,B\}} e^{s(z_k^i, z_m^j)}\Big),
        \quad L_c = \frac{1}{2N} \sum_i l(A,i) + l(B,i), \quad s(x, y) = x \cdot y / \tau

    with :math:`z` of unit length. The denominator has 1 positive and :math:`2(N-1)` negatives; an anchor is never
    compared with itself. The loss of vectors that are all equal is ``log(2N - 1)``.

    Args:
        temperature: tau, > 0.
        chunk: anchors whose similarities are held at once, >= 1: the memory is about ``4 * chunk * 2N * 3`` bytes.

    Raises:
        ValueError: for a temperature or a chunk that is not positive.
    """

    def __init__(self, *, temperature: float = 0.1, chunk: int = 1024) -> None:
        super().__init__()
        if temperature <= 0 or chunk < 1:
            raise ValueError(f"temperature and chunk must be positive, got {temperature} and {chunk}")
        self.temperature = temperature
        self.chunk = chunk

    def forward(self, a: Tensor, b: Tensor, group: Tensor | None = None) -> Tensor:
        """See :func:`info_nce`; ``a`` and ``b`` are made unit length first. 0 (with a graph) for ``N = 0``."""
        with torch.autocast(a.device.type, enabled=False):
            a, b = F.normalize(a.float(), dim=1), F.normalize(b.float(), dim=1)
            return info_nce(a, b, self.temperature, self.chunk, group)


def info_nce(a: Tensor, b: Tensor, temperature: float, chunk: int = 1024, group: Tensor | None = None) -> Tensor:
    """Mean InfoNCE of unit vectors over the 2N anchors, whatever their groups, see :class:`InfoNCE`.

    Args:
        a, b: ``(N, D)`` unit vectors; row ``i`` of both shows the same place.
        temperature: tau.
        chunk: anchors per block; blocks are recomputed in the backward pass where there are several.
        group: ``(N,)`` int64; if given, only rows of the same group are negatives of each other.

    Raises:
        ValueError: if the shapes of ``a`` and ``b`` differ.
    """
    if a.shape != b.shape or a.ndim != 2:
        raise ValueError(f"a and b must both be (N, D), got {tuple(a.shape)} and {tuple(b.shape)}")
    n = a.shape[0]
    if n == 0:
        return a.sum() + b.sum()
    if group is not None:
        members = [torch.nonzero(group == g).squeeze(1) for g in group.unique()]
        return torch.stack([info_nce(a[m], b[m], temperature, chunk) * (len(m) / n) for m in members]).sum()
    z = torch.cat([a, b])
    total = z.new_zeros(())
    for first in range(0, 2 * n, chunk):
        if chunk >= 2 * n or not z.requires_grad:
            total = total + _block(z, first, chunk, temperature)
        else:
            total = total + checkpoint(
                _block, z, first, chunk, temperature, use_reentrant=False, preserve_rng_state=False
            )
    return total / (2 * n)


def _block(z: Tensor, first: int, chunk: int, temperature: float) -> Tensor:
    """Summed loss of anchors ``first .. first + chunk`` of ``z`` ``(2N, D)``; row i and row i + N (mod 2N) are a pair."""
    rows = torch.arange(first, min(first + chunk, len(z)), device=z.device)
    logits = z[rows] @ z.T / temperature
    logits = logits.scatter(1, rows[:, None], -math.inf)
    return F.cross_entropy(logits, (rows + len(z) // 2) % len(z), reduction="sum")


def chance_level(n: int) -> float:
    """Loss of an embedding that tells nothing apart: ``log(2N - 1)`` for ``n`` pairs, 0 for none."""
    return math.log(2 * n - 1) if n > 0 else 0.0


@torch.no_grad()
def nearest_share(a: Tensor, b: Tensor, chunk: int = 1024) -> Tensor:
    """Share of rows of ``a`` whose most similar row of ``b`` is their own; ``1 / N`` is chance. ``(N, D)`` unit vectors, N >= 1.

    Where several rows of ``b`` are equally similar, the hit counts as one over their number.
    """
    hits = a.new_zeros(())
    for first in range(0, len(a), chunk):
        sim = a[first : first + chunk] @ b.T
        own = sim.diagonal(first)[:, None]
        better, equal = (sim > own + 1e-6).sum(1), (sim >= own - 1e-6).sum(1)
        hits = hits + torch.where(better == 0, 1.0 / equal, torch.zeros_like(own[:, 0])).sum()
    return hits / len(a)


@torch.no_grad()
def similarities(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Mean cosine of positive pairs, and of all others (both views, without self): collapsed where they are the same.

    Of ``(N, D)`` unit vectors, N >= 2.
    """
    n, positive = len(a), (a * b).sum()
    everything = (a.sum(0) + b.sum(0)).square().sum()
    return positive / n, (everything - 2 * n - 2 * positive) / (2 * n * (2 * n - 2))
