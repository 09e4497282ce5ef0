"""Weights of another shape: input channels, kernels, transposed convolutions, position embeddings. Pure functions of tensors.

Each is chosen so that the network computes, as far as it can, what the pretrained one did: repeating a channel divides by the
number of repeats, so that N equal channels give what the one gave (some published code repeats without dividing, and activations
grow N-fold).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from nnssl.errors import NnsslError, did_you_mean
from nnssl.words import size_text

_HOW = {
    "channels": ("repeat", "first", "skip"),
    "kernels": ("average", "centre"),
    "depth": ("match",),
}


@dataclass(frozen=True)
class Adaptation:
    """What may be changed where weights meet another network; None leaves a difference an error.

    Attributes:
        channels: ``"repeat"`` (the mean over the checkpoint's channels, repeated; summed up to one channel), ``"first"``
            (channel by channel as far as both go, 0 beyond) or ``"skip"`` (the first convolution stays random).
        kernels: ``"average"`` (spread over, or summed along, the axis) or ``"centre"`` (embedded in zeros, or cut out).
        depth: ``"match"`` pairs stages of equal resolution; what only one of the networks has stays random or is left out.
        coverage: least share in (0, 1] of the encoder's parameters that must be filled.
    """

    channels: str | None = None
    kernels: str | None = None
    depth: str | None = None
    coverage: float = 0.5

    def __post_init__(self) -> None:
        for key, known in _HOW.items():
            value = getattr(self, key)
            if value is not None and value not in known:
                raise NnsslError(
                    f"--adapt {key}={value}: {key} can be {' or '.join(known)}.{did_you_mean(str(value), known)}"
                )
        if isinstance(self.coverage, bool) or not isinstance(self.coverage, (int, float)) or not 0 < self.coverage <= 1:
            raise NnsslError(f"--coverage {self.coverage}: a share in (0, 1].")

    @property
    def active(self) -> bool:
        """Whether anything may be adapted."""
        return any((self.channels, self.kernels, self.depth))

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any]) -> Adaptation:
        """Read ``plans["nnssl"]``: its ``adapt`` and ``coverage``.

        Raises:
            NnsslError: an unknown kind or way.
        """
        asked = dict(metadata.get("adapt") or {})
        for key in asked:
            if key not in _HOW:
                raise NnsslError(
                    f"--adapt {key}=...: there is no such kind.{did_you_mean(key, _HOW)} There are: {', '.join(_HOW)}."
                )
        if metadata.get("coverage") is not None:
            asked["coverage"] = metadata["coverage"]
        return cls(**asked)

    from_told = from_metadata  # its name before


def adapt_channels(weight: Tensor, n_channels: int, how: str) -> tuple[Tensor, str]:
    """A first convolution ``(C_out, C_in, *kernel)`` for other input channels, and half a sentence for the report."""
    given = weight.shape[1]
    change = f"input channels {given} -> {n_channels}"
    if how == "first":
        out = weight.new_zeros((weight.shape[0], n_channels, *weight.shape[2:]))
        same = min(given, n_channels)
        out[:, :same] = weight[:, :same]
        rest = "the others 0" if n_channels > given else "the others left out"
        return out, f"{change}, the first {same} taken, {rest}"
    whole = weight.sum(1, keepdim=True) / n_channels
    out = whole.expand(-1, n_channels, *weight.shape[2:]).clone()
    if n_channels == 1:
        return out, f"{change}, summed"
    return out, f"{change}, {'repeated' if given == 1 else 'mean repeated'} and divided by {n_channels}"


def _pooled(weight: Tensor, axis: int, size: int) -> Tensor:
    """One axis averaged or repeated to another size."""
    moved = weight.movedim(axis, -1)
    flat = functional.adaptive_avg_pool1d(moved.reshape(-1, 1, moved.shape[-1]), size)
    return flat.reshape(*moved.shape[:-1], size).movedim(-1, axis)


def adapt_kernel(weight: Tensor, size: Sequence[int], how: str) -> tuple[Tensor, str] | None:
    """A convolution ``(C_out, C_in, *kernel)`` for another kernel, and half a sentence for the report.

    With ``"average"`` each axis keeps the sum over it, so that an image that is constant along the axis gives what it gave.
    ``"centre"`` embeds in zeros, which computes exactly the same, or cuts the middle out; None where odd and even sizes have no
    common centre.
    """
    given = tuple(weight.shape[2:])
    for axis, (old, new) in enumerate(zip(given, size), start=2):
        if how == "average":
            weight = _pooled(weight, axis, new) * (old / new)
        elif (old - new) % 2:
            return None
        elif new > old:
            side = (new - old) // 2
            weight = functional.pad(weight, [0, 0] * (weight.ndim - 1 - axis) + [side, side])
        else:
            weight = weight.narrow(axis, (old - new) // 2, new)
    word = {"centre": "embedded at or cut from the centre", "average": "averaged"}[how]
    return weight.contiguous(), f"kernel {size_text(given)} -> {size_text(size)}, {word}"


def adapt_upsampling(weight: Tensor, size: Sequence[int]) -> tuple[Tensor, str]:
    """A transposed convolution whose kernel is its stride, ``(C_in, C_out, *stride)``, for another stride.

    An axis of 1 is repeated (each new position gets what the one got), an axis is averaged down to 1.
    """
    given = tuple(weight.shape[2:])
    for axis, new in enumerate(size, start=2):
        weight = _pooled(weight, axis, new)
    return weight.contiguous(), f"upsampling {size_text(given)} -> {size_text(size)}, repeated or averaged"


def resize_positions(embedding: Tensor, grid: Sequence[int], wanted: Sequence[int]) -> Tensor:
    """Interpolate position embeddings of tokens in raster order to another grid, linearly along each axis.

    Args:
        embedding: ``(1, prod(grid), C)``.
        grid, wanted: tokens per axis, there and here.

    Raises:
        ValueError: the number of tokens is not that of the grid.
    """
    if embedding.shape[1] != torch.Size(grid).numel():
        raise ValueError(f"{embedding.shape[1]} tokens do not fill a grid of {size_text(grid)}")
    mode = {1: "linear", 2: "bilinear", 3: "trilinear"}[len(grid)]
    maps = embedding.movedim(1, 2).reshape(1, -1, *grid)
    resized = functional.interpolate(maps.float(), size=tuple(wanted), mode=mode, align_corners=False)
    return resized.reshape(1, embedding.shape[2], -1).movedim(1, 2).to(embedding.dtype).contiguous()


def adapt_tensor(
    given: Tensor, shape: Sequence[int], how: Adaptation, *, stem: bool, upsampling: bool
) -> tuple[Tensor, str] | str:
    """A weight in another shape and what was done, as far as ``how`` allows, or the reason why not.

    Args:
        given: the checkpoint's tensor.
        shape: wanted shape.
        how: what may be adapted.
        stem: whether it is the first convolution, whose second axis are the image channels.
        upsampling: whether it is a transposed convolution.
    """
    refused = f"shape {tuple(given.shape)} in the checkpoint, {tuple(shape)} here"
    if given.ndim != len(shape) or given.ndim < 3:
        return refused
    done = []
    if given.shape[1] != shape[1] and given.shape[0] == shape[0] and stem:
        if how.channels == "skip":
            return f"{given.shape[1]} input channels in the checkpoint, {shape[1]} here; skipped as asked"
        if how.channels is None:
            return refused
        given, text = adapt_channels(given, int(shape[1]), how.channels)
        done.append(text)
    if tuple(given.shape[:2]) != tuple(shape[:2]):
        return refused
    if tuple(given.shape[2:]) != tuple(shape[2:]):
        if how.kernels is None:
            return f"{refused}; --adapt kernels=centre (or average) fits it"
        fitted = adapt_upsampling(given, shape[2:]) if upsampling else adapt_kernel(given, shape[2:], how.kernels)
        if fitted is None:
            return f"{refused}; odd and even kernels have no common centre"
        given, text = fitted
        done.append(text)
    return given, "; ".join(done)
