"""What the engine knows of an objective, and what every objective has: freezing, optimiser, schedule, learning check."""

from __future__ import annotations

import hashlib
import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor, nn

from nnssl.errors import NnsslError
from nnssl.networks import forward_features, unwrap
from nnssl.parts import decoder_stage, part_of, promised_parts
from nnssl.pretrain.augment.spatial import central_crop
from nnssl.pretrain.types import Batch, CropRequest, Crops, Curve, Picture, Progress, SourceStats

if TYPE_CHECKING:
    from nnssl.plans import Plan
    from nnssl.pretrain.augment import StepRNG

log = logging.getLogger("nnssl")

C = TypeVar("C")
Size = tuple[int, ...]
"""Voxels per axis."""


class Method(nn.Module, ABC, Generic[C]):
    """One self-supervised objective over a plan's own network; ``Method[Config]`` names its options to a type checker.

    The engine builds it as ``cls(network, plan, request, config)``, wraps it in DistributedDataParallel and calls
    ``forward(batch)``. All state (heads, teachers, queues, centres) lives in parameters and buffers, so that the run's
    checkpoint holds it. The parts of the network that :meth:`pretrained_parts` leaves out are frozen here.

    Attributes:
        name: registry name, set by :func:`register`.
        Config: the frozen dataclass of options, set by :func:`register`.
        title: one line for ``--list``.
        citation: the papers to cite.
        presets: preset name -> {option: value} for ``-o preset=...``.
        grad_clip: largest gradient norm unless ``-o grad_clip`` says otherwise; 0 for none.
        takes_primus: whether it also trains transformers on tokens (Primus), beside U-Nets.
        view_families: which of gamma, bias, window, blur, lowres, noise the views use; the robustness measure takes others.
        default_transfer: which of :meth:`pretrained_parts` a segmentation network gets unless the user says otherwise, one of
            :data:`nnssl.plans.parts.CHOICES`; ``transfer_reason``: why, for the transfer report. Chosen by measurement.
        optimises_robustness: whether the objective itself makes views of an image alike, which its verdict then says.
        spoken: words for terms of the loss whose names are none, for the line of an epoch: ``{"gg": "agreement of views"}``.
    """

    name: ClassVar[str] = ""
    Config: ClassVar[type]
    title: ClassVar[str] = ""
    citation: ClassVar[tuple[str, ...]] = ()
    presets: ClassVar[dict[str, dict[str, Any]]] = {}
    grad_clip: float = 12.0
    takes_primus: ClassVar[bool] = False
    view_families: ClassVar[tuple[str, ...]] = ()
    default_transfer: ClassVar[str] = "all"
    transfer_reason: ClassVar[str] = ""
    optimises_robustness: ClassVar[bool] = False
    spoken: ClassVar[dict[str, str]] = {}

    def __init__(self, network: nn.Module, plan: Plan, request: CropRequest, config: C) -> None:
        super().__init__()
        self.network = network
        self.plan = plan
        self.request = request
        self.config = config
        self._warned: set[str] = set()
        trained = set(promised_parts(self.pretrained_parts()))
        for name, parameter in unwrap(network).named_parameters():
            parameter.requires_grad_(part_of(name) in trained)

    @classmethod
    def check_network(cls, plan: Plan) -> None:
        """Refuse a plan whose kind of network this objective does not train.

        Raises:
            NnsslError: a Primus, which has neither stages nor a decoder of its own, for an objective of U-Nets.
        """
        if plan.is_primus and not cls.takes_primus:
            raise NnsslError(
                f"{cls.name} looks at the stages of a U-Net, and the network of plans '{plan.plans_name}' is a "
                f"{plan.network_class}. Pretrain it with -m mae or -m glmae."
            )

    @classmethod
    @abstractmethod
    def crops(cls, plan: Plan, stats: SourceStats, config: C, size: Size | None = None) -> CropRequest:
        """Choose the pretraining crop for a plan.

        Args:
            plan: the plan whose network is trained.
            stats: shapes of the pretraining images.
            config: this method's config.
            size: the user's ``--crop``, checked for legality instead of chosen.

        Raises:
            NnsslError: where no legal crop exists; names the axis and the numbers.
        """

    @abstractmethod
    def views(self, crops: Crops, rng: StepRNG, /) -> Batch:
        """Make the batch, on the device of ``crops`` and from ``rng`` only. Called without gradients."""

    @abstractmethod
    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Return ``{"total": (), term: (), ...}``; terms and diagnostics are logged under their names, averaged over ranks."""

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """The loss; this is what DistributedDataParallel wraps."""
        return self.loss(batch)

    @abstractmethod
    def pretrained_parts(self) -> dict[str, Any]:
        """Which parts of the network are trained: ``{"encoder": bool, "decoder_stages": [indices from the bottom]}``.

        From plan and config alone: it is asked before anything else of the method is built.
        """

    def trained_parameters(self) -> list[nn.Parameter]:
        """What the optimiser is given: parameters of the network and of heads that are not frozen."""
        return [p for p in self.parameters() if p.requires_grad]

    def optimiser(self) -> torch.optim.Optimizer:
        """The optimiser over the trained parameters; AdamW unless the method says otherwise.

        Reads ``lr`` and ``weight_decay`` (0 where there is none) of the config. The engine multiplies each group's initial lr
        by :meth:`lr_factor`.
        """
        config: Any = self.config  # options of other names need an optimiser of their own
        decay = getattr(config, "weight_decay", 0.0)
        return torch.optim.AdamW(self.trained_parameters(), lr=config.lr, weight_decay=decay)

    def lr_factor(self, step: int, steps: int) -> float:
        """Factor on each group's initial learning rate at a step: a pure function. Linear warm-up, then half a cosine.

        Reads ``warmup`` of the config (share of the run) where it exists.
        """
        warm = round(getattr(self.config, "warmup", 0.0) * steps)
        if step < warm:
            return (step + 1) / warm
        return 0.5 * (1.0 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))

    def restarts(self, step: int, steps: int) -> bool:
        """Whether the optimiser forgets its moments before a step, as where a stage begins: a pure function."""
        return False

    def after_step(self, progress: Progress) -> None:  # noqa: B027
        """EMA, centring, queues: once per optimiser step, never after a skipped one."""

    def embed(self, batch: Batch) -> Tensor | None:
        """Image-level embedding ``(N, D)`` of a batch for the engine's SD and effective rank, or None."""
        return None

    def images(self, crops: Crops) -> Tensor:
        """The middle of each window as it is, ``(B, C, *size)``, for the engine's diagnostics."""
        return central_crop(crops.data, self.request.size)

    def dense_features(self, images: Tensor) -> dict[str, Tensor]:
        """Maps by name that the place in the crop may not explain; empty where there are none.

        Of a U-Net the bottleneck and the finest decoder stage that is pretrained; of a Primus nothing, since its tokens have
        learned places.
        """
        if self.plan.is_primus:
            return {}
        stages = [int(i) for i in self.pretrained_parts().get("decoder_stages", ())]
        levels = forward_features(self.network, images, max(stages) + 1 if stages else 0).levels
        return {"bottleneck": levels[0]} | ({decoder_stage(max(stages)): levels[-1]} if stages else {})

    def pictures(self, batch: Batch) -> Picture | None:
        """What a person should see of a held-out batch. Called without gradients every few epochs."""
        return None

    def curves(self) -> list[Curve]:
        """The panels of ``progress.png``, the most telling first: what the verdict rests on, beside what it is compared with.

        The loop adds what its hooks and its own diagnostics draw, up to six panels in all.
        """
        return [Curve("The loss", "loss", {"total": "loss"}, hint="lower is better")]

    def note(self, terms: dict[str, float]) -> str:
        """What each epoch's line says beside the losses, from the means of the held-out terms (training's where none are)."""
        return ""

    def verdict(self, first: dict[str, float], last: dict[str, float]) -> tuple[bool, str]:
        """Whether the run learnt, and one plain sentence that says so.

        Args:
            first, last: means of the held-out terms before the first step and at the end.
        """
        a, b = first["total"], last["total"]
        learnt = b < a
        return learnt, f"The held-out loss {'fell' if learnt else 'did not fall'}: {a:.4g} before, {b:.4g} now."

    def judged(self, learnt: bool, what: str) -> tuple[bool, str]:
        """A verdict in its usual form: the method's name, whether it learnt, and ``what``, the numbers."""
        return learnt, f"{self.name} {'learnt' if learnt else 'did not learn'}{what}"

    def warn_once(self, kind: str, text: str, *values: object) -> None:
        """Log a warning of a kind the first time that it comes up."""
        if kind not in self._warned:
            self._warned.add(kind)
            log.warning(text, *values)


def encoder_only() -> dict[str, Any]:
    """:meth:`Method.pretrained_parts` of an objective over the encoder."""
    return {"encoder": True, "decoder_stages": []}


def whole_network(plan: Plan) -> dict[str, Any]:
    """:meth:`Method.pretrained_parts` of an objective over encoder and decoder: everything but the segmentation heads."""
    return {"encoder": True, "decoder_stages": list(range(plan.n_stages - 1))}


def require_weight(config: Any, *names: str) -> None:
    """Refuse a config in which all of these weights are 0."""
    if not any(getattr(config, name) for name in names):
        both = "both" if len(names) == 2 else "all"
        raise NnsslError(f"{', '.join(names[:-1])} and {names[-1]} are {both} 0: nothing would be learnt.")


def weighted_sum(terms: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """Sum of those of the terms that there are, each times its weight."""
    return torch.stack([weight * terms[name] for name, weight in weights.items() if name in terms]).sum()


def numbers_of(names: Sequence[str], device: torch.device) -> Tensor:
    """A number for each name, equal for equal names and the same on all ranks: ``(len(names),)`` int64."""
    digests = [hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest() for name in names]
    return torch.tensor([int.from_bytes(d[:7], "big") for d in digests], device=device)
