"""Checkpoints in the formats of others, and what a checkpoint is. A face of :mod:`nnssl.weights`."""

from nnssl.weights.formats import FORMATS, convert
from nnssl.weights.info import describe

__all__ = ["FORMATS", "convert", "describe"]
