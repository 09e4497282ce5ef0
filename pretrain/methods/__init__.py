"""Objectives, one per file. A new one registers itself by being in this folder."""

from importlib import import_module
from pkgutil import iter_modules

from nnssl.pretrain.methods.base import Batch, CropRequest, Crops, Method, Picture, Progress, SourceStats, option
from nnssl.pretrain.methods.registry import get_method, list_methods, register

for _module in iter_modules(__path__):
    if _module.name not in ("base", "registry"):
        import_module(f"{__name__}.{_module.name}")

__all__ = [
    "Batch",
    "CropRequest",
    "Crops",
    "Method",
    "Picture",
    "Progress",
    "SourceStats",
    "get_method",
    "list_methods",
    "option",
    "register",
]
