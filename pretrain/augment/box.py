"""Where the image lies in a window: a box, so that what a view shows of it is arithmetic on bounds, without a mask of voxels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from nnssl.pretrain.types import Crops


@dataclass
class ImageBox:
    """The image in each window, and what views show where it is not.

    Attributes:
        low, high: ``(B, dim)`` int64, first voxel inside and first voxel behind the image, in the window.
        lowest: ``(B, C)``, each case's lowest intensity: air, while the 0 of the window's padding is mean tissue.
    """

    low: Tensor
    high: Tensor
    lowest: Tensor

    def __getitem__(self, rows: Tensor | slice) -> ImageBox:
        """Those of some of the windows."""
        return ImageBox(self.low[rows], self.high[rows], self.lowest[rows])

    def within(self, first: Tensor, size: Tensor) -> ImageBox:
        """The part of it in ``size`` voxels of the windows from ``first`` on, counted from there."""
        low, high = ((edge - first).clamp_min(0).minimum(size) for edge in (self.low, self.high))
        return ImageBox(low, high, self.lowest)

    @property
    def dark(self) -> Tensor:
        """:attr:`lowest` as ``(B, C, 1, ...)``, to go with images."""
        return self.lowest.view(*self.lowest.shape, *[1] * self.low.shape[1])


def image_box(crops: Crops) -> ImageBox:
    """Where the image lies in the windows of a batch."""
    low, high = image_bounds(crops.data, crops.start, crops.shape, crops.extent)
    return ImageBox(low, high, crops.intensity[:, :, 0].to(crops.data.dtype))


def image_bounds(
    data: Tensor, start: Tensor, shape: Tensor | None = None, extent: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """First voxel inside and first voxel behind the image in windows ``(B, C, *window)``, ``(B, dim)`` int64 each.

    From their place in the image's array; from their voxels where ``shape`` is None: padding is exactly 0 in all channels, at
    the ends of the window. ``start``, ``shape`` and ``extent`` are those of :class:`~nnssl.pretrain.types.Crops`.
    """
    dim = data.ndim - 2
    window = torch.tensor(data.shape[2:], device=data.device)
    low = (-start[:, 3 - dim :]).clamp_min(0)
    high = _last_used(data) if shape is None else torch.minimum((shape - start)[:, 3 - dim :], window)
    if extent is not None:
        high = torch.minimum(high, extent[:, 3 - dim :])
    return torch.minimum(low, window - 1), torch.where(high > low, high, window)


def _last_used(data: Tensor) -> Tensor:
    """One more than the last index per axis at which ``(B, C, *window)`` is not 0: ``(B, dim)`` int64."""
    dim = data.ndim - 2
    used = (data != 0).any(1)  # (B, *window)
    ends = []
    for axis in range(dim):
        line = used
        for other in reversed([a for a in range(dim) if a != axis]):
            line = line.any(1 + other)
        ends.append((line * torch.arange(1, data.shape[2 + axis] + 1, device=data.device)).amax(1))
    return torch.stack(ends, 1)


def in_box(low: Tensor, high: Tensor, size: Sequence[int]) -> Tensor:
    """Voxels of ``(B, 1, *size)`` in boxes from ``low`` up to ``high``, ``(B, dim)``: bool."""
    voxels = [torch.arange(n, device=low.device) for n in size]
    return outer([(v >= low[:, a, None]) & (v < high[:, a, None]) for a, v in enumerate(voxels)])


def outer(lines: Sequence[Tensor]) -> Tensor:
    """Product of one line per axis, each ``(B, n)``, at every voxel: ``(B, 1, *size)``; of bool lines where all are True."""
    out = lines[0][:, None]
    for line in lines[1:]:
        out = out[..., None] * line.view(len(line), *[1] * (out.ndim - 1), -1)
    return out
