"""Agreement of a student's views with a teacher's, as distributions over prototypes; DINO's form (arXiv:2104.14294).

``q = softmax((P_m(z^c) - c) / tau_t)`` without gradient, ``H(q, z) = - sum_k q_k log softmax(P_s(z) / tau_s)_k``. The centre
``c`` and a low ``tau_t`` pull in opposite directions; :class:`Health` tells when one of them wins.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nnssl.distributed import mean_over_ranks

__all__ = ["Centre", "Health", "consistency", "diagnose", "entropy", "teacher_targets"]


@torch.no_grad()
def teacher_targets(logits: Tensor, centre: Tensor, temperature: float) -> Tensor:
    """``softmax((logits - centre) / temperature)`` over the last axis, float32.

    Args:
        logits: ``(..., K)``.
        centre: ``(K,)``.
        temperature: ``tau_t``.
    """
    return F.softmax((logits.float() - centre) / temperature, -1)


def consistency(targets: Tensor, logits: Tensor, temperature: float) -> Tensor:
    """Mean cross-entropy over all pairs of a teacher's and a student's view of the same volume.

    Args:
        targets: ``(p, B, K)`` distributions of the teacher's views.
        logits: ``(v, B, K)`` of the student's views.
        temperature: ``tau_s``.

    Returns:
        ``()`` float32: ``1/(p v B) sum_{i, j, b} H(q_ib, z_jb)``; ln K where all logits are equal.
    """
    with torch.autocast(logits.device.type, enabled=False):
        log_p = F.log_softmax(logits.float() / temperature, -1)
        # H is linear in q: the mean over p x v pairs is that of the mean target.
        return -(targets.mean(0, keepdim=True) * log_p).sum(-1).mean()


@torch.no_grad()
def entropy(p: Tensor) -> Tensor:
    """Entropy in nats of distributions ``(..., K)``: ``(...)``."""
    return -torch.xlogy(p, p).sum(-1)


class Centre(nn.Module):
    """``c <- m c + (1 - m) mean over batch, views and ranks of the teacher's logits``, after the step that used the old c.

    Args:
        prototypes: K.
        momentum: ``m``; 0.9 for 32 and more teacher samples a step, 0.99 below.
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
    """Entropy of the teacher's mean target over many steps: a batch is too small to tell whether all images get the same.

    Args:
        prototypes: K.
        momentum: of the running mean.
    """

    mean: Tensor
    count: Tensor

    def __init__(self, prototypes: int, momentum: float = 0.98) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("mean", torch.zeros(prototypes))
        self.register_buffer("count", torch.zeros(()))

    @torch.no_grad()
    def forward(self, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Observe targets ``(..., K)`` (in training) and measure.

        Returns:
            Mean entropy H(q) of single targets and entropy H(mean q) of the running mean, both over ranks.
        """
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
        prototypes: K; the largest entropy is ln K.
    """
    most = math.log(prototypes)
    if spread < 0.05:
        return (
            f"collapse: the student embeds all images of a batch at nearly the same place (spread {spread:.3f}, 1 is healthy). "
            "Lower lr or the consistency weights, or raise the batch."
        )
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
