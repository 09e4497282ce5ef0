"""Distances between representations: cosine, mean squared difference, inverse Pearson correlation.

After Hidy, Bakos, Lukács 2024, arXiv:2410.18677 (re-stated, section 1.4 of its public code's default helpers).
All are computed in float32 at least, whatever the features' type and whether or not autocast is on.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nnssl.amp import at_least_float32
from nnssl.errors import NnsslError, did_you_mean

DISTANCES = ("cosine", "l2", "pearson")
_EPS = 1e-12


def degenerate(x: Tensor, kind: str = "cosine") -> Tensor:
    """Which rows of ``x`` ``(N, D)`` have no distance to anything: ``(N,)`` bool.

    Not finite; or of length zero (cosine); or constant (Pearson). For these, :func:`distance_matrix` gives 1 (cosine,
    Pearson; "unrelated"), never NaN, unless the features themselves are not finite.
    """
    x = at_least_float32(x)
    bad = ~torch.isfinite(x).all(dim=1)
    if kind == "l2":
        return bad
    if kind == "pearson":
        scale = x.abs().amax(dim=1)
        x = x - x.mean(dim=1, keepdim=True)
        return bad | (x.norm(dim=1) <= torch.finfo(x.dtype).eps * scale * x.shape[1] ** 0.5)
    return bad | (x.norm(dim=1) <= _EPS)


def distance_matrix(x: Tensor, y: Tensor, kind: str = "cosine") -> Tensor:
    """Distance of each row of ``x`` ``(N, D)`` to each row of ``y`` ``(M, D)``: ``(N, M)``, float32 or float64 as the features.

    - ``cosine``: ``1 - <x, y> / (|x| |y|)``, in [0, 2], in [0, 1] for non-negative features.
    - ``pearson``: ``1 -`` Pearson correlation over the coordinates, in [0, 2].
    - ``l2``: mean over the coordinates of ``(x - y)^2``; squared and scale-dependent.

    Raises:
        NnsslError: for an unknown kind.
        ValueError: for shapes that do not fit.
    """
    if kind not in DISTANCES:
        raise NnsslError(f"unknown distance '{kind}'.{did_you_mean(kind, DISTANCES)} Known: {', '.join(DISTANCES)}.")
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1]:
        raise ValueError(f"distances need two matrices (N, D) and (M, D), got {tuple(x.shape)} and {tuple(y.shape)}")
    x, y = at_least_float32(x), at_least_float32(y)
    with torch.autocast(x.device.type, enabled=False):
        if kind == "l2":
            return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist").square() / x.shape[1]
        return 1.0 - _directions(x, kind) @ _directions(y, kind).T


def _directions(x: Tensor, kind: str) -> Tensor:
    """Unit vectors whose scalar product is the cosine or the Pearson correlation; zero where that is undefined."""
    if kind == "pearson":
        x = x - x.mean(dim=1, keepdim=True)
    return x / x.norm(dim=1, keepdim=True).clamp_min(_EPS)
