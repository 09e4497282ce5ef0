"""Hiding blocks of an image, and what can be guessed of them without learning anything."""

from nnssl.masking.baselines import block_means, inpaint, surrounding_means
from nnssl.masking.blocks import block_sum, choose_block, mask_blocks, mostly, to_voxels

__all__ = [
    "block_means",
    "block_sum",
    "choose_block",
    "inpaint",
    "mask_blocks",
    "mostly",
    "surrounding_means",
    "to_voxels",
]
