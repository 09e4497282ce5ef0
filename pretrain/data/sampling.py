"""Which crop is sample i of step t: a pure function of the seed, so that resume is exact and ranks do not matter."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

__all__ = ["HELD_OUT", "ROAM", "TRAIN", "draw_cases", "draw_start", "generator"]

TRAIN, HELD_OUT = 0, 1
"""Streams of random numbers."""

ROAM = 0.5
"""Least share of the places of the inner crop that its centre may take, even where the window then shows padding."""


def generator(seed: int, step: int, stream: int, sample: int | None = None) -> np.random.Generator:
    """Random numbers of one step, or of one sample of it."""
    key = (stream,) if sample is None else (stream, sample)
    return np.random.default_rng(np.random.SeedSequence([seed % 2**63, step], spawn_key=key))


def draw_cases(
    seed: int, step: int, stream: int, n_cases: int, count: int, weights: np.ndarray | None = None
) -> np.ndarray:
    """The cases of one step.

    Training draws without replacement as far as there are cases. Held-out steps walk through all cases in a fixed shuffled order.

    Args:
        seed, step, stream: see :func:`generator`.
        n_cases: cases to draw from.
        count: cases wanted.
        weights: ``(n_cases,)`` probabilities for training; uniform where None.

    Returns:
        ``(count,)`` int64 indices.
    """
    if stream == HELD_OUT:
        order = generator(seed, 0, stream).permutation(n_cases)
        return order[(step * count + np.arange(count)) % n_cases]
    rng = generator(seed, step, stream)
    if weights is not None and count > np.count_nonzero(weights):
        return rng.choice(n_cases, count, p=weights)
    rounds = [rng.permutation(n_cases) for _ in range(count // n_cases)]
    rest = rng.choice(n_cases, count % n_cases, replace=False, p=weights)
    return np.concatenate([*rounds, rest]).astype(np.int64)


def draw_start(
    rng: np.random.Generator, shape: Sequence[int], window: Sequence[int], size: Sequence[int]
) -> np.ndarray:
    """First voxel of a window, uniform per axis where the window lies in the image.

    Where the window fills the image (nearly) or exceeds it, its centre would always be the image's. There it takes the middle
    :data:`ROAM` of the places at which the inner crop lies in the image, and the window's margin shows padding. An image smaller
    than the crop is put in the middle.

    Args:
        rng: of the sample.
        shape: of the image.
        window: voxels per axis, at least ``size``.
        size: voxels of the crop in the window's middle.

    Returns:
        ``(3,)`` int64, negative outside the image.
    """
    start = []
    for n, w, s in zip(shape, window, size):
        room = max(n - w, int(ROAM * max(0, n - s)), 0)
        start.append((n - w - room) // 2 + int(rng.integers(0, room + 1)))
    return np.asarray(start, dtype=np.int64)
