"""Save and load checkpoints: atomic, readable with ``weights_only=True``, and accepted by stock nnU-Net as they are."""

from nnssl.checkpoint.adaptation import adaptation_plan
from nnssl.checkpoint.load import Checkpoint, load
from nnssl.checkpoint.save import build_payload, fingerprint_names, package_versions, save
from nnssl.checkpoint.seen import case_hash, labels_seen

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
