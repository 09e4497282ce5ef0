"""Hierarchical dense contrast: ``method.py`` is the objective; its corruptions of a crop lie beside it."""

from nnssl.pretrain.methods.hdense.method import HDense, HDenseConfig

__all__ = ["HDense", "HDenseConfig"]
