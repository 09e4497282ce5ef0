"""What the engine knows of an objective."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

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


class Method(nn.Module, ABC):
    """One self-supervised objective over a plan's own network.

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

    def __init__(self, network: nn.Module, plan: Plan, request: CropRequest, config: Any) -> None:
        super().__init__()
        self.network = network
        self.plan = plan
        self.request = request
        self.config = config
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
    def crops(cls, plan: Plan, stats: SourceStats, config: Any, size: tuple[int, ...] | None = None) -> CropRequest:
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

    def optimiser(self) -> torch.optim.Optimizer:
        """The optimiser over the trained parameters; AdamW unless the method says otherwise.

        Reads ``lr`` and ``weight_decay`` of the config. The engine multiplies each group's initial lr by
        :meth:`lr_factor`.
        """
        params = [p for p in self.parameters() if p.requires_grad]
        return torch.optim.AdamW(params, lr=self.config.lr, weight_decay=self.config.weight_decay)

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
