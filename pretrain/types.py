"""What data, objectives and engine pass to each other: requests, crops, batches, progress, pictures."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from nnssl.pretrain.augment.spatial import AffineRange

Batch = dict[str, Any]


@dataclass(frozen=True)
class SourceStats:
    """What is known of the pretraining images before any is opened.

    Attributes:
        median_shape: median case shape in voxels after preprocessing with the plan, three axes (z, y, x after
            nnU-Net's transpose), also for 2d plans.
        n_cases: number of cases that may be drawn.
    """

    median_shape: tuple[int, int, int]
    n_cases: int


@dataclass(frozen=True)
class CropRequest:
    """What a method needs from disk for one step.

    Attributes:
        size: voxels per axis that the network sees (as many axes as the plan's patch).
        read_size: voxels per axis that are read around the same centre, at least ``size``: the margin feeds rotations, scalings
            and shifts so that these never show padding.
        crops_per_case: crops drawn from each case of a step.
        batch_size: default number of crops per step over all ranks; the engine's ``batch_size`` overrides it.
        min_batch: fewest crops per step for which the objective means anything.
        explanation: one sentence for the user that says why ``size`` is what it is.
        body: whether the objective looks at ``Crops.body``. The mask is then made from the raw images where they are there;
            else a threshold on the preprocessed image has to do.
        sampling: where is read. ``"jitter"``: anywhere that the crop fits into the image, so that the margin may lie outside;
            ``"inside"``: in the image, in its middle where the read size exceeds it; ``"whole"``: the whole case, cut to its
            foreground and resampled to the read size.
        reorient: bring all cases to the orientation that most have: left is left in each. All of :class:`Crops` then refers
            to the reoriented array.
        move: the transform that views begin with. The loader then draws it too, from the same numbers, hands it over in
            ``Crops.affine``, and reads no farther around the centre than its view looks. With ``sampling="jitter"``.
        trim: leave out what lies outside of the image, on axes on which the image has room for a crop: ``Crops.extent`` tells how
            much of each was read. With ``sampling="jitter"``.
    """

    size: tuple[int, ...]
    read_size: tuple[int, ...]
    crops_per_case: int = 1
    batch_size: int = 8
    min_batch: int = 2
    explanation: str = ""
    body: bool = False
    sampling: str = "jitter"
    reorient: bool = False
    move: AffineRange | None = None
    trim: bool = False


_OLD_FIELDS = {"window": "read_size", "place": "sampling", "align": "reorient"}
_OLD_SAMPLING = {"roam": "jitter", "volume": "whole"}


def _take_old_names(init: Callable[..., None]) -> Callable[..., None]:
    """Objectives outside of this repository may still name the fields of :class:`CropRequest` as they were."""

    @functools.wraps(init)
    def wrapped(self: CropRequest, *args: Any, **fields: Any) -> None:
        fields |= {new: fields.pop(old) for old, new in _OLD_FIELDS.items() if old in fields}
        if "sampling" in fields:
            fields["sampling"] = _OLD_SAMPLING.get(fields["sampling"], fields["sampling"])
        init(self, *args, **fields)

    return wrapped


_request: Any = CropRequest
_request.__init__ = _take_old_names(_request.__init__)
for _old, _new in _OLD_FIELDS.items():
    setattr(CropRequest, _old, property(operator.attrgetter(_new)))


@dataclass
class Crops:
    """What the loader delivers for one step on one rank. ``B`` crops, ``C`` channels, spatial axes as the plan's patch.

    Attributes:
        data: ``(B, C, *read_size)`` float32, normalised as nnU-Net does; 0 outside the image, as in nnU-Net's training. Smaller
            than the request's read size where the request has ``move`` or ``trim``: as large as the batch needs it.
        body: ``(B, 1, *read_size)`` bool, True where the image is not air (and inside the image); see ``CropRequest.body``.
        position: ``(B, 3)`` float64, centre of the crop in (0, 1) of the uncropped image, in *patient* axes
            (right to left, anterior to posterior, inferior to superior): independent of transpose, cropping, spacing
            and the direction of the axes.
        axis_position: ``(B, 3)`` float64, the same in the array's axes (z, y, x after transpose), increasing with the index.
        intensity: ``(B, C, 2)`` float32, estimates of each case's 0.5th and 99.5th percentile of the normalised image.
        start: ``(B, 3)`` int64, first voxel of ``data`` in the preprocessed array; negative where it starts outside.
        case: names of the cases, length ``B``.
        shape: ``(B, 3)`` int64, voxels of the preprocessed array; None where crops do not come from the loader.
        source: names of the datasets that the cases come from, length ``B``; None likewise.
        affine: ``(B, dim, dim + 1)`` float32, matrix and shift of the transform that they were read for, see
            ``CropRequest.move``; None: all of the read size was read.
        extent: ``(B, 3)`` int64, voxels of each from ``start`` on; what is behind was not read. None: all were.
    """

    data: Tensor
    body: Tensor
    position: Tensor
    axis_position: Tensor
    intensity: Tensor
    start: Tensor
    case: list[str]
    shape: Tensor | None = None
    source: list[str] | None = None
    affine: Tensor | None = None
    extent: Tensor | None = None

    def to(self, device: torch.device, non_blocking: bool = True) -> Crops:
        """Move all tensors to ``device``, without waiting where memory is pinned (MPS has no float64: float32 there)."""
        move = {}
        for key, value in vars(self).items():
            if isinstance(value, Tensor):
                if device.type == "mps" and value.dtype == torch.float64:
                    value = value.float()
                move[key] = value.to(device, non_blocking=non_blocking)
        return Crops(**move, case=self.case, source=self.source)

    def part(self, first: int, count: int) -> Crops:
        """``count`` of the crops from ``first`` on; tensors share memory."""
        rows = slice(first, first + count)
        return replace(self, **{k: v[rows] for k, v in vars(self).items() if v is not None})

    def pin_memory(self) -> Crops:
        """Called by torch's DataLoader."""
        pin = {k: v.pin_memory() for k, v in vars(self).items() if isinstance(v, Tensor)}
        return Crops(**pin, case=self.case, source=self.source)

    def __len__(self) -> int:
        return int(self.data.shape[0])


@dataclass(frozen=True)
class Progress:
    """Where training stands: ``step`` optimiser steps done of ``steps`` in all."""

    step: int
    steps: int
    epoch: int
    epochs: int


@dataclass
class Picture:
    """``views_epoch_*.png``: one row per crop, one captioned column per kind of image, and a sentence on how to read it.

    Attributes:
        columns: caption -> ``(rows, H, W)`` grey or ``(rows, H, W, 3)`` RGB array; a grey column is scaled as a whole
            unless it is in [0, 1]. Captions are words for somebody who does not know the method.
        title: what is shown.
        note: how to read it, and what a network that has learnt looks like.
        scales: caption -> what the grey values of that column mean; it is drawn with a colour scale and a bar from 0 to the
            column's highest value.
        boxes: caption -> ``(rows, 4)`` frames: top, left, height, width in pixels of the column.
        points: caption -> ``(rows, 2)`` crosses: row and column in pixels of the column; NaN: none.
        tags: caption -> a text for each row, below its image.
    """

    columns: dict[str, np.ndarray]
    title: str = ""
    note: str = ""
    scales: dict[str, str] = field(default_factory=dict)
    boxes: dict[str, np.ndarray] = field(default_factory=dict)
    points: dict[str, np.ndarray] = field(default_factory=dict)
    tags: dict[str, list[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Level:
    """A value that a curve is compared with, drawn as a dashed line: what a network that knows nothing gets, or the mark to pass.

    Attributes:
        term: a logged term, or ``""`` for ``factor`` itself as a fixed number.
        label: what has this value, in words.
        factor: of the term.
    """

    term: str
    label: str
    factor: float = 1.0


@dataclass(frozen=True)
class Curve:
    """One panel of ``progress.png``: one question that a person asks of the run.

    Attributes:
        title: the question or the quantity, in words.
        unit: label of the vertical axis: what is measured, and in which unit.
        lines: logged term -> what it is. One: held-out cases are drawn beside training cases. Several: held-out cases only.
        levels: what to compare with.
        hint: which way is good.
        percent: values are shares and are drawn in %.
    """

    title: str
    unit: str
    lines: dict[str, str]
    levels: tuple[Level, ...] = ()
    hint: str = ""
    percent: bool = False
