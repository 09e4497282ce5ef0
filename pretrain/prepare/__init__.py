"""Raw images to preprocessed cases: listing, nnU-Net's preprocessing without labels, body masks, and plans without labels."""

from nnssl.pretrain.prepare.bodies import prepare_bodies
from nnssl.pretrain.prepare.sources import prepare_sources

__all__ = ["prepare_bodies", "prepare_sources"]
