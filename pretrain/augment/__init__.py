"""Batched view transforms on the training device; all randomness comes from :class:`Draws`."""

from nnssl.pretrain.augment.draws import Draws
from nnssl.pretrain.augment.intensity import random_jitter
from nnssl.pretrain.augment.spatial import View, central_crop, random_affine

__all__ = ["Draws", "View", "central_crop", "random_affine", "random_jitter"]
