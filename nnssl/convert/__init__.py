"""Checkpoints in the formats of others, and what a checkpoint is: the commands ``nnssl_convert`` and ``nnssl_info``."""

from nnssl.convert.formats import FORMATS, convert
from nnssl.convert.info import describe

__all__ = ["FORMATS", "convert", "describe"]
