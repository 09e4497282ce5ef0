"""vox2vec: voxel contrast over the raw pyramid, the baseline of hdense.

Goncharov et al. 2023, "vox2vec: A Framework for Self-supervised Contrastive Learning of Voxel-Level Representations
in Medical Images" (arXiv:2307.14725), authors' code at github.com/mishgon/vox2vec. Here it is :mod:`.hdense` with all
levels concatenated as they are (not balanced), vox2vec's own corruption instead of the local one, and no restoration.
Steps between the two are presets of hdense, see docs/methods/hdense.md.
"""

from __future__ import annotations

from dataclasses import dataclass

from nnssl.config import option
from nnssl.pretrain.methods.hdense.method import CPU, HDense, HDenseConfig
from nnssl.pretrain.methods.registry import register


@dataclass(frozen=True)
class Vox2VecConfig(HDenseConfig):
    """Options of hdense with vox2vec's defaults."""

    levels: int = option(0, "finest pyramid levels in a voxel's representation; 0: all", low=0, high=12)
    level_dim: int = option(0, "width that each level is mapped to (hdense); 0: raw features", low=0, high=1024)
    restoration_weight: float = option(0.0, "weight of hdense's restoration; 0: none", low=0.0)
    corruption: str = option("window", "of both crops: hdense's, vox2vec's, none", choices=("local", "window", "none"))


@register("vox2vec", config=Vox2VecConfig)
class Vox2Vec(HDense):
    """See the module."""

    title = "voxel contrast over the raw pyramid, the baseline of hdense (encoder + decoder)"
    citation = ("Goncharov et al., vox2vec, arXiv:2307.14725",)
    presets = {"paper": {"gather": False}, "no_corruption": {"corruption": "none"}, "cpu": CPU}
