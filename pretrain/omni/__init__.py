"""``--labelled``: labels and pseudo-labels beside any objective; see docs/methods/omni.md."""

from nnssl.pretrain.omni.config import PRESETS, OmniConfig, take_omni
from nnssl.pretrain.omni.method import make_omni
from nnssl.pretrain.omni.setup import FOLDER, Omni, prepare_omni

__all__ = ["FOLDER", "PRESETS", "Omni", "OmniConfig", "make_omni", "prepare_omni", "take_omni"]
