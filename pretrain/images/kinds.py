"""What a file is by its path and its voxels: an image, a label map, or a test image; and which modality the path tells."""

from __future__ import annotations

import os
import re

import numpy as np

from nnssl.pretrain.prepare.channels import modality_of

LABEL_MAP = "looks like a label map (see --keep label-maps)"
TEST_IMAGE = "test images of an nnU-Net dataset (see --keep test-images)"

FOLDERS = re.compile(
    r"(labels?|label[-_ ]?maps?|labelst[rs]|infersts|segs?|segmentations?|masks?|annotations?|gt|ground[-_ ]?truths?|rois?)"
    r"([-_ ](manual|final|auto|gt))?",
    re.IGNORECASE,
)
"""Names of folders that hold label maps, whole."""

WORDS = frozenset(
    [
        *("label", "labels", "labelmap", "labelmaps", "seg", "segs", "segmentation", "segmentations", "mask", "masks"),
        *("dseg", "aseg", "aparc", "gt", "groundtruth", "roi", "rois", "annotation", "annotations"),
    ]
)
"""Words in a file's name that say so."""

FEW_VALUES = 16  # so few different whole numbers are labels, whatever lies beside what

MOST_VALUES = 512
"""Up to so many are labels where neighbours are nearly always equal, as in label maps and not in images, whose noise differs."""

EQUAL_NEIGHBOURS = 0.8  # share of neighbouring voxels, away from the background, that are equal in a label map
SAMPLED = 1 << 16  # voxels that are looked at before all are


def _words(name: str) -> list[str]:
    """Words of a file's name: split at what is no letter, and where lower case turns into upper."""
    return re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name)


def label_path(text: str) -> bool:
    """Whether a path, below the folder that was given, says that it is a label map."""
    *folders, name = os.path.normpath(text).replace("\\", "/").split("/")
    words = [w.lower() for w in _words(name)]
    whole = {w.lower() for w in re.split(r"[^A-Za-z]+", name)}
    return any(FOLDERS.fullmatch(f) for f in folders) or bool(WORDS & {*words, *whole})


def modality_of_path(text: str) -> str:
    """DICOM's code of the modality that a file's name tells (``ct.nii.gz``, ``a_t1ce.nii.gz``), or nothing."""
    words = re.split(r"[^a-z0-9]+", os.path.basename(text).lower())
    found = {modality_of(w) for w in words} - {""}
    return found.pop() if len(found) == 1 else ""


def _whole_numbers(values: np.ndarray) -> bool:
    return values.dtype.kind in "iub" or bool((values == np.round(values)).all())


def looks_like_labels(voxels: np.ndarray) -> str:
    """Why an array of voxels (z, y, x), stored as whole numbers or not, looks like a label map; empty where it does not."""
    sample = voxels.reshape(-1)[:: max(1, voxels.size // SAMPLED)]
    if not _whole_numbers(sample) or len(np.unique(sample)) > MOST_VALUES:
        return ""
    values = np.unique(voxels[:1])
    for slice_ in voxels[1:]:
        values = np.union1d(values, np.unique(slice_))
        if len(values) > MOST_VALUES:
            return ""
    if not _whole_numbers(values):
        return ""
    if len(values) <= FEW_VALUES:
        return f"{len(values)} different whole numbers"
    share = _equal_neighbours(voxels)
    if share > EQUAL_NEIGHBOURS:
        return f"{len(values)} different whole numbers, {100 * share:.0f} % of neighbours are equal"
    return ""


def _equal_neighbours(voxels: np.ndarray) -> float:
    """Share of equal neighbours along each axis, among those of which not both have the most frequent value of the border.

    Looks at about 32 pairs of slices of each axis.
    """
    background = voxels[0, 0, 0]
    equal = pairs = 0
    for axis in range(voxels.ndim):
        slices = np.moveaxis(voxels, axis, 0)
        for i in range(0, len(slices) - 1, max(1, (len(slices) - 1) // 32)):
            one, next_ = slices[i], slices[i + 1]
            inside = (one != background) | (next_ != background)
            pairs += int(np.count_nonzero(inside))
            equal += int(np.count_nonzero((one == next_) & inside))
    return equal / pairs if pairs else 1.0
