"""The network of a linear probe: a frozen U-Net, one 1x1(x1) convolution per resolution, upsampled and summed.

Kats et al. 2024 (arXiv 2401.06473) after Goncharov et al. 2023 (vox2vec): linear in the features, so that it measures what they
hold. It is named in plans as ``nnssl.networks.probe.LinearProbe``, which nnU-Net imports: whoever predicts needs nnssl installed.
"""

from __future__ import annotations

import pydoc
from typing import Any

import torch
from dynamic_network_architectures.architectures.unet import ResidualEncoderUNet
from torch import Tensor, nn
from torch.nn import functional

from nnssl.networks.walker import partial_decode

LEVELS = ("decoder", "encoder")


class LinearProbe(nn.Module):
    """A linear classifier of voxels on the feature pyramid of a frozen network.

    ``logits = sum over levels l of up(W_l f_l) + b``, with nearest-neighbour upsampling to the input's size and a bias on the
    finest level alone. The heads start at 0; the backbone stays in evaluation mode and gets no gradients.

    Args:
        input_channels: image channels.
        num_classes: segmentation heads.
        backbone: importable name of the U-Net's class.
        levels: ``"decoder"``: the bottleneck and all decoder stages; ``"encoder"``: all encoder stages.
        deep_supervision: taken because nnU-Net gives it; there is one output whatever it is.
        conv_op: convolution class, as the backbone's.
        arguments: the backbone's other arguments.
    """

    def __init__(
        self,
        input_channels: int,
        num_classes: int,
        *,
        backbone: str,
        levels: str,
        conv_op: type[nn.Module],
        deep_supervision: bool = False,
        **arguments: Any,
    ) -> None:
        super().__init__()
        if levels not in LEVELS:
            raise ValueError(f"levels is {levels!r}, but must be one of {', '.join(LEVELS)}")
        kind: Any = pydoc.locate(backbone)
        if kind is None:
            raise ImportError(f"the backbone {backbone} of a linear probe cannot be imported")
        self.levels = levels
        self.backbone = kind(
            input_channels=input_channels, num_classes=1, conv_op=conv_op, deep_supervision=False, **arguments
        )
        self.backbone.requires_grad_(False)
        self.backbone.eval()
        *lower, finest = reversed(self.backbone.encoder.output_channels)
        heads = [*(conv_op(c, num_classes, 1, bias=False) for c in lower), conv_op(finest, num_classes, 1)]
        self.heads = nn.ModuleList(heads)

    @staticmethod
    def initialize(module: nn.Module) -> None:
        """nnU-Net's initialisation of a residual or plain U-Net, and 0 for the heads."""
        ResidualEncoderUNet.initialize(module)
        if isinstance(module, LinearProbe):
            for parameter in module.heads.parameters():
                nn.init.zeros_(parameter)

    def train(self, mode: bool = True) -> LinearProbe:
        """As any module's, but the backbone stays in evaluation mode."""
        super().train(mode)
        self.backbone.eval()
        return self

    def features(self, x: Tensor) -> list[Tensor]:
        """The levels of the pyramid, the bottleneck first; ``(B, C_l, *size_l)`` each, without gradients."""
        with torch.no_grad():
            skips = list(self.backbone.encoder(x))
            if self.levels == "encoder":
                return skips[::-1]
            return [skips[-1], *partial_decode(self.backbone, skips)]

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(B, num_classes, *size)`` of images ``(B, C, *size)``."""
        out, *finer = (head(feature) for feature, head in zip(self.features(x), self.heads))
        for here in finer:
            out = here + functional.interpolate(out, size=here.shape[2:], mode="nearest")
        return out if out.shape[2:] == x.shape[2:] else functional.interpolate(out, size=x.shape[2:], mode="nearest")
