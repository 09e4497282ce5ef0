"""Agreement of what a student makes of masked views with what a teacher makes of the whole global ones.

DINO's form (arXiv:2104.14294) by default: cross-entropy between distributions over prototypes, centred and sharpened. Without
prototypes: cosine or squared distance of embeddings, with a predictor on the student's side and a variance term.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nnssl.ema import EMA, cosine_momentum
from nnssl.heads.dino import DinoHead, RunningStandardisation, pool_stages
from nnssl.heads.mlp import mlp
from nnssl.losses.consistency import (
    Centre,
    Health,
    alignment,
    consistency,
    diagnose,
    embedding_spread,
    koleo,
    retrieval,
    teacher_targets,
    variance_hinge,
)

if TYPE_CHECKING:
    from nnssl.pretrain.methods.glmae.method import GLMAEConfig

STAGES = 2  # last encoder stages that stand in for a class token


class SelfDistillation(nn.Module):
    """The student's projector, the teacher, and what is kept of both from step to step. Nothing of it is transferred.

    Attributes:
        seen: entropy of the teacher's single targets and of their mean, and the embedding's spread, at the last training step.
    """

    seen: Tensor

    def __init__(self, encoder: nn.Module, width: int, config: GLMAEConfig, *, maximum: bool) -> None:
        super().__init__()
        self.config, self.maximum = config, maximum
        self.prototypes = config.prototypes if config.consistency == "ce" else 0
        self.projector = DinoHead(width, self.prototypes, hidden=config.hidden, bottleneck=config.bottleneck)
        self.teacher_encoder = EMA(encoder)
        self.teacher_projector = EMA(self.projector)
        self.moments = _moments(width, config.moments_momentum)
        if self.prototypes:
            self.embedding_moments = _moments(config.bottleneck, config.moments_momentum)
            self.centre = Centre(self.prototypes, config.centre_momentum)
            self.health = Health(self.prototypes)
        else:
            self.projector.prototypes.requires_grad_(False)  # empty
            self.predictor = mlp(config.bottleneck, config.bottleneck, hidden=config.hidden)
        self.register_buffer("seen", torch.zeros(3))

    def forward(self, features: dict[str, Tensor], whole: Tensor) -> dict[str, Tensor]:
        """Terms ``gg`` and, where there are local views, ``lg``; ``koleo``, or ``variance`` without prototypes; diagnostics.

        Args:
            features: the student's, pooled: ``global`` ``(p B, width)`` and, where there are local views, ``local`` ``(q B,
                width)``; row ``j * B + i`` is view j of volume i.
            whole: ``(p B, C, *size)``, the global views with nothing hidden.
        """
        c, counts = self.config, [len(features[k]) for k in features]
        volumes = counts[0] // c.global_views
        projected = torch.cat([self.project(kind, pooled) for kind, pooled in features.items()])
        embedded = F.normalize(projected, dim=1)
        with torch.no_grad():
            said = self.project("teacher", self._look(whole))
            anchor = F.normalize(said, dim=1)
            spread = embedding_spread(embedded.detach()[: counts[0]])
        terms: dict[str, Tensor] = {}
        single, mean = spread, spread
        if self.prototypes:
            teacher: Any = self.teacher_projector.module
            targets, single, mean = self._targets(teacher.logits(anchor).view(c.global_views, volumes, -1))
            outputs = self.projector.logits(embedded)
            terms |= {"teacher_entropy": single, "mean_entropy": mean}
            if c.koleo_weight > 0:
                terms["koleo"] = koleo(embedded[: counts[0]].view(c.global_views, volumes, -1))
        else:
            targets, outputs = said.view(c.global_views, volumes, -1), self.predictor(projected)
            held = embedded * embedded.shape[1] ** 0.5 if c.consistency == "cosine" else projected
            terms["variance"] = variance_hinge(held.view(-1, volumes, held.shape[1]))
        agreed = {}
        for name, part in zip(("gg", "lg"), outputs.split(counts)):
            views = part.view(-1, volumes, part.shape[1])
            if self.prototypes:
                agreed[name] = consistency(targets, views, c.student_temperature)
            else:
                agreed[name] = alignment(views, targets, c.consistency)
        if self.training:
            self.seen.copy_(torch.stack([single, mean, spread]))
        terms["embedding_spread"] = spread
        terms["view_cosine"] = (embedded.detach()[: counts[0]] * anchor).sum(1).mean()
        return {**agreed, **terms}

    @torch.no_grad()
    def _targets(self, said: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """From the teacher's logits ``(p, B, K)`` its targets, by the centre so far, and both entropies."""
        targets = teacher_targets(said, self.centre.value, self.config.teacher_temperature)
        if self.training:
            self.centre.observe(said)
        single, mean = self.health(targets)
        return targets, single, mean

    def embed(self, whole: Tensor) -> Tensor:
        """The teacher's unit embedding ``(n, bottleneck)`` of whole views ``(n, C, *size)``."""
        return F.normalize(self.project("teacher", self._look(whole)), dim=1)

    @torch.no_grad()
    def retrieval(self, local: Tensor, whole: Tensor, volume: Tensor) -> dict[str, Tensor]:
        """How often a local view (of the student's pooled features) is nearest to the global view of its own volume, and by
        chance."""
        z = F.normalize(self.project("local", local), dim=1)
        hits, chance = retrieval(z.view(-1, len(volume), z.shape[1]), self.embed(whole), volume)
        return {"retrieval": hits, "retrieval_chance": chance}

    def follow(self, encoder: nn.Module, step: int, steps: int) -> None:
        """After an optimiser step: the teacher moves towards the student, and the centre by what the step has seen."""
        momentum = cosine_momentum(step, steps, self.config.teacher_momentum)
        self.teacher_encoder.update(encoder, momentum)
        self.teacher_projector.update(self.projector, momentum)
        if self.prototypes:
            self.centre.step()

    def problem(self) -> str | None:
        """What was wrong at the last training step, in plain words, or None."""
        single, mean, spread = self.seen.tolist()
        return diagnose(single, mean, spread, self.prototypes)

    def _look(self, whole: Tensor) -> Tensor:
        """What the teacher's encoder makes of whole views, pooled."""
        return pool_stages(self.teacher_encoder(whole)[-STAGES:], maximum=self.maximum)

    def project(self, kind: str, pooled: Tensor) -> Tensor:
        """Pooled features ``(n, width)`` to ``(n, bottleneck)``, of ``"global"`` or ``"local"`` views or the ``"teacher"``.

        Features are standardised before the projector. What comes out is, too, where there are prototypes: else the student
        soon says the same of all images, which is cheapest while it knows nothing, and the teacher follows it there.
        """
        head: Any = self.teacher_projector.module if kind == "teacher" else self.projector
        if not self.config.standardise:
            return head.project(pooled)
        projected = head.project(self.moments[kind](pooled))
        return self.embedding_moments[kind](projected) if self.prototypes else projected


def _moments(width: int, momentum: float) -> nn.ModuleDict:
    """Moments of each kind of view apart: its kind must not be what tells a local view from a global one."""
    kinds = ("global", "local", "teacher")
    return nn.ModuleDict({k: RunningStandardisation(width, momentum, batch=True) for k in kinds})
