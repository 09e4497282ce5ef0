"""Projection heads: image vectors, dense maps, voxel pyramids. None of them is transferred."""

from nnssl.heads.image import POOLINGS, ImageHead, pool, standardise
from nnssl.heads.mlp import mlp
from nnssl.heads.pixel import norm_of, pixel_projector

__all__ = ["POOLINGS", "ImageHead", "mlp", "norm_of", "pixel_projector", "pool", "standardise"]
