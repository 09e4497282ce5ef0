"""Multi-level asymmetric contrast: ``method.py`` is the objective; its picture lies beside it."""

from nnssl.pretrain.methods.macl.method import MACL, MACLConfig

__all__ = ["MACL", "MACLConfig"]
