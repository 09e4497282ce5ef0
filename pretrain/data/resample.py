"""A whole case in a small box: its foreground, resampled slab by slab, so that no more than a slab is in memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from nnssl.pretrain.data.intensity import body_mask

__all__ = ["foreground_box", "resample_box", "resampling_matrix"]

SLAB = 1 << 22
"""Voxels of a slab, over all channels."""

LEAST_SHARE = 0.01
"""A plane belongs to the foreground where this share of it is body: single bright voxels do not count."""


def _slabs(array: Any, low: int, high: int) -> list[tuple[int, int]]:
    thick = max(1, SLAB // int(np.prod([array.shape[0], *array.shape[2:]])))
    return [(z, min(z + thick, high)) for z in range(low, high, thick)]


def foreground_box(array: Any, threshold: np.ndarray, masked: bool) -> list[tuple[int, int]]:
    """First plane of body and first one behind it, per axis of ``(C, Z, Y, X)``; the whole axis where there is none."""
    shape = array.shape[1:]
    counts = [np.zeros(n) for n in shape]
    for low, high in _slabs(array, 0, shape[0]):
        body = body_mask(np.asarray(array[:, low:high], dtype=np.float32), threshold, masked)[0]
        counts[0][low:high] = body.sum((1, 2))
        counts[1] += body.sum((0, 2))
        counts[2] += body.sum((0, 1))
    box = []
    for axis, (n, count) in enumerate(zip(shape, counts)):
        planes = np.flatnonzero(count >= max(1.0, LEAST_SHARE * np.prod(shape) / shape[axis]))
        box.append((int(planes[0]), int(planes[-1]) + 1) if len(planes) else (0, int(n)))
    return box


def resampling_matrix(n: int, size: int) -> np.ndarray:
    """``(size, n)`` weights of linear resampling, edge to edge; where it shrinks, outputs average what they cover (tents)."""
    centre = (np.arange(size) + 0.5) * n / size - 0.5
    weight = np.maximum(0.0, 1.0 - np.abs(np.arange(n) - np.clip(centre, 0, n - 1)[:, None]) / max(1.0, n / size))
    return (weight / weight.sum(1, keepdims=True)).astype(np.float32)


def resample_box(array: Any, box: Sequence[tuple[int, int]], size: Sequence[int]) -> np.ndarray:
    """Read a box (first voxel and first one behind, per axis) of ``(C, Z, Y, X)`` and resample it to ``(C, *size)`` float32."""
    (z0, z1), (y0, y1), (x0, x1) = box
    along_z, along_y, along_x = (resampling_matrix(high - low, n) for (low, high), n in zip(box, size))
    out = np.zeros((array.shape[0], *size), dtype=np.float32)
    for low, high in _slabs(array, z0, z1):
        slab = np.asarray(array[:, low:high, y0:y1, x0:x1], dtype=np.float32)
        plane = np.einsum("yY,czYX->czyX", along_y, slab, optimize=True)
        plane = np.einsum("xX,czyX->czyx", along_x, plane, optimize=True)
        out += np.einsum("zZ,cZyx->czyx", along_z[:, low - z0 : high - z0], plane, optimize=True)
    return out
