"""Objectives: one file or one folder each, known to :func:`get_method` by being here."""

from nnssl.config import option
from nnssl.pretrain.methods.base import Method
from nnssl.pretrain.methods.registry import get_method, list_methods, register
from nnssl.pretrain.types import Batch, CropRequest, Crops, Curve, Level, Picture, Progress, SourceStats

__all__ = [
    "Batch",
    "CropRequest",
    "Crops",
    "Curve",
    "Level",
    "Method",
    "Picture",
    "Progress",
    "SourceStats",
    "get_method",
    "list_methods",
    "option",
    "register",
]
