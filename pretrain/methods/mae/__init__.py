"""Masked autoencoding: ``method.py`` is the objective; what glmae shares is in ``masked.py``."""

from nnssl.pretrain.methods.mae.masked import MaskedConfig
from nnssl.pretrain.methods.mae.method import MAE, MAEConfig

__all__ = ["MAE", "MAEConfig", "MaskedConfig"]
