"""The projector of dense contrast: a few convolutions that keep the map's size."""

from __future__ import annotations

from dynamic_network_architectures.building_blocks.helper import get_matching_instancenorm
from dynamic_network_architectures.building_blocks.simple_conv_blocks import StackedConvBlocks
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

_CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def norm_of(network: nn.Module, dim: int) -> type[nn.Module]:
    """The class of a network's first normalisation; InstanceNorm where it has none."""
    for module in network.modules():
        if isinstance(module, _NormBase):
            return type(module)
    return get_matching_instancenorm(_CONV[dim])


def pixel_projector(
    channels: int, out: int, *, dim: int, norm: type[nn.Module], hidden: int | None = None, layers: int = 2
) -> nn.Module:
    """``layers`` times 3x3(x3) convolution, norm, LeakyReLU: ``(B, channels, *s) -> (B, out, *s)``.

    Args:
        channels, out, hidden: channels before, after and between (``out`` by default).
        dim: spatial axes.
        norm: the network's normalisation, see :func:`norm_of`.
        layers: number of convolutions.
    """
    widths = [hidden or out] * (layers - 1) + [out]
    return StackedConvBlocks(
        layers,
        _CONV[dim],
        channels,
        widths,
        3,
        1,
        conv_bias=True,
        norm_op=norm,
        norm_op_kwargs={"eps": 1e-5, "affine": True},
        nonlin=nn.LeakyReLU,
        nonlin_kwargs={"inplace": True},
    )
