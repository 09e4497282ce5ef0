"""What a network's convolutions see beyond the border of the image."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn

from nnssl.networks.state import unwrap

PADDINGS = ("zeros", "replicate", "circular")
"""Kinds of padding that any size of map allows (``reflect`` needs two voxels on each axis)."""


def _convolutions(network: nn.Module) -> list[Any]:
    return [m for m in unwrap(network).modules() if isinstance(m, (nn.Conv1d, nn.Conv2d, nn.Conv3d))]


def set_padding(network: nn.Module, mode: str) -> None:
    """Let all convolutions of a network pad in another way than with nnU-Net's zeros.

    Zeros tell each voxel how far away the border is; repeated voxels hardly do. Weights and their names stay as they are, and
    a network that is built anew, as nnU-Net does for fine-tuning, pads with zeros.

    Raises:
        ValueError: for a mode that is not one of :data:`PADDINGS`.
    """
    if mode not in PADDINGS:
        raise ValueError(f"padding is one of {', '.join(PADDINGS)}, not {mode!r}")
    for convolution in _convolutions(network):
        convolution.padding_mode = mode


@contextlib.contextmanager
def own_padding(network: nn.Module) -> Iterator[None]:
    """Within, the network pads with zeros, as nnU-Net builds it; afterwards as before."""
    modes = [(convolution, convolution.padding_mode) for convolution in _convolutions(network)]
    try:
        set_padding(network, "zeros")
        yield
    finally:
        for convolution, mode in modes:
            convolution.padding_mode = mode
