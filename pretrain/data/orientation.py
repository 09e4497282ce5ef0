"""Where a crop lies in the patient: from the geometry that nnU-Net keeps with each preprocessed case."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import permutations
from typing import Any

import numpy as np

__all__ = ["Geometry", "direction_matrix", "patient_axes"]

log = logging.getLogger("nnssl")


def direction_matrix(properties: Mapping[str, Any]) -> np.ndarray | None:
    """Directions of the raw image's index axes (x, y, z) in the patient, as nnU-Net's SimpleITK or nibabel readers kept them.

    ``(3, 3)``: column j points along index axis j in LPS, the axes (to the left, to posterior, to superior). None where the
    reader kept no directions.
    """
    if "sitk_stuff" in properties:
        flat = np.asarray(properties["sitk_stuff"]["direction"], dtype=float)
        given = flat.reshape(2 * (round(len(flat) ** 0.5),))[:3, :3]
        matrix = np.eye(3)  # a 2D image lies in the axial plane
        matrix[: len(given), : len(given)] = given
        return matrix
    if "nibabel_stuff" in properties:
        stuff = properties["nibabel_stuff"]
        affine = np.asarray(stuff.get("reoriented_affine", stuff["original_affine"]), dtype=float)[:3, :3]
        length = np.linalg.norm(affine, axis=0)
        return np.diag([-1.0, -1.0, 1.0]) @ (affine / np.where(length > 0, length, 1.0))  # nibabel's axes are RAS
    return None


def patient_axes(
    matrix: np.ndarray, transpose_forward: Sequence[int]
) -> tuple[tuple[int, int, int], tuple[bool, bool, bool]]:
    """Which array axis (after transpose) runs right to left, anterior to posterior, inferior to superior; True: backwards.

    Oblique images are given the assignment of axes that agrees best with their directions, see :func:`direction_matrix`.
    """
    best = max(permutations(range(3)), key=lambda p: sum(abs(matrix[row, p[row]]) for row in range(3)))
    right, anterior, inferior = (list(transpose_forward).index(2 - column) for column in best)
    r, a, i = (bool(matrix[row, best[row]] < 0) for row in range(3))
    return (right, anterior, inferior), (r, a, i)


@lru_cache(maxsize=8)
def _warn_without_directions(source: str) -> None:
    log.warning(
        "%s: the images' reader keeps no directions. Their array axes are taken for the patient's: z from inferior to "
        "superior, y from anterior to posterior, x from right to left.",
        source,
    )


@dataclass(frozen=True)
class Geometry:
    """Place of a preprocessed array in the image and the patient; axes are the array's, (z, y, x) after transpose.

    Attributes:
        shape: voxels after preprocessing.
        crop_start: first voxel that cropping to non-zero kept.
        cropped: voxels after cropping, before resampling.
        full: voxels of the uncropped image.
        axes: array axis of each patient axis (right to left, anterior to posterior, inferior to superior).
        flips: whether the index decreases along that patient axis.
    """

    shape: tuple[int, int, int]
    crop_start: tuple[int, int, int]
    cropped: tuple[int, int, int]
    full: tuple[int, int, int]
    axes: tuple[int, int, int]
    flips: tuple[bool, bool, bool]

    @classmethod
    def from_properties(
        cls, properties: Mapping[str, Any], shape: Sequence[int], transpose_forward: Sequence[int], source: str
    ) -> Geometry:
        """Read what nnU-Net's preprocessor has written down of an array of ``shape``; ``source``: for a warning."""
        matrix = direction_matrix(properties)
        if matrix is None:
            _warn_without_directions(source)
            matrix = np.eye(3)
        axes, flips = patient_axes(matrix, transpose_forward)
        return cls(
            shape=_three(shape),
            crop_start=_three([low for low, _ in properties["bbox_used_for_cropping"]]),
            cropped=_three(properties["shape_after_cropping_and_before_resampling"]),
            full=_three(properties["shape_before_cropping"]),
            axes=axes,
            flips=flips,
        )

    def axis_position(self, start: Sequence[int] | np.ndarray, size: Sequence[int] | np.ndarray) -> np.ndarray:
        """Centre of a box as a share of the uncropped image, ``(3,)`` in (0, 1), along the array's axes.

        nnU-Net resamples edge to edge, so edges, not voxel centres, scale. The centre of the first of N voxels is 0.5 / N.
        """
        centre = np.asarray(start, dtype=float) + np.asarray(size, dtype=float) / 2
        raw = centre / self.shape * self.cropped + self.crop_start
        return raw / self.full

    def position(self, axis_position: np.ndarray) -> np.ndarray:
        """The same, ``(3,)``, along the patient's axes: right to left, anterior to posterior, inferior to superior."""
        along = axis_position[list(self.axes)]
        return np.where(self.flips, 1.0 - along, along)


def _three(values: Sequence[int]) -> tuple[int, int, int]:
    z, y, x = (int(v) for v in values)
    return z, y, x
