"""The strong changes of intensity in numbers: of what a student sees, more of them where there are no labels.

Each kind is applied on its own, in units of the normalised image: in nnU-Net's workers by its own transforms
(:func:`nnssl.trainers.pool.strong_changes`), in pretraining in batches on the device
(:func:`nnssl.pretrain.augment.nnunet.augment_strongly`).
"""

from __future__ import annotations

__all__ = ["FACTOR", "GAMMA", "NOISE", "PROBABILITY", "SHIFT"]

PROBABILITY = 0.3
"""Of each kind at strength 1."""
NOISE = 0.3
"""Largest standard deviation of the noise at strength 1; nnU-Net's is 0.1, in one patch of ten."""
FACTOR = (0.7, 1.3)
"""What the image is multiplied by."""
SHIFT = 0.17
"""Standard deviation of what is added to the whole patch."""
GAMMA = (0.7, 1.5)
"""Exponent within the range of the patch, whose mean and deviation stay."""
