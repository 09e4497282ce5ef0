"""What MACL compares: the same place seen in two crops, one of them coarser, and a pair that is turned and scaled."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from nnssl.losses import middle_slice
from nnssl.pretrain.methods.panels import NOTE, as_column, matching_columns, slice_at
from nnssl.pretrain.types import Picture

FINE, COARSE = "view 1: a crop in full detail", "view 2: coarser"
ALIKE = "view 2: bright where it resembles the cross of view 1"
COLOURS, COARSE_COLOURS = "view 1: descriptions as colours", "view 2: descriptions as colours"
TURNED, TURNED_COARSE = "the crop once more, turned and scaled", "and again, turned otherwise, coarser"

FRAME_NOTE = "View 2 is shifted; the yellow frame is the part that both views show. "
CROSS_NOTE = (
    "The cross is one and the same place. Learnt: in the third column the bright "
    "spot sits on the cross and is small. Nothing learnt: it is bright everywhere, or in the same spot of every row. Equal "
    "colours are equal descriptions by the network: they should follow the tissue, not the position in the crop. "
)
TURNED_NOTE = "The two turned crops are recognised as the same place among the crops of other images."


@torch.no_grad()
def pair_picture(
    views: Sequence[Tensor],
    start: Sequence[Tensor],
    maps: tuple[Tensor, Tensor] | None,
    moved: Sequence[Tensor],
    *,
    spacing: Sequence[float],
) -> Picture:
    """Draw both views in the slice through the middle of what both show.

    Args:
        views: the fine view and the coarse one of as large a part, ``(B, C, *size)`` each; the first channel is shown.
        start: ``(B, dim)`` first voxel of each in the common window.
        maps: features of both, ``(B, C, *s)``; None: not drawn.
        moved: the turned pair, as ``views``.
    """
    size = views[0].shape[2:]
    first, second = (s.long().cpu() for s in start)
    low, high = torch.maximum(first, second), torch.minimum(first, second) + torch.tensor(size)
    place = (low + high) // 2
    at = [place - first, place - second]
    shifted = bool((first != second).any())
    boxes = {c: _boxes(low - s, high - s) for c, s in ((FINE, first), (COARSE, second))} if shifted else {}
    crosses = [a[:, -2:].numpy() for a in at]
    points = {FINE: crosses[0], COARSE: crosses[1]}
    columns = {c: as_column(slice_at(_enlarged(v, size), a)) for c, v, a in zip((FINE, COARSE), views, at)}
    scales, tags, notes = {}, {}, [NOTE, FRAME_NOTE if shifted else ""]
    if maps is not None:
        fine, coarse = (slice_at(_enlarged(m, size), a) for m, a in zip(maps, at))
        columns |= matching_columns(fine, coarse, at[0][:, -2:], (ALIKE, COLOURS, COARSE_COLOURS))
        points |= {ALIKE: crosses[1], COLOURS: crosses[0], COARSE_COLOURS: crosses[1]}
        scales = {ALIKE: "similarity (cosine)"}
        away = _distances(torch.from_numpy(columns[ALIKE]), at[1], spacing)
        tags = {ALIKE: [f"brightest {mm:.0f} mm from the cross" for mm in away]}
        notes.append(CROSS_NOTE)
    for caption, image in zip((TURNED, TURNED_COARSE), moved):
        columns[caption] = middle_slice(image, size)[..., 0].cpu().numpy()
    title = "The same place, seen twice: the network should describe it alike"
    return Picture(columns, title, "".join([*notes, TURNED_NOTE]), scales, boxes=boxes, points=points, tags=tags)


def _boxes(low: Tensor, high: Tensor) -> np.ndarray:
    """``(B, 4)`` of the last two axes: top, left, height, width."""
    return torch.cat([low[:, -2:], (high - low)[:, -2:]], 1).numpy()


def _enlarged(x: Tensor, size: Sequence[int]) -> Tensor:
    """``(B, C, *s)`` enlarged to ``size`` without smoothing, on the CPU."""
    return torch.nn.functional.interpolate(x.float(), size=tuple(size), mode="nearest").cpu()


def _distances(alike: Tensor, at: Tensor, spacing: Sequence[float]) -> list[float]:
    """mm in the slice from the cross to the middle of what is most similar."""
    out = []
    for image, cross in zip(alike, at[:, -2:].float()):
        best = (image >= image.max() - 1e-6).nonzero().float().mean(0)
        out.append(float(((best - cross) * torch.tensor(list(spacing)[-2:])).norm()))
    return out
