"""Puts pretrained weights into a network and says what happened, part by part.

A face of :mod:`nnssl.weights`: ``from nnssl import transfer; transfer.apply(network, checkpoint)``.
"""

from nnssl.parts import HEADS, UP, Part, is_head, part_names, part_of
from nnssl.weights.adapt import Adaptation, resize_positions
from nnssl.weights.apply import apply
from nnssl.weights.proof import check_loadable, prove_loadable
from nnssl.weights.report import PartReport, TransferReport

__all__ = [
    "HEADS",
    "Adaptation",
    "Part",
    "PartReport",
    "TransferReport",
    "UP",
    "apply",
    "is_head",
    "part_names",
    "part_of",
    "check_loadable",
    "prove_loadable",
    "resize_positions",
]
