"""Batched view transforms on the training device; all randomness comes from :class:`StepRNG`."""

from nnssl.pretrain.augment.intensity import random_jitter
from nnssl.pretrain.augment.rng import StepRNG
from nnssl.pretrain.augment.spatial import View, central_crop, random_affine

Draws = StepRNG  # its name before

__all__ = ["Draws", "StepRNG", "View", "central_crop", "random_affine", "random_jitter"]
