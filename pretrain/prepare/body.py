"""The body in a raw image: all that is not the air around it. Lungs and gas in the bowel count as body.

As in vox2vec (Goncharov et al. 2023, github.com/mishgon/vox2vec): threshold, flood the air from the sides, take the
complement. For CT the threshold is -500 HU. Other modalities have no units: there Otsu's method (1979) looks for air, and
air's own noise sets the threshold. The axis along which the patient is cut off (feet to head) lets no air in: the windpipe
ends there.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import ndimage

AIR_HU = -500.0  # CT voxels above this are no air
FLOOR = 0.1  # A class of voxels whose median lies in this lowest share of the range of intensities is air
QUIET = 0.02  # air is at least this share of the range wide, even where it is free of noise
NOISE = 4.0  # standard deviations of air's noise above its median where tissue begins
LEVELS = 2  # times that the darker class is split again to find air

PIECE_SHARE = 0.2
"""Pieces smaller than this share of the largest are a table, a cable or noise; two legs are two pieces."""

BINS, SAMPLES = 256, 1 << 20


def _otsu(values: np.ndarray) -> float:
    """The threshold that separates two classes best: largest variance between them."""
    counts, edges = np.histogram(values, BINS)
    centres = (edges[:-1] + edges[1:]) / 2
    below = np.cumsum(counts)[:-1].astype(float)
    above = below[-1] + counts[-1] - below
    total = np.cumsum(counts * centres)
    means = total[:-1] / np.maximum(below, 1), (total[-1] - total[:-1]) / np.maximum(above, 1)
    spread = below * above * (means[0] - means[1]) ** 2
    best = np.flatnonzero(spread == spread.max())  # an empty valley: its middle
    return float(edges[1 + best[len(best) // 2]])


def tissue_threshold(image: np.ndarray) -> float | None:
    """The intensity above which an image without units shows tissue, from at most :data:`SAMPLES` of its voxels.

    None where no air is found, as in a crop from inside the body: then all of it is body.
    """
    flat = image.reshape(-1)
    values = flat[:: max(1, flat.size // SAMPLES)].astype(np.float64)
    low, high = np.percentile(values, [0.5, 99.5])
    if not high > low:
        return None
    base = min(0.0, low)
    unit, split = high - base, high
    values = np.clip(values, low, high)
    for _ in range(LEVELS):
        if values.min() == values.max():
            break
        split = _otsu(values)
        values = values[values <= split]
        middle = float(np.median(values))
        if middle <= base + FLOOR * unit:
            noise = middle - float(np.percentile(values, 15.9))  # from below: above lies dark tissue too
            return min(split, max(middle + NOISE * noise, middle + QUIET * unit))
    return None


def _channel(image: np.ndarray, is_ct: bool) -> np.ndarray | None:
    """``(Z, Y, X)`` bool: voxels that are no air; None where there is none. CT that is nowhere negative is not in HU."""
    limit = AIR_HU if is_ct and image.min() < 0 else tissue_threshold(image)
    return None if limit is None else image > limit


def _fill(tissue: np.ndarray, cut: int) -> np.ndarray:
    """Everything that air cannot reach from the sides, without small pieces."""
    air = np.pad(~tissue, [(0, 0) if axis == cut else (1, 1) for axis in range(3)], constant_values=True)
    labels, count = ndimage.label(air)
    body = labels != labels[0, 0, 0]
    del labels, air
    inner = tuple(slice(None) if axis == cut else slice(1, -1) for axis in range(3))
    pieces, count = ndimage.label(body[inner])
    if count > 1:
        sizes = np.bincount(pieces.ravel())
        sizes[0] = 0
        return (sizes >= PIECE_SHARE * sizes.max())[pieces] & (pieces > 0)
    return pieces > 0


def body_of_raw(data: np.ndarray, is_ct: Sequence[bool], cut: int) -> np.ndarray:
    """Where the body is: in any channel, its holes filled. All True where no air is found at all.

    Args:
        data: ``(C, Z, Y, X)`` raw intensities; CT in HU.
        is_ct: of each channel.
        cut: axis (0 to 2) that runs from feet to head.

    Returns:
        ``(Z, Y, X)`` bool.
    """
    tissue = None
    for channel, ct in zip(data, is_ct):
        found = _channel(channel, ct)
        if found is None:
            continue
        tissue = found if tissue is None else tissue | found
    if tissue is None or not tissue.any():
        return np.ones(data.shape[1:], bool)
    return _fill(tissue, cut)


def resize_mask(mask: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """``(Z, Y, X)`` bool to another number of voxels, edge to edge, by the nearest voxel."""
    index = [np.minimum(((np.arange(n) + 0.5) * m / n).astype(np.int64), m - 1) for n, m in zip(shape, mask.shape)]
    return mask[np.ix_(*index)]
