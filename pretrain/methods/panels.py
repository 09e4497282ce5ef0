"""Panels and columns that several objectives show a person."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from nnssl.losses.diagnostics import principal_colours, resemblance
from nnssl.pretrain.types import Curve, Level

NOTE = "How to read it: each row is a slice of another crop of the held-out images. "


def found_curve(title: str, unit: str, term: str, chance: str = "") -> Curve:
    """How often the right one is the most similar one, in %, beside the term that says how often by chance."""
    levels = (Level(chance, "by chance"),) if chance else ()
    return Curve(title, unit, {term: "found"}, levels, "higher is better", percent=True)


def parted_curve(title: str, unit: str, lines: Mapping[str, str]) -> Curve:
    """How alike what belongs together is, and what does not."""
    return Curve(title, unit, dict(lines), hint="the lines should part")


def slice_at(x: Tensor, at: Tensor | None = None) -> Tensor:
    """A slice through the first of three axes, at each sample's voxel ``(B, dim)`` or in the middle: ``(B, C, H, W)``."""
    if x.ndim == 4:
        return x
    if at is None:
        return x[:, :, x.shape[2] // 2]
    return x[torch.arange(len(x), device=x.device), :, at[:, 0]]


def as_column(x: Tensor) -> np.ndarray:
    """The first channel of slices ``(B, C, H, W)`` as a grey column of a picture."""
    return x[:, 0].float().cpu().numpy()


def matching_columns(first: Tensor, second: Tensor, at: Tensor, names: tuple[str, str, str]) -> dict[str, np.ndarray]:
    """Where a second view resembles one place of a first, and the features of both as colours.

    Args:
        first, second: features of slices, ``(B, C, H, W)`` each.
        at: ``(B, 2)`` the place in the first.
        names: captions: of the resemblance, of the first's colours, of the second's.
    """
    rows = torch.arange(len(first), device=first.device)
    alike = resemblance(first[rows, :, at[:, 0], at[:, 1]], second)
    colours = (c.movedim(1, -1) for c in principal_colours(first, second))
    return {name: x.float().cpu().numpy() for name, x in zip(names, (alike, *colours))}
