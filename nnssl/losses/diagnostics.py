"""What embeddings look like, for logs, pictures and verdicts; nothing here has a gradient."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from nnssl.losses.supcon import safe_normalise


@torch.no_grad()
def off_diagonal_cosine(z: Tensor, valid: Tensor | None = None) -> Tensor:
    """Mean cosine between different samples: 1 where all embeddings point the same way, so that nothing can be told apart.

    Args:
        z: ``(B, C)``.
        valid: ``(B,)`` bool, samples that count.

    Returns:
        ``()``; 0 where fewer than two samples count.
    """
    z = safe_normalise(z)
    pairs = ~torch.eye(len(z), dtype=torch.bool, device=z.device)
    if valid is not None:
        pairs = pairs & valid[:, None] & valid[None]
    return _mean(z @ z.T, pairs)


@torch.no_grad()
def pair_similarity(
    aux: Tensor, dominant: Tensor, positives: Tensor, valid: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Mean cosine between the branches over positive and over negative pairs.

    Args:
        aux, dominant: ``(B, C)`` embeddings of the two branches.
        positives: ``(B, B)`` bool with a True diagonal.
        valid: ``(B,)`` bool, samples that count.

    Returns:
        ``()`` and ``()``; 0 where there is no such pair.
    """
    cosine = safe_normalise(aux) @ safe_normalise(dominant).T
    counted = torch.ones_like(positives) if valid is None else valid[:, None] & valid[None]
    return _mean(cosine, positives & counted), _mean(cosine, ~positives & counted)


@torch.no_grad()
def channel_std(x: Tensor) -> Tensor:
    """Mean over channels of the standard deviation over samples and places of ``(B, C, *s)``: 0 where features died."""
    return x.float().transpose(0, 1).flatten(1).std(1, unbiased=False).mean()


@torch.no_grad()
def place_share(maps: Tensor) -> Tensor:
    """Share of the variance of features that the place in the crop explains, whatever the crop shows.

    A convolutional network knows the place from its zero padding. An objective that compares the same sites of crops can be
    solved by it without looking at the image; on crops of pure noise the share then rises far above that of random weights.

    With ``m_s`` the mean over crops at site s and sums over channels, the two variance components of a one-way layout::

        MSB = N sum_s (m_s - m)^2 / (S - 1),    MSW = sum_s,n (f_ns - m_s)^2 / (S (N - 1)),    V = (MSB - MSW) / N
        share = max(0, V) / (max(0, V) + MSW)

    so that it does not depend on the number of crops (the plain ratio of variances is 1/N for features without any place).

    Args:
        maps: ``(N, C, *s)`` features of N crops, at least two, with at least two sites.

    Returns:
        ``()`` in [0, 1]; 0 where features are constant.

    Raises:
        ValueError: fewer than two crops or sites.
    """
    f = maps.double().flatten(2)
    n, _, sites = f.shape
    if n < 2 or sites < 2:
        raise ValueError(f"{n} crops of {sites} sites: the share of the place needs two of each")
    means = f.mean(0)
    between = n * (means - means.mean(1, keepdim=True)).square().sum() / (sites - 1)
    within = (f - means).square().sum() / (sites * (n - 1))
    place = ((between - within) / n).clamp_min(0)
    return torch.where(place + within > 0, place / (place + within).clamp_min(1e-300), 0.0).float()


@torch.no_grad()
def principal_colours(*maps: Tensor) -> list[Tensor]:
    """Show feature maps ``(B, C, *s)`` as RGB ``(B, 3, *s)`` in [0, 1]: their three main directions, found together, so that
    equal colours mean equal features.
    """
    flat = [safe_normalise(m, 1).transpose(0, 1).flatten(1).T.cpu() for m in maps]  # (n, C)
    everything = torch.cat(flat)
    centre = everything.mean(0)
    centred = everything - centre
    _, axes = torch.linalg.eigh(centred.T @ centred)
    axes = axes[:, -3:].flip(1)
    shown = centred @ axes
    low, high = shown.amin(0), shown.amax(0)
    out = []
    for values, m in zip(flat, maps):
        colours = ((values - centre) @ axes - low) / (high - low).clamp(min=1e-6)
        colours = torch.cat([colours, colours.new_zeros(len(colours), 3 - colours.shape[1])], 1)
        out.append(colours.T.reshape(3, m.shape[0], *m.shape[2:]).transpose(0, 1))
    return out


@torch.no_grad()
def resemblance(vectors: Tensor, maps: Tensor) -> Tensor:
    """Cosine ``(B, *s)`` between vectors ``(B, C)``, one of each sample, and the features at each place of ``(B, C, *s)``."""
    return torch.einsum("bc,bc...->b...", safe_normalise(vectors), safe_normalise(maps, 1))


@torch.no_grad()
def middle_slice(x: Tensor, size: Sequence[int]) -> Tensor:
    """``(B, C, *s)`` enlarged to ``size`` without smoothing, the middle slice of the first of three axes: ``(B, H, W, C)``."""
    x = F.interpolate(x.float(), size=tuple(size), mode="nearest")
    return (x[:, :, size[0] // 2] if x.ndim == 5 else x).movedim(1, -1)


def _mean(x: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, x, 0.0).sum() / mask.sum().clamp(min=1)
