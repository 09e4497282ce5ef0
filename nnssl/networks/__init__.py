"""Builds a plan's network, and its features: encoder skips and decoder levels without segmentation heads."""

from nnssl.networks.build import build_network, decoder_channels, encoder_channels
from nnssl.networks.padding import PADDINGS, own_padding, set_padding
from nnssl.networks.primus import PrimusEncoder, encoder_module, is_primus
from nnssl.networks.state import alias_map, canonical_state_dict, full_state_dict, unwrap
from nnssl.networks.walker import FeaturePyramid, Pyramid, forward_features, partial_decode, walk

__all__ = [
    "PADDINGS",
    "PrimusEncoder",
    "FeaturePyramid",
    "Pyramid",
    "alias_map",
    "build_network",
    "canonical_state_dict",
    "decoder_channels",
    "encoder_channels",
    "encoder_module",
    "forward_features",
    "full_state_dict",
    "is_primus",
    "own_padding",
    "partial_decode",
    "set_padding",
    "unwrap",
    "walk",
]
