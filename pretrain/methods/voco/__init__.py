"""Volume contrast: ``method.py`` is the objective; grid of cells, their crops, chance levels and picture lie beside it."""

from nnssl.pretrain.methods.voco.method import VoCo, VoCoConfig

__all__ = ["VoCo", "VoCoConfig"]
