"""A dense encoder that computes on visible voxels only: no hidden voxel, and no zero in its place, enters any statistic.

Tian et al. 2023, "SparK" (ICLR), as Wald et al. 2024 (arXiv:2410.23132) use it on nnU-Net's encoders. Here with forward
hooks that live as long as one forward: no module is exchanged, and the state dict keeps its keys. Two errors of the
public S3D code are not repeated: the input itself is emptied, and masks are pooled to each map's own shape, so that
anisotropic strides work.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.instancenorm import _InstanceNorm

from nnssl.amp import at_least_float32
from nnssl.errors import NnsslError

_POOLS = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)
_PLAIN = (nn.LeakyReLU, nn.ReLU, nn.GELU, nn.SiLU, nn.ELU, nn.Identity, nn.modules.dropout._DropoutNd)
_MAX_POOL = {1: F.adaptive_max_pool1d, 2: F.adaptive_max_pool2d, 3: F.adaptive_max_pool3d}


class Active:
    """Which places of a feature map are active: those that cover any visible voxel.

    Args:
        visible: ``(B, 1, *size)`` bool.
    """

    def __init__(self, visible: Tensor) -> None:
        self._visible = visible.float()
        self._maps = {tuple(visible.shape[2:]): visible}

    def at(self, shape: Sequence[int]) -> Tensor:
        """``(B, 1, *shape)`` bool."""
        key = tuple(shape)
        if key not in self._maps:
            self._maps[key] = _MAX_POOL[len(key)](self._visible, key) > 0
        return self._maps[key]


def check_sparse(encoder: nn.Module) -> None:
    """Raise :class:`NnsslError` for the first layer of an encoder that has no sparse counterpart here."""
    for name, module in encoder.named_modules():
        known = (
            isinstance(module, (_ConvNd, _InstanceNorm, *_POOLS, *_PLAIN)) or next(module.children(), None) is not None
        )
        if not known or getattr(module, "track_running_stats", False) or "SqueezeExcite" in type(module).__name__:
            raise NnsslError(f"sparse masking cannot run through {type(module).__name__} (encoder.{name}). Use dense.")


@contextmanager
def sparse_encoder(encoder: nn.Module, visible: Tensor) -> Iterator[Active]:
    """Within it, ``encoder`` computes on visible voxels only; afterwards it is what it was.

    Convolutions and pooling are emptied where no visible voxel is covered, and InstanceNorm takes its statistics (per
    sample, biased variance) over active places. The input is to be 0 where hidden. With everything visible the result is
    the dense one.

    Args:
        encoder: of PlainConvUNet or ResidualEncoderUNet.
        visible: ``(B, 1, *size)`` bool, voxels of the input that are not hidden.
    """
    active = Active(visible)

    def empty(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return torch.where(active.at(output.shape[2:]), output, 0.0)

    def normalise(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return masked_instance_norm(module, inputs[0], active.at(output.shape[2:])).to(output.dtype)

    handles = [m.register_forward_hook(empty) for m in encoder.modules() if isinstance(m, (_ConvNd, *_POOLS))]
    handles += [m.register_forward_hook(normalise) for m in encoder.modules() if isinstance(m, _InstanceNorm)]
    try:
        yield active
    finally:
        for handle in handles:
            handle.remove()


def masked_instance_norm(norm: Any, x: Tensor, active: Tensor) -> Tensor:
    """InstanceNorm of ``(B, C, *size)`` over active places ``(B, 1, *size)``, 0 elsewhere; in float32, or float64 for that."""
    with torch.autocast(x.device.type, enabled=False):
        x = at_least_float32(x)
        axes = tuple(range(2, x.ndim))
        n = active.sum(axes, keepdim=True).clamp_min(1)
        mean = torch.where(active, x, 0.0).sum(axes, keepdim=True) / n
        centred = torch.where(active, x - mean, 0.0)
        out = centred * (centred.square().sum(axes, keepdim=True) / n + norm.eps).rsqrt()
        if norm.weight is not None:
            shape = (1, -1, *[1] * len(axes))
            out = out * norm.weight.to(out.dtype).view(shape) + norm.bias.to(out.dtype).view(shape)
        return torch.where(active, out, 0.0)


class Densify(nn.Module):
    """Puts one learned vector per stage where a sparse encoder has nothing, so that the dense decoder sees full maps.

    Visible features pass as they are, as they will in fine-tuning (no convolution in between, unlike S3D).

    Args:
        channels: per stage, finest first.
    """

    def __init__(self, channels: Sequence[int]) -> None:
        super().__init__()
        self.tokens = nn.ParameterList(nn.init.trunc_normal_(torch.empty(c), std=0.02) for c in channels)

    def forward(self, skips: Sequence[Tensor], active: Active) -> list[Tensor]:
        """``(B, C_s, *size_s)`` per stage, and again."""
        out = []
        for skip, token in zip(skips, self.tokens, strict=True):
            token = token.to(skip.dtype).view(1, -1, *[1] * (skip.ndim - 2))
            out.append(torch.where(active.at(skip.shape[2:]), skip, token))
        return out
