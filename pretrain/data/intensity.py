"""What is air in a preprocessed image: from a few blocks of its intensities."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from nnssl.properties import read_properties

__all__ = ["AIR", "air_threshold", "body_mask", "intensity_range", "store_range", "stored_range"]

AIR = 0.1
"""Voxels below the 0.5th percentile plus this share of the range to the 99.5th are air."""

OUTSIDE = 1e-3
"""Up to this value a voxel counts as the 0 that masked normalisation leaves outside the mask; resampling blurs it a little."""

GRID, BLOCK = 4, 8
"""Intensities are sampled in GRID^3 blocks of BLOCK^3 voxels."""

READ_WHOLE = 1 << 17
"""Up to this many voxels an image is read whole instead; that is faster."""


def air_threshold(intensity: np.ndarray) -> np.ndarray:
    """``(C,)`` values of which those above are not air, of ``(C, 2)`` percentiles."""
    low, high = intensity[:, 0], intensity[:, 1]
    return low + np.float32(AIR) * (high - low)


def body_mask(data: np.ndarray, threshold: np.ndarray, masked: bool) -> np.ndarray:
    """``(1, *spatial)`` bool of ``(C, *spatial)``: where any channel is above its threshold.

    Where normalisation was masked, what is 0 in all channels is not body: there 0 is the tissue's mean and would pass for it.
    """
    body = data[0] > threshold[0]
    for channel, limit in zip(data[1:], threshold[1:]):
        body |= channel > limit
    if masked:
        body &= _inside(data)
    return body[None]


def _inside(data: np.ndarray) -> np.ndarray:
    """``(*spatial)`` bool of ``(C, *spatial)``: where any channel is not 0."""
    inside = np.abs(data[0]) > OUTSIDE
    for channel in data[1:]:
        inside |= np.abs(channel) > OUTSIDE
    return inside


def _samples(array: Any) -> np.ndarray:
    """``(C, n)`` voxels of a lazy ``(C, Z, Y, X)`` array: all of a small one, else blocks at fixed places of a grid."""
    channels, shape = array.shape[0], array.shape[1:]
    if int(np.prod(shape)) <= READ_WHOLE:
        return np.asarray(array[:], dtype=np.float32).reshape(channels, -1)
    stored = getattr(array, "blocks", (1, *shape))[1:]
    starts = []
    for size, block in zip(shape, stored):
        first = np.arange(GRID) * size // GRID + size // (2 * GRID)
        if block > BLOCK:  # within one compressed block
            first = first // block * block + np.minimum(first % block, block - BLOCK)
        starts.append(np.clip(first, 0, max(0, size - BLOCK)))
    pieces = [
        np.asarray(array[:, z : z + BLOCK, y : y + BLOCK, x : x + BLOCK], dtype=np.float32).reshape(channels, -1)
        for z in starts[0].tolist()
        for y in starts[1].tolist()
        for x in starts[2].tolist()
    ]
    return np.concatenate(pieces, axis=1)


def intensity_range(array: Any, *, masked: bool = False) -> np.ndarray:
    """The 0.5th and 99.5th percentile of each channel, estimated from a bounded number of voxels at fixed places.

    ``masked`` leaves out voxels that are 0 in all channels, unless there is nothing else. ``(C, 2)`` float32; NaN where voxels
    are.
    """
    values = _samples(array)
    if masked:
        inside = _inside(values)
        values = values[:, inside] if inside.any() else values
    return np.percentile(values, [0.5, 99.5], axis=1).T.astype(np.float32)


STORED = "nnssl_intensity"
"""Key of a case's properties; nnU-Net passes over it."""


def store_range(properties: Path, values: np.ndarray) -> None:
    """Put what :func:`intensity_range` found into a case's ``.pkl``, so that a run need not look for it in the image."""
    content = {**read_properties(properties), STORED: values.tolist()}
    properties.write_bytes(pickle.dumps(content))


def stored_range(properties: Mapping[str, Any], channels: int) -> np.ndarray | None:
    """``(channels, 2)`` float32 from a case's properties, or None where it is not there."""
    try:
        values = np.asarray(properties[STORED], dtype=np.float32)
    except (KeyError, TypeError, ValueError):
        return None
    return values if values.shape == (channels, 2) else None
