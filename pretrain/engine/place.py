"""How much of a method's dense features the place in the crop explains: on pure noise, and on held-out crops.

See :func:`nnssl.losses.place_share`. Noise holds nothing but the place; of crops, anatomy at fixed places is part of the share,
so that what counts is how far both rise above what they were before training.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from nnssl.losses import place_share
from nnssl.pretrain.methods.base import Method
from nnssl.words import per_cent

SITES = 1024
"""Most sites of a map that are looked at; the same random ones each time."""

CLEARLY = 0.25
"""Rise of the share, on noise and on crops, that gives a warning."""


def noise_like(images: Tensor, seed: int) -> Tensor:
    """White noise with mean 0 and SD 1 in the shape of ``images``; the same for each seed and device."""
    generator = torch.Generator().manual_seed(seed % 2**63)
    return torch.randn(images.shape, generator=generator).to(images.device)


@torch.no_grad()
def place_shares(
    method: Method, images: Tensor, *, seed: int = 0, autocast: AbstractContextManager[object] | None = None
) -> dict[str, float]:
    """``place_noise`` and ``place_crops``: the share of the variance that the place explains, mean over the method's dense maps.

    ``images``: ``(N, C, *size)`` crops as they are; ``seed``: of the noise and of the sites. Empty where the method has no dense
    maps of more than one site, or there are fewer than two crops.
    """
    if len(images) < 2:
        return {}
    found = {}
    for name, x in (("place_noise", noise_like(images, seed)), ("place_crops", images)):
        maps: dict[str, list[Tensor]] = {}
        for crop in x.split(1):  # one by one: only the sites are kept
            with autocast or nullcontext():
                features = method.dense_features(crop)
            for level, f in features.items():
                f = f.float().flatten(2)
                if f.shape[2] > SITES:
                    order = torch.randperm(f.shape[2], generator=torch.Generator().manual_seed(seed % 2**63))
                    f = f[..., order[:SITES].to(f.device)]
                maps.setdefault(level, []).append(f)
        shares = [float(place_share(torch.cat(m))) for m in maps.values() if m[0].shape[2] > 1]
        if shares:
            found[name] = sum(shares) / len(shares)
    return found


def place_sentence(first: dict[str, float], last: dict[str, float]) -> tuple[str, bool]:
    """What a person should know of the shares at the end, and whether both rose clearly; empty where they were not measured."""
    keys = ("place_noise", "place_crops")
    if any(k not in last or k not in first for k in keys):
        return "", False
    (n0, n1), (c0, c1) = ((first[k], last[k]) for k in keys)
    text = (
        f"The place in the crop explains {per_cent(n1)} of the variance of its features on pure noise "
        f"({per_cent(n0)} before training) and {per_cent(c1)} on held-out crops ({per_cent(c0)})"
    )
    risen = min(n1 - n0, c1 - c0) > CLEARLY
    return f"{text}{': part of the loss is solved without looking at the image' if risen else ''}.", risen
