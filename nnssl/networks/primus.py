"""The part of a Primus that is pretrained, run with true token dropping: what is hidden is no token at all.

Primus (arXiv:2503.01835) is a linear embedding of 8x8x8 blocks, an Eva-02 transformer with learned and rotary positions, and a
light decoder of each token. The ``patch_drop_rate`` of the public class cannot be used for masked autoencoding: it fails with
current timm, gathers rotary positions without an axis for the heads, drops nothing in evaluation, and predicts the same for
every hidden block. So the network's own modules are called one by one here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nnssl.networks.state import unwrap


def is_primus(network: nn.Module) -> bool:
    """Whether a network, also a wrapped one, is made of tokens as Primus is."""
    inner = unwrap(network)
    return hasattr(inner, "eva") and hasattr(inner, "down_projection")


def encoder_module(network: nn.Module) -> nn.Module:
    """The encoder of any network of ours: a U-Net's ``encoder``, or what :class:`PrimusEncoder` makes of a Primus."""
    if is_primus(network):
        return PrimusEncoder(network)
    encoder: Any = unwrap(network).encoder
    return encoder


class PrimusEncoder(nn.Module):
    """Embedding and transformer of a Primus, which it shares with the network; all that is transferred.

    Args:
        network: of class Primus, PrimusV2 or PrimusV3, without register tokens; also wrapped.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        inner: Any = unwrap(network)
        self.down_projection: nn.Module = inner.down_projection
        self.eva: Any = inner.eva

    def forward(self, x: Tensor, visible: Tensor | None = None) -> list[Tensor]:
        """Tokens after the last norm, as the one feature map of a list.

        Samples may show different numbers of tokens: the shorter ones are filled up, and nothing attends to what fills them.

        Args:
            x: ``(B, C, *patch)``. Where hidden it must be finite, say 0: the convolutional stems of PrimusV2 and V3 read it.
            visible: ``(B, 1, *grid)`` bool, tokens that exist; all by default.

        Returns:
            ``[(B, width, *grid)]``; 0 where no token is.

        Raises:
            ValueError: ``x`` has not the patch that the network was built for.
        """
        tokens = self.down_projection(x)
        width, grid = tokens.shape[1], tokens.shape[2:]
        wanted = tuple(int(n) for n in self.eva.rope.feat_shape)
        if tuple(grid) != wanted:
            raise ValueError(f"the input has {tuple(grid)} tokens, the network was built for {wanted}")
        tokens = self.eva.pos_drop(tokens.flatten(2).transpose(1, 2) + self.eva.pos_embed)
        rope = self.eva.rope.get_embed()
        if visible is None:
            return [_to_map(self._blocks(tokens, rope, None), grid)]
        shown = visible.flatten(1)
        count = shown.sum(1)
        most = max(1, int(count.max()))
        order = shown.int().argsort(dim=1, descending=True, stable=True)[:, :most]
        there = torch.arange(most, device=x.device) < count.clamp_min(1)[:, None]
        index = order[:, :, None].expand(-1, -1, width)
        attend = None if bool(there.all()) else there[:, None, None, :]
        out = self._blocks(tokens.gather(1, index), rope[order][:, None], attend)
        out = torch.where(there[:, :, None] & (count > 0)[:, None, None], out, 0.0)
        return [_to_map(torch.zeros_like(tokens, dtype=out.dtype).scatter(1, index, out), grid)]

    def _blocks(self, tokens: Tensor, rope: Tensor, attend: Tensor | None) -> Tensor:
        for block in self.eva.blocks:
            tokens = block(tokens, rope=rope, attn_mask=attend)
        normed: Tensor = self.eva.norm(tokens)
        return normed


def _to_map(tokens: Tensor, grid: torch.Size) -> Tensor:
    return tokens.transpose(1, 2).reshape(len(tokens), tokens.shape[2], *grid)
