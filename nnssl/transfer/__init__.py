"""Puts pretrained weights into a network and says what happened, part by part."""

from nnssl.transfer.adapt import Adaptation, resize_positions
from nnssl.transfer.apply import apply
from nnssl.transfer.parts import HEADS, UP, is_head, part_names, part_of
from nnssl.transfer.proof import prove_loadable
from nnssl.transfer.report import PartReport, TransferReport

__all__ = [
    "HEADS",
    "Adaptation",
    "PartReport",
    "TransferReport",
    "UP",
    "apply",
    "is_head",
    "part_names",
    "part_of",
    "prove_loadable",
    "resize_positions",
]
