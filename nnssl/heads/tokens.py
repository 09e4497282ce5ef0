"""From the tokens that a transformer has seen to the whole image: the throw-away decoder of a masked autoencoder on Primus."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from dynamic_network_architectures.building_blocks.patch_encode_decode import PatchDecode
from dynamic_network_architectures.initialization.weight_init import InitWeights_He
from torch import Tensor, nn


class TokenDecoder(nn.Module):
    """A learned token where there is none, two transformer blocks with their own positions, then Primus's decoder of tokens.

    The blocks let hidden places see the visible ones; Primus's decoder alone works token by token, and would draw the same at
    every hidden place. ``width`` is the length of a token, ``token`` its voxels per axis, ``grid`` the tokens per axis.
    """

    def __init__(
        self, width: int, channels: int, token: Sequence[int], grid: Sequence[int], *, heads: int, depth: int = 2
    ) -> None:
        from dynamic_network_architectures.building_blocks.eva import Eva  # brings timm: two seconds of a start

        super().__init__()
        self.mask_token = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, width, 1, 1, 1), std=0.02))
        self.eva = Eva(
            embed_dim=width,
            depth=depth,
            num_heads=heads,
            ref_feat_shape=tuple(grid),
            scale_attn_inner=True,
            init_values=0.1,
        )
        self.image = PatchDecode(tuple(token), width, channels)
        self.image.apply(InitWeights_He(1e-2))

    def forward(self, tokens: Tensor, visible: Tensor) -> Tensor:
        """Tokens ``(B, width, *grid)`` and where they are, ``(B, 1, *grid)`` bool, to ``(B, channels, *(grid * token))``."""
        filled = torch.where(visible, tokens, self.mask_token.to(tokens.dtype))
        out = self.eva(filled.flatten(2).transpose(1, 2))[0]
        return self.image(out.transpose(1, 2).reshape(filled.shape))
