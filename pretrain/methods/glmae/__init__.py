"""Global-local masked autoencoding: ``method.py`` is the objective; self-distillation and resized crops lie beside it."""

from nnssl.pretrain.methods.glmae.method import GLMAE, GLMAEConfig

__all__ = ["GLMAE", "GLMAEConfig"]
