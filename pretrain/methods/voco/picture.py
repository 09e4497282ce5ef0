"""What volume contrast looks at: windows with their cells, a random crop, and its true and predicted overlap with each cell."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nnssl.masking import to_voxels
from nnssl.pretrain.methods.panels import NOTE, as_column, slice_at
from nnssl.pretrain.types import Picture

ROWS = 4
CELLS = "an image in cells (blue lines); yellow: a crop to be located"
TRUE = "truth: red where the crop overlaps a cell"
GUESS = "the network's guess: red where it finds the crop similar"
CELLS_NOTE = (
    "The network gets the crop and the cells, but not where the crop was cut. Learnt: the guess is red in the cells of the "
    "truth and nowhere else."
)
_LINES, _HEAT = (0.2, 0.5, 1.0), (1.0, 0.1, 0.1)


@torch.no_grad()
def overlap_picture(batch: dict[str, Any], predicted: Tensor, size: Sequence[int], grid: Sequence[int]) -> Picture:
    """Draw the first random crop of up to four windows, in the slice through its centre; ``predicted`` is ``(B, S, n)``."""
    rows = min(ROWS, len(predicted))
    overlap, guess = (v[:rows, 0].float().cpu() for v in (batch["overlap"], predicted))
    offset = batch["offset"][:rows, 0].cpu()
    middle = offset + torch.tensor(size) // 2
    image = np.stack([_grey(x) for x in as_column(slice_at(batch["window"][:rows].cpu(), middle))])
    columns = {CELLS: _lines(image.copy(), size[-2:])}
    for caption, values in ((TRUE, overlap), (GUESS, guess)):
        heat = to_voxels(values.clamp(0, 1).view(rows, 1, *grid), size)
        weight = 0.7 * as_column(slice_at(heat, middle))[..., None]
        columns[caption] = _lines(np.clip((1 - weight) * image + weight * np.asarray(_HEAT), 0, 1), size[-2:])
    best = guess.masked_fill(~batch["base"][:rows].cpu(), -torch.inf).argmax(1, keepdim=True)
    hits = (overlap.gather(1, best)[:, 0] >= overlap.amax(1) - 1e-6).tolist()
    tags = [f"most similar cell (any depth): {'the right one' if hit else 'a wrong one'}" for hit in hits]
    crop = np.hstack([offset[:, -2:].numpy(), np.tile(size[-2:], (rows, 1))])
    title = "Where in the image does the crop lie?"
    return Picture(columns, title, NOTE + CELLS_NOTE, boxes=dict.fromkeys(columns, crop), tags={GUESS: tags})


def _grey(image: np.ndarray) -> np.ndarray:
    """``(H, W)`` on its own scale, ``(H, W, 3)`` in [0, 1]."""
    low, high = np.percentile(image, (0.5, 99.5))
    return np.repeat(np.clip((image - low) / max(high - low, 1e-6), 0, 1)[..., None], 3, -1)


def _lines(images: np.ndarray, size: Sequence[int]) -> np.ndarray:
    """Draw the borders of cells into ``(rows, H, W, 3)``."""
    images[:, size[0] :: size[0]] = _LINES
    images[:, :, size[1] :: size[1]] = _LINES
    return images
