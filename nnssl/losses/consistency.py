"""Agreement of a student's views with a teacher's, as distributions over prototypes; DINO's form (arXiv:2104.14294).

``q = softmax((P_m(z^c) - c) / tau_t)`` without gradient, ``H(q, z) = - sum_k q_k log softmax(P_s(z) / tau_s)_k``. The centre
``c`` and a low ``tau_t`` pull in opposite directions; :class:`Health` tells when one of them wins. :func:`alignment` is
what there is without prototypes; it needs a predictor and :func:`variance_hinge`, without which all images end at one place.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nnssl.distributed import gather_with_grad, mean_over_ranks


@torch.no_grad()
def teacher_targets(logits: Tensor, centre: Tensor, temperature: float) -> Tensor:
    """``softmax((logits - centre) / tau_t)`` over the last axis of ``(..., K)``, float32; the centre is ``(K,)``."""
    return F.softmax((logits.float() - centre) / temperature, -1)


def consistency(targets: Tensor, logits: Tensor, temperature: float) -> Tensor:
    """Mean cross-entropy over all pairs of a teacher's and a student's view of the same volume, at ``tau_s``.

    ``1/(p v B) sum_{i, j, b} H(q_ib, z_jb)`` of targets ``(p, B, K)`` and logits ``(v, B, K)``, float32; ln K where all
    logits are equal.
    """
    with torch.autocast(logits.device.type, enabled=False):
        log_p = F.log_softmax(logits.float() / temperature, -1)
        # H is linear in q: the mean over p x v pairs is that of the mean target.
        return -(targets.mean(0, keepdim=True) * log_p).sum(-1).mean()


def alignment(predictions: Tensor, targets: Tensor, kind: str) -> Tensor:
    """Mean distance over all pairs of a teacher's and a student's view of the same volume, float32.

    Args:
        predictions: ``(v, B, D)``, of the student's predictor.
        targets: ``(p, B, D)``, of the teacher's projector; no gradient goes through them.
        kind: ``"cosine"``: ``1 - cos(z, e)``; ``"mse"``: ``|z - e|^2 / D``.
    """
    if kind not in ("cosine", "mse"):
        raise ValueError(f"kind must be 'cosine' or 'mse', not '{kind}'")
    with torch.autocast(predictions.device.type, enabled=False):
        z, e = predictions.float()[None], targets.detach().float()[:, None]
        if kind == "cosine":
            return 1.0 - F.cosine_similarity(z, e, dim=-1).mean()
        return (z - e).square().mean()


def variance_hinge(z: Tensor, eps: float = 1e-4) -> Tensor:
    """``mean over views and coordinates of max(0, 1 - sqrt(var + eps))``, the variance over volumes and ranks.

    Bardes et al. 2022, VICReg (arXiv:2105.04906), eq. 1, with the biased variance, of embeddings ``(v, B, D)``; unit vectors
    are to come times sqrt(D). 0 where images differ enough, 1 where they are all the same.
    """
    with torch.autocast(z.device.type, enabled=False):
        everyone = gather_with_grad(z.float().transpose(0, 1).contiguous())  # (B, v, D)
        return F.relu(1.0 - (everyone.var(0, unbiased=False) + eps).sqrt()).mean()


def koleo(z: Tensor, eps: float = 1e-8) -> Tensor:
    """``- mean log d_i``, where ``d_i`` is the distance of a unit embedding to the nearest one of another volume, over ranks.

    Sablayrolles et al. 2019, Spreading vectors for similarity search (arXiv:1806.03198), eq. 2 (Kozachenko-Leonenko's
    estimate of the entropy); as in DINOv2 (arXiv:2304.07193). The tighter a cluster, the stronger it pushes: centring and
    sharpening alone keep few images from one point, but not from a few of them. Each view of ``(v, B, D)`` is looked at by
    itself; 0 where there is a single volume.
    """
    with torch.autocast(z.device.type, enabled=False):
        everyone = gather_with_grad(z.float().transpose(0, 1).contiguous()).transpose(0, 1)  # (v, volumes, D)
        if everyone.shape[1] < 2:
            return 0.0 * everyone.sum()
        with torch.no_grad():
            alike = everyone @ everyone.mT
            alike.diagonal(dim1=1, dim2=2).fill_(-torch.inf)
            nearest = alike.argmax(-1, keepdim=True).expand_as(everyone)
        return -((everyone - everyone.gather(1, nearest)).norm(dim=-1) + eps).log().mean()


@torch.no_grad()
def embedding_spread(z: Tensor) -> Tensor:
    """SD of the coordinates of unit vectors ``(N, D)`` times sqrt(D), over ranks: about 1 is healthy, 0 collapsed."""
    z = gather_with_grad(z)
    return z.std(0, unbiased=False).mean() * z.shape[1] ** 0.5


@torch.no_grad()
def retrieval(local: Tensor, whole: Tensor, volume: Tensor) -> tuple[Tensor, Tensor]:
    """How often the global view nearest to a local one is of the same volume, and how often by guessing; both over ranks.

    Args:
        local: ``(q, B, D)`` unit embeddings of local views.
        whole: ``(B, D)`` of one global view of each volume; those of all ranks are looked at.
        volume: ``(B,)`` int64, equal for crops of one volume.
    """
    anchors, names = gather_with_grad(whole.contiguous()), gather_with_grad(volume.contiguous())
    same = names[None] == volume[:, None]  # (B, anchors)
    hit = same[torch.arange(len(volume), device=volume.device), (local @ anchors.T).argmax(-1)].float().mean()
    return mean_over_ranks(hit), mean_over_ranks(same.float().mean())


@torch.no_grad()
def entropy(p: Tensor) -> Tensor:
    """Entropy in nats of distributions ``(..., K)``: ``(...)``."""
    return -torch.xlogy(p, p).sum(-1)


class Centre(nn.Module):
    """``c <- m c + (1 - m) mean over batch, views and ranks of the teacher's logits``, after the step that used the old c.

    The momentum m: 0.9 for 32 and more teacher samples a step, 0.99 below.
    """

    value: Tensor

    def __init__(self, prototypes: int, momentum: float = 0.99) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("value", torch.zeros(prototypes))
        self._pending: Tensor | None = None

    @torch.no_grad()
    def observe(self, logits: Tensor) -> None:
        """Remember a step's logits ``(..., K)``; :meth:`step` applies them. A second call replaces the first."""
        self._pending = mean_over_ranks(logits.float().flatten(0, -2).mean(0))

    @torch.no_grad()
    def step(self) -> None:
        """Move by what was observed last; nothing happens without."""
        if self._pending is not None:
            self.value.lerp_(self._pending, 1.0 - self.momentum)
            self._pending = None


class Health(nn.Module):
    """Entropy of the teacher's mean target over many steps: a batch is too small to tell whether all images get the same."""

    mean: Tensor
    count: Tensor

    def __init__(self, prototypes: int, momentum: float = 0.98) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("mean", torch.zeros(prototypes))
        self.register_buffer("count", torch.zeros(()))

    @torch.no_grad()
    def forward(self, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Observe targets ``(..., K)`` (in training): mean entropy H(q) of single ones, H(mean q) of the running mean."""
        batch = mean_over_ranks(targets.flatten(0, -2).mean(0))
        share = torch.maximum(1.0 / (self.count + 1.0), torch.full_like(self.count, 1.0 - self.momentum))
        mean = torch.lerp(self.mean, batch, share)
        if self.training:
            self.mean.copy_(mean)
            self.count.add_(1.0)
        return mean_over_ranks(entropy(targets).mean()), entropy(mean)


def diagnose(single: float, mean: float, spread: float, prototypes: int) -> str | None:
    """What is wrong with a teacher's targets, in plain words, or None.

    Args:
        single: H(q), mean entropy of single targets, in nats.
        mean: H(mean q), entropy of their mean over many images.
        spread: SD of the student's unit embeddings over a batch times sqrt(D); about 1 where images differ.
        prototypes: K; the largest entropy is ln K. 0 where there are none, and the spread alone tells.
    """
    if spread < 0.05:
        return (
            f"collapse: the student embeds all images of a batch at nearly the same place (spread {spread:.3f}, 1 is healthy). "
            "Lower lr or the consistency weights, or raise the batch."
        )
    if prototypes == 0:
        return None
    most = math.log(prototypes)
    if mean < 0.1 * most:
        return (
            f"collapse: the teacher gives every image the same few of {prototypes} prototypes (entropy of the mean target "
            f"{mean:.2f} of {most:.2f}). Lower the consistency weights, or raise the batch or teacher_temperature."
        )
    if single > 0.98 * most:
        return (
            f"plateau: the teacher's targets are uniform over {prototypes} prototypes (entropy {single:.2f} of {most:.2f}), so "
            "that consistency teaches nothing. Lower teacher_temperature or prototypes."
        )
    if mean - single < 0.01 * most:
        return (
            f"plateau: the teacher's targets are the same for every image (entropy {single:.2f}, of their mean {mean:.2f}), so "
            "that consistency teaches nothing. Raise the batch, or lower teacher_temperature."
        )
    return None
