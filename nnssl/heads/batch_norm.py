"""A projector with batch statistics and no learned scale, over the rows that count.

As VoCo's (arXiv:2410.09890): Linear - BN - ReLU - Linear - BN - ReLU - Linear, the norms ``affine=False,
track_running_stats=False``: the statistics are always the batch's, in evaluation too. They are taken over the rows that are
given, so that callers decide what the batch is: gather rows over ranks before.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nnssl.amp import at_least_float32

ROW_NORMS = ("batch", "row")


def standardise_rows(x: Tensor, rows: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """Zero mean and unit variance of every feature of ``(N, D)`` over the batch, without learned parameters, in float32.

    Over the ``rows`` ``(N,)`` bool that count; the others are scaled like them.
    """
    with torch.autocast(x.device.type, enabled=False):
        x = at_least_float32(x)
        if rows is None:
            mean, var = x.mean(0), x.var(0, unbiased=False)
        else:
            weight = rows[:, None].to(x.dtype) / rows.sum().clamp_min(1)
            mean = (weight * x).sum(0)
            var = (weight * (x - mean).square()).sum(0)
        return (x - mean) * (var + eps).rsqrt()


class BatchNormMLP(nn.Module):
    """Three linear maps with normalisation and ReLU between them.

    ``norm`` is ``"batch"``, or ``"row"``: each row by itself, what ``InstanceNorm1d`` does to ``(N, D)``; it does not centre
    the batch, and features that are alike stay alike.
    """

    def __init__(self, width: int, hidden: int = 1024, out: int = 1024, *, norm: str = "batch") -> None:
        super().__init__()
        if norm not in ROW_NORMS:
            raise ValueError(f"norm '{norm}' is none of {', '.join(ROW_NORMS)}")
        self.norm = norm
        self.maps = nn.ModuleList([nn.Linear(width, hidden), nn.Linear(hidden, hidden), nn.Linear(hidden, out)])

    def forward(self, x: Tensor, rows: Tensor | None = None) -> Tensor:
        """``(N, width)`` -> ``(N, out)`` float32, not of unit length; batch statistics are of ``rows`` ``(N,)``, at least
        two."""
        with torch.autocast(x.device.type, enabled=False):
            x = at_least_float32(x)
            for linear in list(self.maps)[:-1]:
                x = linear(x)
                x = standardise_rows(x, rows) if self.norm == "batch" else nn.functional.layer_norm(x, x.shape[1:])
                x = x.relu()
            return self.maps[-1](x)
