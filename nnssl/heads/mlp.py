"""The projector of contrastive methods."""

from __future__ import annotations

from torch import nn


def mlp(width: int, out: int = 128, *, hidden: int = 128, layers: int = 2) -> nn.Sequential:
    """``layers`` linear maps with ReLU between them: ``(N, width) -> (N, out)``. The output is not normalised.

    Args:
        width: features of the input.
        out: features of the output.
        hidden: features between the maps.
        layers: number of linear maps, at least 1.
    """
    sizes = [width, *[hidden] * (layers - 1), out]
    modules: list[nn.Module] = []
    for i in range(layers):
        modules += [nn.Linear(sizes[i], sizes[i + 1])] + ([nn.ReLU(inplace=True)] if i < layers - 1 else [])
    return nn.Sequential(*modules)
