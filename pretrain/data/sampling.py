"""Which crop is sample i of step t: a pure function of the seed, so that resume is exact and ranks do not matter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["HELD_OUT", "ROAM", "TRAIN", "SampleStream", "draw_cases", "draw_start", "generator"]

TRAIN, HELD_OUT = 0, 1
"""Streams of random numbers."""

ROAM = 0.5
"""Least share of the places of the crop that its centre may take, even where what is read around it then shows padding."""


@dataclass(frozen=True)
class SampleStream:
    """The samples of a run's steps, and which of them a process reads.

    Attributes:
        seed: of the run.
        batch_size: samples per step over all ranks.
        number: whose random numbers: :data:`TRAIN`, :data:`HELD_OUT`, or those of other data.
        weights: how often each case is drawn, relative to the others; evenly where None.
        rank, world_size: of this process.
    """

    seed: int
    batch_size: int
    number: int = TRAIN
    weights: Sequence[float] | np.ndarray | None = None
    rank: int = 0
    world_size: int = 1

    @property
    def own(self) -> range:
        """This process's samples of each step: rank r has those from r b on, with b = batch_size / world_size."""
        count = self.batch_size // self.world_size
        return range(self.rank * count, (self.rank + 1) * count)


def generator(seed: int, step: int, stream: int, sample: int | None = None) -> np.random.Generator:
    """Random numbers of one step, or of one sample of it."""
    key = (stream,) if sample is None else (stream, sample)
    return np.random.default_rng(np.random.SeedSequence([seed % 2**63, step], spawn_key=key))


def draw_cases(
    seed: int, step: int, stream: int, n_cases: int, count: int, weights: np.ndarray | None = None
) -> np.ndarray:
    """The ``count`` cases of one step, ``(count,)`` int64 indices below ``n_cases``.

    Training draws without replacement as far as there are cases, with ``(n_cases,)`` probabilities where they are given. Held-out
    steps walk through all cases in a fixed shuffled order.
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
    rng: np.random.Generator, shape: Sequence[int], read_size: Sequence[int], size: Sequence[int]
) -> np.ndarray:
    """First voxel to read, uniform per axis where all that is read lies in the image; ``(3,)`` int64, negative outside of it.

    Where the read size fills the image of ``shape`` (nearly) or exceeds it, its centre would always be the image's. There it
    takes the middle :data:`ROAM` of the places at which the crop of ``size`` in its middle lies in the image, and the margin
    shows padding. An image smaller than the crop is put in the middle.
    """
    start = []
    for n, r, s in zip(shape, read_size, size):
        room = max(n - r, int(ROAM * max(0, n - s)), 0)
        start.append((n - r - room) // 2 + int(rng.integers(0, room + 1)))
    return np.asarray(start, dtype=np.int64)
