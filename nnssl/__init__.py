"""Self-supervised pretraining for the networks that nnU-Net configures by itself."""

from nnssl._checkout import find_siblings

__version__ = "0.1.0"

__all__ = ["__version__"]

find_siblings()
del find_siblings
