"""What volume contrast looks at: windows with their cells, a random crop, and its true and predicted overlap with each cell."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nnssl.pretrain.methods.panels import NOTE
from nnssl.pretrain.types import Picture

ROWS = 4
CELLS = "an image in cells (blue lines); yellow: a crop to be located"
TRUE = "truth: red where the crop overlaps a cell"
GUESS = "the network's guess: red where it finds the crop similar"
CELLS_NOTE = (
    "The network gets the crop and the cells, but not where the crop was cut. Learnt: the guess is red in the cells of the "
    "truth and nowhere else."
)
_LINES, _CROP, _HEAT = (0.2, 0.5, 1.0), (1.0, 0.85, 0.0), (1.0, 0.1, 0.1)


@torch.no_grad()
def overlap_picture(batch: dict[str, Any], predicted: Tensor, size: Sequence[int], grid: Sequence[int]) -> Picture:
    """Draw the first random crop of up to four windows, in the slice through its centre; ``predicted`` is ``(B, S, n)``."""
    rows = min(ROWS, len(predicted))
    right: list[str] = []
    slices, offset = [], batch["offset"][:rows, 0].cpu()
    heat: dict[str, list[np.ndarray]] = {TRUE: [], GUESS: []}
    for i in range(rows):
        window, at = batch["window"][i, 0].float().cpu(), offset[i].tolist()
        values = {TRUE: batch["overlap"][i, 0], GUESS: predicted[i, 0]}
        maps = {k: _spread(v.float().cpu().clamp(0, 1), size, grid) for k, v in values.items()}
        if window.ndim == 3:
            z = at[0] + size[0] // 2
            window, at, maps = window[z], at[1:], {k: m[z] for k, m in maps.items()}
        low, high = np.percentile(window.numpy(), (0.5, 99.5))
        grey = np.clip((window.numpy() - low) / max(high - low, 1e-6), 0, 1)
        image = np.repeat(grey[..., None], 3, -1)
        slices.append(_frame(_lines(image.copy(), size[-2:]), at, size[-2:], _CROP))
        for key, m in maps.items():
            weight = 0.7 * m.numpy()[..., None]
            tinted = np.clip((1 - weight) * image + weight * np.asarray(_HEAT), 0, 1)
            heat[key].append(_frame(_lines(tinted, size[-2:]), at, size[-2:], _CROP))
        best = int(predicted[i, 0].masked_fill(~batch["base"][i], -torch.inf).argmax())
        hit = bool(batch["overlap"][i, 0, best] >= batch["overlap"][i, 0].max() - 1e-6)
        right.append(f"most similar cell (any depth): {'the right one' if hit else 'a wrong one'}")
    columns = {CELLS: np.stack(slices), **{k: np.stack(v) for k, v in heat.items()}}
    return Picture(columns, "Where in the image does the crop lie?", NOTE + CELLS_NOTE, tags={GUESS: right})


def _spread(y: Tensor, size: Sequence[int], grid: Sequence[int]) -> Tensor:
    """``(n,)`` values of cells -> ``(*window)``."""
    y = y.view(*grid)
    for axis, c in enumerate(size):
        y = y.repeat_interleave(c, axis)
    return y


def _lines(image: np.ndarray, size: Sequence[int]) -> np.ndarray:
    """Draw the borders of cells into ``(H, W, 3)``."""
    image[size[0] :: size[0]] = _LINES
    image[:, size[1] :: size[1]] = _LINES
    return image


def _frame(image: np.ndarray, at: Sequence[int], size: Sequence[int], colour: Sequence[float]) -> np.ndarray:
    """Draw a box into ``(H, W, 3)``."""
    (y, x), (h, w) = at, size
    image[[y, y + h - 1], x : x + w] = colour
    image[y : y + h, [x, x + w - 1]] = colour
    return image
