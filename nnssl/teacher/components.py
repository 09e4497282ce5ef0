"""The largest component of each class: a check on pseudo-labels that needs no labels, where a class is known to be one piece."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from acvl_utils.morphology.morphology_helper import label_with_component_sizes
from nnunetv2.evaluation.evaluate_predictions import region_or_label_to_mask
from nnunetv2.postprocessing.remove_connected_components import remove_all_but_largest_component_from_segmentation
from torch import Tensor

__all__ = [
    "Class",
    "class_names",
    "foreground_classes",
    "keep_largest",
    "one_piece",
    "one_piece_of_cases",
    "share_of_largest",
]

Class = int | tuple[int, ...]
"""A label, or a region: the labels that it is made of."""

WHOLE = 0.99
"""Share of a class that its largest component must hold in a label map; resampling leaves stray voxels."""
LABEL_MAPS, CUTS = 64, 4
"""Labelled cases that are asked whether a class is one piece, at most, and patches of each."""


def foreground_classes(manager: Any) -> list[Class]:
    """The labels, or the regions, of nnU-Net's ``LabelManager``, without the background."""
    if manager.has_regions:
        return [r if isinstance(r, int) else tuple(int(i) for i in r) for r in manager.foreground_regions]
    return [int(label) for label in manager.foreground_labels]


def class_names(manager: Any, classes: Iterable[Class]) -> list[str]:
    """The names of labels or regions in ``dataset.json``, of nnU-Net's ``LabelManager``."""
    names = {tuple(np.atleast_1d(labels).tolist()): name for name, labels in manager.label_dict.items()}
    return [names.get(tuple(np.atleast_1d(each).tolist()), str(each)) for each in classes]


def share_of_largest(label: np.ndarray, what: Class) -> float | None:
    """Share of a class's voxels that its largest component holds, in (0, 1]; None where the class is absent.

    Args:
        label: ``(*size)`` integers.
        what: the label or region.
    """
    _, sizes = label_with_component_sizes(region_or_label_to_mask(label, what))
    return max(sizes.values()) / sum(sizes.values()) if sizes else None


def one_piece(labels: Iterable[np.ndarray], classes: Sequence[Class], whole: float = WHOLE) -> list[Class]:
    """The classes of which all label maps say that they are one piece, as nnU-Net asks before it postprocesses.

    Args:
        labels: label maps ``(*size)`` of labelled cases, or of patches of them.
        classes: labels or regions, without the background.
        whole: least share of a class in its largest component, in each map that shows it.

    Returns:
        Those of ``classes`` that occur and are one piece wherever they occur.
    """
    seen: set[Class] = set()
    left = list(classes)
    for label in labels:
        shares = {c: share_of_largest(label, c) for c in left}
        seen |= {c for c, share in shares.items() if share is not None}
        left = [c for c, share in shares.items() if share is None or share >= whole]
    return [c for c in left if c in seen]


def one_piece_of_cases(
    cases: Sequence[str], read: Callable[[str], np.ndarray], classes: Sequence[Class], patch: Sequence[int]
) -> list[Class]:
    """:func:`one_piece` of labelled cases: of their label maps, and of patches around voxels of their classes.

    A patch may cut what is one piece into several, and pseudo-labels are of patches.

    Args:
        cases: names, in the order in which they are asked; no more than :data:`LABEL_MAPS` are.
        read: name -> label map ``(*size)``.
        classes: labels or regions, without the background.
        patch: voxels per axis, of all axes or of all but the first.
    """
    generator = np.random.default_rng(0)
    return one_piece((cut for case in cases[:LABEL_MAPS] for cut in _cuts(read(case), patch, generator)), classes)


def _cuts(label: np.ndarray, patch: Sequence[int], generator: np.random.Generator) -> Iterator[np.ndarray]:
    if len(patch) == label.ndim:
        yield label
    size = [1] * (label.ndim - len(patch)) + list(patch)
    places = np.argwhere(label > 0)
    for place in generator.permutation(len(places))[:CUTS]:
        start = [max(0, min(int(c) - p // 2, s - p)) for c, p, s in zip(places[place], size, label.shape)]
        yield label[tuple(slice(a, a + p) for a, p in zip(start, size))]


def keep_largest(labels: Tensor, classes: Sequence[Class]) -> Tensor:
    """Turn all but the largest component of each class into background; nnU-Net's own postprocessing does it.

    Args:
        labels: ``(B, 1, *size)`` integers on any device.
        classes: labels or regions; others stay as they are.

    Returns:
        The same shape, type and device. A map without a class stays as it is.
    """
    if not classes:
        return labels
    maps = labels.cpu().numpy().copy()
    for one in maps[:, 0]:
        for what in classes:
            one[:] = remove_all_but_largest_component_from_segmentation(one, what)
    return torch.from_numpy(maps).to(labels.device, labels.dtype)
