"""Supervised contrast with positions as labels: the kernel of MACL's image-level and dense losses.

Khosla et al. 2020 (arXiv:2004.11362, the form with the logarithm inside the mean over positives); positions as labels:
PCL, Zeng et al. 2021 (arXiv:2106.09157); two branches: MACL, Zeng et al. 2023 (arXiv:2309.11876).
"""

from __future__ import annotations

import math
from typing import overload

import torch
from torch import Tensor

from nnssl.amp import at_least_float32
from nnssl.errors import NnsslError

_NORM_EPS = 1e-6  # added under the root: a zero vector keeps a bounded gradient
_MIN_NORM = 1e-4  # shorter vectors (an empty patch under InstanceNorm) are neither anchors nor contrasts


def safe_normalise(z: Tensor, dim: int = -1) -> Tensor:
    """``z / sqrt(|z|^2 + 1e-6)`` along ``dim``, in float32 (float64 stays): finite gradients at ``z = 0``."""
    z = at_least_float32(z)
    return z / (z.square().sum(dim, keepdim=True) + _NORM_EPS).sqrt()


def position_positives(position: Tensor, threshold: float, tolerance: float = 1e-6) -> Tensor:
    """Which samples count as the same position: ``|p_ik - p_jk| < threshold`` on every axis ``k``.

    The comparison is strict with a tolerance, so that neighbours of a 10-slice volume at threshold 0.1 are negatives in
    float32 as in float64. A sample is always positive to itself; one with a NaN position to nothing else.

    Args:
        position: ``(B,)`` or ``(B, K)`` relative positions in (0, 1].
        threshold: largest relative distance, exclusive.
        tolerance: what rounding may add to a distance.

    Returns:
        ``(B, B)`` bool, symmetric.
    """
    p = position[:, None] if position.ndim == 1 else position
    near = ((p[:, None] - p[None]).abs() < threshold - tolerance).all(-1)
    return near | torch.eye(len(p), dtype=torch.bool, device=p.device)


@overload
def collapse_value(n: int, temperature: float, base_temperature: float, contrast: str = ...) -> float: ...


@overload
def collapse_value(n: Tensor, temperature: float, base_temperature: float, contrast: str = ...) -> Tensor: ...


def collapse_value(
    n: int | Tensor, temperature: float, base_temperature: float, contrast: str = "all"
) -> Tensor | float:
    """Loss of ``n`` samples whose vectors are all equal, for any positives.

    ``(tau / tau_base) ln(2 n - 1)`` with ``contrast="all"``, ``(tau / tau_base) ln(n)`` with ``"cross"``.
    """
    m = 2 * n - 1 if contrast == "all" else n
    return temperature / base_temperature * (m.clamp(min=1).log() if isinstance(m, Tensor) else math.log(m))


def supcon(
    aux: Tensor,
    dominant: Tensor,
    positives: Tensor,
    *,
    temperature: float = 0.1,
    base_temperature: float = 0.07,
    contrast: str = "all",
    valid: Tensor | None = None,
) -> Tensor:
    """Position-aware contrast between two views of ``B`` samples.

    With the ``2 B`` vectors of both branches stacked, ``s_ab = cos(z_a, z_b) / tau``, ``A(a)`` all others and ``P(a)``
    those of samples at the same position (the sample's own other view is always one)::

        L = (tau / tau_base) mean_a [ - 1/|P(a)| sum_{b in P(a)} ( s_ab - ln sum_{c in A(a)} exp(s_ac) ) ]

    With ``contrast="cross"`` anchors are of one branch and ``A(a)`` is the whole other branch; both directions are averaged.

    Args:
        aux, dominant: ``(B, C)`` vectors of the two branches; any dtype, computed in float32 at least.
        positives: ``(B, B)`` bool from :func:`position_positives`; its diagonal is taken as True.
        temperature, base_temperature: ``tau`` and ``tau_base``; their quotient scales the loss (1.43 in the paper's code).
        contrast: ``"all"`` or ``"cross"``.
        valid: ``(B,)`` bool; False drops a sample from anchors and contrasts.

    Returns:
        ``()`` loss; 0, connected to the graph, where no anchor is left.

    Raises:
        NnsslError: for fewer than two samples, where there is nothing to contrast.
    """
    site = None if valid is None else valid[:, None]
    loss, _ = _sites(aux[:, :, None], dominant[:, :, None], positives, temperature, base_temperature, contrast, site)
    return loss.sum()


def dense_supcon(
    aux: Tensor,
    dominant: Tensor,
    positives: Tensor,
    *,
    temperature: float = 0.1,
    base_temperature: float = 0.07,
    contrast: str = "all",
    valid: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`supcon` at every site of two aligned maps, averaged over sites; only equal sites are ever compared.

    Args:
        aux, dominant: ``(B, C, *sites)`` maps of the two branches, the same shape.
        positives: ``(B, B)`` bool, the same for all sites.
        temperature, base_temperature, contrast: as in :func:`supcon`.
        valid: ``(B, *sites)`` bool; False drops this sample at this site. Sites with fewer than two valid samples are
            left out of the mean.

    Returns:
        ``()`` loss (0, connected to the graph, where no site is left) and ``()`` its value at collapse.

    Raises:
        NnsslError: for fewer than two samples, or maps of different shapes.
    """
    if aux.shape != dominant.shape:
        raise NnsslError(f"the dense maps differ: {tuple(aux.shape)} and {tuple(dominant.shape)}.")
    mask = None if valid is None else valid.flatten(1)
    loss, count = _sites(aux.flatten(2), dominant.flatten(2), positives, temperature, base_temperature, contrast, mask)
    used = count >= 2
    n_sites = used.sum().clamp(min=1)
    floor = collapse_value(count.clamp(min=1), temperature, base_temperature, contrast)
    return torch.where(used, loss, 0.0 * loss).sum() / n_sites, torch.where(used, floor, 0.0).sum() / n_sites


def site_contrast(
    aux: Tensor,
    dominant: Tensor,
    *,
    temperature: float = 0.1,
    base_temperature: float = 0.07,
    valid: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`supcon` among the sites of each crop, averaged over crops: a site's other view against the crop's other sites.

    Only across the branches (``contrast="cross"``): where these see the crop at different offsets, equal sites lie at different
    places and different sites at equal ones, so that the place helps nobody.

    Args:
        aux, dominant: ``(B, C, *sites)`` aligned maps of the two branches, the same shape, at least two sites.
        temperature, base_temperature: as in :func:`supcon`.
        valid: ``(B, *sites)`` bool; False drops this site of this crop. Crops with fewer than two valid sites are left out.

    Returns:
        ``()`` loss (0, connected to the graph, where no crop is left) and ``()`` its value at collapse.

    Raises:
        NnsslError: maps of different shapes, or of one site.
    """
    if aux.shape != dominant.shape or aux[0, 0].numel() < 2:
        raise NnsslError(
            f"contrast among sites needs aligned maps of two: {tuple(aux.shape)}, {tuple(dominant.shape)}."
        )
    a, d = (x.flatten(2).permute(2, 1, 0) for x in (aux, dominant))  # sites take the place of samples
    mask = None if valid is None else valid.flatten(1).T
    own = torch.eye(len(a), dtype=torch.bool, device=a.device)
    tau, base = temperature, base_temperature
    return dense_supcon(a, d, own, temperature=tau, base_temperature=base, contrast="cross", valid=mask)


def _sites(
    aux: Tensor,
    dominant: Tensor,
    positives: Tensor,
    temperature: float,
    base_temperature: float,
    contrast: str,
    valid: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Loss ``(S,)`` and number of samples left ``(S,)`` at each of ``S`` sites of ``(B, C, S)`` maps."""
    n = aux.shape[0]
    if n < 2:
        raise NnsslError(
            f"contrast between positions needs at least 2 crops in a step (over all ranks), this step has {n}: "
            "raise batch_size."
        )
    if contrast not in ("all", "cross"):
        raise NnsslError(f"contrast '{contrast}' is unknown; use 'all' or 'cross'.")
    with torch.autocast(aux.device.type, enabled=False):
        z = torch.stack([aux, dominant]).permute(3, 0, 1, 2)  # (S, 2, B, C)
        z = at_least_float32(z)
        keep = (z.detach().norm(dim=-1) >= _MIN_NORM).all(1)  # (S, B): both views
        if valid is not None:
            keep = keep & valid.T
        z = safe_normalise(z).flatten(1, 2)  # (S, 2B, C)
        logits = z @ z.transpose(1, 2) / temperature
        keep2, same = keep.repeat(1, 2), (positives | torch.eye(n, dtype=torch.bool, device=z.device)).repeat(2, 2)
        if contrast == "all":
            others = ~torch.eye(2 * n, dtype=torch.bool, device=z.device)
        else:
            branch = torch.arange(2 * n, device=z.device) >= n
            others = branch[:, None] != branch[None]
        allowed = others & keep2[:, None, :]  # (S, 2B, 2B), contrasts of each anchor
        chosen = same & allowed
        n_pos = chosen.sum(-1)
        top = logits.detach().amax(-1, keepdim=True)
        total = torch.where(allowed, (logits - top).exp(), 0.0).sum(-1)
        log_total = torch.where(total > 0, total, 1.0).log() + top.squeeze(-1)
        each = log_total - torch.where(chosen, logits, 0.0).sum(-1) / n_pos.clamp(min=1)
        # Each sample that is left has its other view as a positive.
        mean = torch.where(keep2, each, 0.0 * each).sum(-1) / keep2.sum(-1).clamp(min=1)
        return temperature / base_temperature * mean, keep.sum(-1)
