"""Masked autoencoding: ``method.py`` is the objective; what glmae shares of its options and optimiser is in ``masked.py``."""

from nnssl.pretrain.methods.mae.method import MAE, MAEConfig, MaskedConfig

__all__ = ["MAE", "MAEConfig", "MaskedConfig"]
