"""Encoder skips and decoder levels of a U-Net, without its segmentation heads.

nnU-Net's decoder computes all its stages and returns segmentations only. Here its own modules are called one by one, so
that as many stages run as an objective needs, and their outputs are what is returned.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from nnssl.networks.primus import PrimusEncoder, is_primus
from nnssl.networks.state import unwrap


@dataclass
class FeaturePyramid:
    """What :func:`forward_features` saw.

    Attributes:
        skips: encoder outputs, highest resolution first, the bottleneck last; ``(B, C_s, *size_s)`` each.
        levels: the bottleneck, then the outputs of decoder stages 0, 1, ... (resolution rising); ``(B, C_l, *size_l)`` each.
    """

    skips: list[Tensor]
    levels: list[Tensor]


def partial_decode(network: nn.Module, skips: Sequence[Tensor], n_stages: int | None = None) -> list[Tensor]:
    """Run the first ``n_stages`` decoder stages (all by default).

    Args:
        network: PlainConvUNet or ResidualEncoderUNet, also wrapped.
        skips: encoder outputs, highest resolution first.
        n_stages: from the bottleneck up.

    Returns:
        Output of each stage run, stage 0 first; stage ``i`` has the size and channels of ``skips[-(i + 2)]``.

    Raises:
        ValueError: for a number of stages that the decoder does not have.
    """
    decoder: Any = unwrap(network).decoder
    total = len(decoder.stages)
    n_stages = total if n_stages is None else n_stages
    if not 0 <= n_stages <= total:
        raise ValueError(f"the decoder has {total} stages, {n_stages} were asked for")
    outputs: list[Tensor] = []
    x = skips[-1]
    for i in range(n_stages):
        x = torch.cat((decoder.transpconvs[i](x), skips[-(i + 2)]), dim=1)
        x = decoder.stages[i](x)
        outputs.append(x)
    return outputs


def forward_features(network: nn.Module, x: Tensor, n_decoder_stages: int | None = None) -> FeaturePyramid:
    """Run the encoder and the first decoder stages; never the segmentation heads.

    Args:
        network: PlainConvUNet or ResidualEncoderUNet, also wrapped; of a Primus the tokens are both the one skip and the one
            level, and no decoder runs.
        x: ``(B, C, *size)``; each axis divisible by the plan's total stride, for Primus of the plan's patch.
        n_decoder_stages: number of decoder stages to run, from the bottleneck up; all by default.

    Raises:
        ValueError: for a size that the strides do not divide, naming axis and numbers, or that a Primus is not built for.
    """
    if is_primus(network):
        tokens = PrimusEncoder(network)(x)
        return FeaturePyramid(skips=list(tokens), levels=list(tokens))
    encoder: Any = unwrap(network).encoder
    for axis, (size, stride) in enumerate(zip(x.shape[2:], map(prod, zip(*encoder.strides)))):
        if size % stride:
            raise ValueError(
                f"axis {axis} of the input has {size} voxels, which the total stride {stride} does not divide"
            )
    skips = list(encoder(x))
    return FeaturePyramid(skips=skips, levels=[skips[-1], *partial_decode(network, skips, n_decoder_stages)])


Pyramid, walk = FeaturePyramid, forward_features
"""Their names before."""
