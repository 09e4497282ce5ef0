"""Save and load checkpoints: atomic, readable with ``weights_only=True``, and accepted by stock nnU-Net as they are.

A face of :mod:`nnssl.weights`: ``from nnssl import checkpoint; checkpoint.load(file)``.
"""

from nnssl.weights.adaptation_plan import adaptation_plan
from nnssl.weights.label_set import case_hash, labels_seen
from nnssl.weights.load import Checkpoint, load
from nnssl.weights.save import build_payload, fingerprint_names, package_versions, save

__all__ = [
    "Checkpoint",
    "adaptation_plan",
    "build_payload",
    "case_hash",
    "fingerprint_names",
    "labels_seen",
    "load",
    "package_versions",
    "save",
]
