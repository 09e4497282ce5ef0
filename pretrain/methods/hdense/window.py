"""vox2vec's corruption of CT, in units of [0, 1]: in-plane blur or sharpening, noise, and a random intensity window.

Goncharov et al. 2023, "vox2vec", arXiv:2307.14725, with the numbers of the authors' code. Theirs are in HU over a
window of 2350; here they are shares of the image's range, so that they mean something on other modalities too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nnssl.intensity import add_noise, gaussian_blur, per_sample
from nnssl.pretrain.augment.rng import StepRNG

HU = 1 / 2350  # of the default window, -1350 to 1000


def window_corruption(u: Tensor, rng: StepRNG) -> Tensor:
    """Blur or sharpen (p = 0.5), add noise (p = 0.5), and look at it through a random window (p = 0.8).

    Of ``(B, C, *size)`` in [0, 1]; in 3d the first axis is taken for the one through the slices, and is not blurred.
    """
    filtered, sharpen = rng.chance(0.5), rng.chance(0.5)
    soft, sharp, amount = rng.uniform(0.25, 1.5), rng.uniform(0.5, 1.0), rng.uniform(10.0, 30.0)
    noisy, sd = rng.chance(0.5), rng.uniform(0.0, 30.0 * HU)
    windowed, low, high = rng.chance(0.8), rng.uniform(0.0, 350 * HU), rng.uniform(1650 * HU, 1.0)

    blurred = gaussian_blur(u, _in_plane(torch.where(sharpen, sharp, soft), u.ndim - 2), radius=5)
    detail = blurred - gaussian_blur(blurred, _in_plane(torch.full_like(soft, 0.5), u.ndim - 2), radius=2)
    blurred = torch.where(per_sample(sharpen, u), blurred + per_sample(amount, u) * detail, blurred)
    out = torch.where(per_sample(filtered, u), blurred, u)
    out = add_noise(out, torch.where(noisy, sd, 0.0), rng.noise(*u.shape[1:]))
    low, high = torch.where(windowed, low, 0.0), torch.where(windowed, high, 1.0)
    return ((out - per_sample(low, u)) / per_sample(high - low, u)).clamp(0, 1)


def _in_plane(sigma: Tensor, dim: int) -> Tensor:
    """``(B,)`` -> ``(B, dim)``: 0 along the first of three axes."""
    sigma = sigma[:, None].repeat(1, dim)
    if dim == 3:
        sigma[:, 0] = 0.0
    return sigma
