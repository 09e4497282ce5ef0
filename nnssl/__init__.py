"""Self-supervised pretraining for the networks that nnU-Net configures by itself."""

__version__ = "0.1.0"

__all__ = ["__version__"]
