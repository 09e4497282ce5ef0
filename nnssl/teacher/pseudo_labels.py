"""From a teacher's logits to label maps, with the doubtful voxels ignored where a threshold is asked for."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nnssl.teacher.components import Class, keep_largest

__all__ = ["confidence", "labels_of", "pseudo_label"]


def labels_of(logits: Tensor, order: Sequence[int] | None = None) -> Tensor:
    """Label map of logits, as nnU-Net's ``LabelManager`` makes it.

    Args:
        logits: ``(B, K, *size)``.
        order: nnU-Net's ``regions_class_order`` where heads are regions: the label that each region's head paints, later heads
            over earlier ones; None where heads are classes.

    Returns:
        ``(B, 1, *size)`` int64.
    """
    if order is None:
        # argmax over channels takes as long as a forward pass of a small network on a CPU
        best, out = logits[:, :1], torch.zeros_like(logits[:, :1], dtype=torch.int64)
        for label in range(1, logits.shape[1]):
            value = logits[:, label : label + 1]
            out = torch.where(value > best, label, out)
            best = torch.maximum(best, value)
        return out
    out = torch.zeros_like(logits[:, :1], dtype=torch.int64)
    for head, label in enumerate(order):
        out = torch.where(logits[:, head : head + 1] > 0, label, out)
    return out


def confidence(logits: Tensor, regions: bool = False) -> Tensor:
    """Probability of the label that is given, ``(B, 1, *size)`` float32; of regions that of the least certain one."""
    if regions:
        return torch.sigmoid(logits.float().abs()).amin(1, keepdim=True)
    return logits.float().softmax(1).amax(1, keepdim=True)


def pseudo_label(
    logits: Tensor, threshold: float, ignore: int, order: Sequence[int] | None = None, largest: Sequence[Class] = ()
) -> Tensor:
    """Label map in which voxels below the threshold are ignored.

    Args:
        logits: ``(B, K, *size)``.
        threshold: least probability; 0 ignores none.
        ignore: label of ignored voxels.
        order: see :func:`labels_of`.
        largest: classes of which only the largest component is kept, doubtful voxels included.

    Returns:
        ``(B, 1, *size)`` int64.
    """
    made = keep_largest(labels_of(logits, order), largest)
    return made if threshold <= 0 else torch.where(confidence(logits, order is not None) < threshold, ignore, made)
