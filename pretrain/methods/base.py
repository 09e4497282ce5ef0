"""What the engine knows of an objective: a :class:`Method`, its frozen config, and what it asks from disk."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from nnssl.errors import NnsslError

if TYPE_CHECKING:
    from nnssl.plans import Plan
    from nnssl.pretrain.augment import Draws

__all__ = ["Batch", "CropRequest", "Crops", "Method", "Picture", "Progress", "SourceStats", "option"]

Batch = dict[str, Any]


def option(default: Any, help: str, *, low: float | None = None, high: float | None = None, choices: tuple = ()) -> Any:
    """A field of a config dataclass that ``--list`` can explain and ``-o`` can check.

    Args:
        default: the value without ``-o``; its type (or the annotation) decides how text is parsed.
        help: one line on meaning and unit.
        low, high: inclusive range of a number.
        choices: the legal values of a string.
    """
    from dataclasses import field

    return field(default=default, metadata={"help": help, "low": low, "high": high, "choices": choices})


@dataclass(frozen=True)
class SourceStats:
    """What is known of the pretraining images before any is opened.

    Attributes:
        median_shape: median case shape in voxels after preprocessing with the plan, three axes (z, y, x after
            nnU-Net's transpose), also for 2d plans.
        n_cases: number of cases that may be drawn.
    """

    median_shape: tuple[int, int, int]
    n_cases: int


@dataclass(frozen=True)
class CropRequest:
    """What a method needs from disk for one step.

    Attributes:
        size: voxels per axis that the network sees (as many axes as the plan's patch).
        window: voxels per axis that are read around the same centre, at least ``size``; the margin feeds rotations,
            scalings and shifts so that these never show padding.
        crops_per_case: crops drawn from each case of a step.
        batch_size: default number of crops per step over all ranks; the engine's ``batch_size`` overrides it.
        min_batch: fewest crops per step for which the objective means anything.
        explanation: one sentence for the user that says why ``size`` is what it is.
        body: whether the objective looks at ``Crops.body``. The mask is then made from the raw images where they are there;
            else a threshold on the preprocessed image has to do.
        place: how windows lie. ``"roam"``: around crops that roam the image, partly outside where the window nearly fills it;
            ``"inside"``: in the image, in its middle where they exceed it; ``"volume"``: the whole case, cut to its
            foreground and resampled to the window.
        align: turn all cases to the orientation that most have: left is left in each. All of :class:`Crops` is then told in
            the turned array.
    """

    size: tuple[int, ...]
    window: tuple[int, ...]
    crops_per_case: int = 1
    batch_size: int = 8
    min_batch: int = 2
    explanation: str = ""
    body: bool = False
    place: str = "roam"
    align: bool = False


@dataclass
class Crops:
    """What the loader delivers for one step on one rank. ``B`` crops, ``C`` channels, spatial axes as the plan's patch.

    Attributes:
        data: ``(B, C, *window)`` float32, normalised as nnU-Net does; 0 outside the image, as in nnU-Net's training.
        body: ``(B, 1, *window)`` bool, True where the image is not air (and inside the image); see ``CropRequest.body``.
        position: ``(B, 3)`` float64, centre of the crop in (0, 1) of the uncropped image, in *patient* axes
            (right to left, anterior to posterior, inferior to superior): independent of transpose, cropping, spacing
            and the direction of the axes.
        axis_position: ``(B, 3)`` float64, the same in the array's axes (z, y, x after transpose), increasing with the index.
        intensity: ``(B, C, 2)`` float32, estimates of each case's 0.5th and 99.5th percentile of the normalised image.
        start: ``(B, 3)`` int64, first voxel of the window in the preprocessed array; negative where it starts outside.
        case: names of the cases, length ``B``.
        shape: ``(B, 3)`` int64, voxels of the preprocessed array; None where crops do not come from the loader.
        source: names of the datasets that the cases come from, length ``B``; None likewise.
    """

    data: Tensor
    body: Tensor
    position: Tensor
    axis_position: Tensor
    intensity: Tensor
    start: Tensor
    case: list[str]
    shape: Tensor | None = None
    source: list[str] | None = None

    def to(self, device: torch.device, non_blocking: bool = True) -> Crops:
        """Move all tensors to ``device``, without waiting where memory is pinned (MPS has no float64: float32 there)."""
        move = {}
        for key, value in vars(self).items():
            if isinstance(value, Tensor):
                if device.type == "mps" and value.dtype == torch.float64:
                    value = value.float()
                move[key] = value.to(device, non_blocking=non_blocking)
        return Crops(**move, case=self.case, source=self.source)

    def part(self, first: int, count: int) -> Crops:
        """``count`` of the crops from ``first`` on; tensors share memory."""
        rows = slice(first, first + count)
        return replace(self, **{k: v[rows] for k, v in vars(self).items() if v is not None})

    def pin_memory(self) -> Crops:
        """Called by torch's DataLoader."""
        pin = {k: v.pin_memory() for k, v in vars(self).items() if isinstance(v, Tensor)}
        return Crops(**pin, case=self.case, source=self.source)

    def __len__(self) -> int:
        return int(self.data.shape[0])


@dataclass(frozen=True)
class Progress:
    """Where training stands: ``step`` optimiser steps done of ``steps`` in all."""

    step: int
    steps: int
    epoch: int
    epochs: int


@dataclass
class Picture:
    """One panel of ``views_epoch_*.png``: rows of equally sized 2D images with a caption per column.

    Attributes:
        columns: caption -> ``(rows, H, W)`` grey or ``(rows, H, W, 3)`` RGB array; a grey column is scaled as a whole
            unless it is in [0, 1].
        title: what a person should look for.
    """

    columns: dict[str, np.ndarray]
    title: str = ""


class Method(nn.Module, ABC):
    """One self-supervised objective over a plan's own network.

    The engine builds it as ``cls(network, plan, request, config)``, wraps it in DistributedDataParallel and calls
    ``forward(batch)``. All state (heads, teachers, queues, centres) lives in parameters and buffers, so that the run's
    checkpoint holds it. Parameters that the objective does not train get ``requires_grad = False`` in ``__init__``.

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

    def __init__(self, network: nn.Module, plan: Plan, request: CropRequest, config: Any) -> None:
        super().__init__()
        self.network = network
        self.plan = plan
        self.request = request
        self.config = config

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
    def views(self, crops: Crops, draws: Draws) -> Batch:
        """Make the batch, on the device of ``crops`` and from ``draws`` only. Called without gradients."""

    @abstractmethod
    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Return ``{"total": (), term: (), ...}``; terms and diagnostics are logged under their names, averaged over ranks."""

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """The loss; this is what DistributedDataParallel wraps."""
        return self.loss(batch)

    @abstractmethod
    def pretrained_parts(self) -> dict[str, Any]:
        """Which parts of the network are trained: ``{"encoder": bool, "decoder_stages": [indices from the bottom]}``."""

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

    def after_step(self, progress: Progress) -> None:  # noqa: B027
        """EMA, centring, queues: once per optimiser step, never after a skipped one."""

    def embed(self, batch: Batch) -> Tensor | None:
        """Image-level embedding ``(N, D)`` of a batch for the engine's SD and effective rank, or None."""
        return None

    def pictures(self, batch: Batch) -> Picture | None:
        """What a person should see of a held-out batch. Called without gradients every few epochs."""
        return None

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
