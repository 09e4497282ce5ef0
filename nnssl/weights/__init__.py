"""Checkpoints from file to network: format, saving, loading, formats of others, and the transfer with its report."""

from nnssl.parts import HEADS, UP, Part, is_head, part_names, part_of
from nnssl.weights.adapt import Adaptation, resize_positions
from nnssl.weights.adaptation_plan import adaptation_plan
from nnssl.weights.apply import apply
from nnssl.weights.formats import FORMATS, convert
from nnssl.weights.info import describe
from nnssl.weights.label_set import case_hash, label_set, labels_seen
from nnssl.weights.load import Checkpoint, load
from nnssl.weights.proof import check_loadable, prove_loadable
from nnssl.weights.report import PartReport, TransferReport
from nnssl.weights.save import build_payload, fingerprint_names, package_versions, save
from nnssl.weights.variants import write_variant

__all__ = [
    "FORMATS",
    "HEADS",
    "UP",
    "Adaptation",
    "Checkpoint",
    "Part",
    "PartReport",
    "TransferReport",
    "adaptation_plan",
    "apply",
    "build_payload",
    "case_hash",
    "convert",
    "describe",
    "fingerprint_names",
    "is_head",
    "label_set",
    "labels_seen",
    "load",
    "package_versions",
    "part_names",
    "part_of",
    "check_loadable",
    "prove_loadable",
    "resize_positions",
    "save",
    "write_variant",
]
