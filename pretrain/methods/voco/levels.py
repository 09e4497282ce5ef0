"""What the position loss is without any knowledge of position: levels to judge a run by, computed for its grid."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache, reduce

import numpy as np

from nnssl.losses.position import EPS


@dataclass(frozen=True)
class ChanceLevels:
    """Mean position loss over uniform offsets where every similarity is the same number.

    Attributes:
        orthogonal: at s = 0 (dead ReLU, orthogonal vectors).
        constant: at the best constant s. A loss not clearly below it shows no knowledge of position.
        similarity: that best s.
        collapse: at s = 1, where all vectors are alike.
    """

    orthogonal: float
    constant: float
    similarity: float
    collapse: float


@lru_cache(maxsize=64)
def chance_levels(
    size: tuple[int, ...],
    grid: tuple[int, ...],
    *,
    crops: int = 1,
    weighting: str = "overlap",
    negatives: str = "log",
) -> ChanceLevels:
    """Compute the levels exactly, over all whole-voxel offsets.

    Overlaps are products of independent shares per axis, so that their distribution is an outer product. With several random
    ``crops`` of a volume it is rarer that no cell has an overlap of 0.
    """
    axes = [_axis(c, g, weighting) for c, g in zip(size, grid)]
    shares = reduce(np.multiply.outer, [a[0] for a in axes]).ravel()
    weights = reduce(np.multiply.outer, [a[1] for a in axes]).ravel()
    if weighting == "overlap":
        weights = weights * shares / (1 + EPS)
    full = math.prod(a[2] for a in axes)  # no cell without overlap
    some_zero = 0.0 if weighting == "all" else 1 - full**crops

    def loss(s: float) -> float:
        positive = float((weights * -np.log(np.maximum(1 - np.abs(shares - s), 0) + EPS)).sum())
        negative = s * s if negatives == "square" else -math.log(max(1 - s, 0.0) + EPS)
        return positive + some_zero * negative

    best = step = 0.5
    for _ in range(4):
        places = np.clip(np.linspace(best - step, best + step, 41), 0, 1)
        best, step = float(places[np.argmin([loss(float(s)) for s in places])]), step / 20
    return ChanceLevels(loss(0.0), loss(best), best, loss(1.0))


def _axis(size: int, cells: int, weighting: str) -> tuple[np.ndarray, np.ndarray, float]:
    """Possible shares along an axis with weights that add up over cells and offsets, and how often no cell has 0."""
    offset = np.arange((cells - 1) * size + 1)[:, None]
    cell = np.arange(cells)[None] * size
    voxels = np.clip(np.minimum(offset, cell) + size - np.maximum(offset, cell), 0, None)
    hit = voxels > 0
    each = {"overlap": hit, "binary": hit / hit.sum(1, keepdims=True), "all": np.ones(voxels.shape) / cells}[weighting]
    counts = np.bincount(voxels.ravel(), weights=each.ravel().astype(float), minlength=size + 1) / len(offset)
    possible = np.flatnonzero(counts)
    return possible / size, counts[possible], float(hit.all(1).mean())
