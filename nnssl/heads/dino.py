"""The projection head of DINO, and what a CNN needs in place of a class token.

Caron et al. 2021, arXiv:2104.14294. Under InstanceNorm the mean of a feature map is nearly the same for every image; with
batches too small for batch statistics, pooled features are standardised by running ones.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nnssl.distributed import gather_with_grad


def pool_stages(maps: Sequence[Tensor], active: Sequence[Tensor] | None = None, *, maximum: bool = True) -> Tensor:
    """Mean and maximum of feature maps ``(B, C_i, *size_i)``, concatenated, in float32: ``(B, 2 * sum(C_i))``.

    Over the places ``active`` ``(B, 1, *size_i)`` that count; the mean alone is enough under LayerNorm.
    """
    out = []
    for i, x in enumerate(maps):
        flat = x.float().flatten(2)
        if active is None:
            out += [flat.mean(-1), flat.amax(-1)] if maximum else [flat.mean(-1)]
            continue
        on = active[i].flatten(2)
        out += [torch.where(on, flat, 0.0).sum(-1) / on.sum(-1).clamp_min(1)]
        if maximum:
            out += [torch.where(on.any(-1), flat.masked_fill(~on, -torch.inf).amax(-1), 0.0)]
    return torch.cat(out, 1)


class RunningStandardisation(nn.Module):
    """``(x - mean) / sd`` per feature with running, not learned, moments over batch and ranks; no gradient through them.

    The first steps average evenly, so that there is no warm-up. In eval mode nothing is updated. With ``batch`` the moments
    of the batch itself are used while training, with gradient through them: then no learning can make all rows alike, which
    running moments cannot prevent, since they lag behind.
    """

    mean: Tensor
    var: Tensor
    count: Tensor

    def __init__(self, width: int, momentum: float = 0.99, eps: float = 1e-6, *, batch: bool = False) -> None:
        super().__init__()
        self.momentum, self.eps, self.batch = momentum, eps, batch
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("var", torch.ones(width))
        self.register_buffer("count", torch.zeros(()))

    @torch.no_grad()
    def _moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        everyone = gather_with_grad(x.detach())
        mean, var = everyone.mean(0), everyone.var(0, unbiased=False)
        share = torch.maximum(1.0 / (self.count + 1.0), torch.full_like(self.count, 1.0 - self.momentum))
        delta = mean - self.mean
        # Variance of a mixture: that of the parts, and that of their means.
        mixed = (1 - share) * (self.var + share * delta.square()) + share * var
        return self.mean + share * delta, mixed

    def forward(self, x: Tensor) -> Tensor:
        """``(B, width)`` -> ``(B, width)`` float32; training updates the moments first, eval uses them as they are."""
        with torch.autocast(x.device.type, enabled=False):
            x = x.float()
            mean, var = self._moments(x)
            if self.training:
                self.mean.copy_(mean)
                self.var.copy_(var)
                self.count.add_(1.0)
                if self.batch:
                    everyone = gather_with_grad(x)
                    mean, var = everyone.mean(0), everyone.var(0, unbiased=False)
            else:  # before the first step the batch's own moments are all there is
                mean = torch.where(self.count > 0, self.mean, mean)
                var = torch.where(self.count > 0, self.var, var)
            return (x - mean) * (var + self.eps).rsqrt()


class DinoHead(nn.Module):
    """Linear, GELU, Linear, GELU, Linear, unit length, then the cosine with K unit prototypes (0: only the embedding is
    wanted)."""

    def __init__(self, width: int, prototypes: int = 4096, *, hidden: int = 1024, bottleneck: int = 256) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, bottleneck)
        )
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        self.prototypes = nn.Parameter(nn.init.trunc_normal_(torch.empty(prototypes, bottleneck), std=0.02))

    def project(self, x: Tensor) -> Tensor:
        """``(B, width)`` -> ``(B, bottleneck)`` float32, of any length."""
        with torch.autocast(x.device.type, enabled=False):
            return self.mlp(x.float())

    def logits(self, z: Tensor) -> Tensor:
        """Embeddings ``(B, bottleneck)`` -> ``(B, K)`` float32 in [-1, 1]; 0 where prototypes are 0."""
        with torch.autocast(z.device.type, enabled=False):
            return F.linear(z, F.normalize(self.prototypes, dim=1))
