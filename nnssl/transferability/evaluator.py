"""The robustness of one network on fixed held-out crops, measured without touching its training."""

from __future__ import annotations

import hashlib
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nnssl.config import config_dict
from nnssl.errors import NnsslError
from nnssl.networks.padding import own_padding
from nnssl.networks.primus import PrimusEncoder, is_primus
from nnssl.networks.state import unwrap
from nnssl.transferability.distances import degenerate
from nnssl.transferability.pooling import pool
from nnssl.transferability.robustness import Separation, hinge, robustness_loss, separate
from nnssl.transferability.verdict import FEW_CASES
from nnssl.transferability.views import MR_FAMILIES, photometric_view
from nnssl.words import per_cent

log = logging.getLogger("nnssl")

WEAK_VIEWS = 1e-6
COLLAPSED = 1e-3
Encoder = Callable[[Tensor], Sequence[Tensor]]


@dataclass(frozen=True)
class RobustnessConfig:
    """How the trace is measured; the same for every evaluation of a run.

    Attributes:
        distance: ``cosine``, ``l2`` or ``pearson``.
        margin: of the hinge; 0.5 is the published code's.
        level: encoder stage, counted from the deepest: -1 is the bottleneck, -2 the stage above it.
        pooling: ``grid``, ``gap`` or ``flat``.
        grid: cells per axis of ``grid``.
        negatives: ``all`` or ``mirror``.
        margins: margins that are reported beside ``margin``.
        families: kinds of change of the views, see :mod:`nnssl.transferability.views`.
        seed: of the views (and, offline, of crop positions and random initialisations).
        batch_size: crops per forward.
    """

    distance: str = "cosine"
    margin: float = 0.5
    level: int = -2
    pooling: str = "grid"
    grid: int = 2
    negatives: str = "all"
    margins: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    families: tuple[str, ...] = MR_FAMILIES
    seed: int = 0
    batch_size: int = 8

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return config_dict(self)


@dataclass(frozen=True)
class RobustnessResult:
    """One measurement. Distances are means over the crops.

    Attributes:
        loss: robustness loss, **lower is better**; NaN where the features are degenerate.
        score: margin minus loss, 0 for a collapsed network.
        positive, negative: distance of the two views of a crop, and of crops of different cases.
        per_crop: each crop's mean hinge, for bootstraps over cases; empty where the loss is NaN.
        margins: margin -> loss.
        clipped: share of the pairs beyond the margin, whose gap no longer counts.
        bottleneck: the loss at level -1.
        n: crops.
        shape: channels and size of the feature map.
        degenerate: crops without a usable representation.
        seconds: wall time.
    """

    loss: float
    score: float
    positive: float
    negative: float
    per_crop: tuple[float, ...]
    margins: dict[float, float]
    clipped: float
    bottleneck: float
    n: int
    shape: tuple[int, ...]
    degenerate: int
    seconds: float

    def metrics(self) -> dict[str, float]:
        """Flat numbers for a log: loss, score, both distances, the bottleneck's loss."""
        return {
            "loss": self.loss,
            "score": self.score,
            "distance_positive": self.positive,
            "distance_negative": self.negative,
            "loss_bottleneck": self.bottleneck,
        }


@contextmanager
def untouched(network: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients and without autocast; every module's mode and the random state come back after it.

    Convolutions pad with zeros, as where the network is fine-tuned, whatever they do while pretraining.

    The random states restored are torch's on the CPU and on the network's device. Gradients are not written. On a GPU,
    convolutions run in full float32 and deterministically: runner-up epochs often differ by less than 1e-3.
    """
    modes = {module: module.training for module in network.modules()}
    device = next((p.device for p in network.parameters()), torch.device("cpu"))
    devices = [device] if device.type == "cuda" else []
    try:
        network.eval()
        with (
            own_padding(network),
            torch.random.fork_rng(devices=devices),
            torch.no_grad(),
            torch.autocast(device.type, enabled=False),
            torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False),
        ):
            yield
    finally:
        for module, training in modes.items():
            module.training = training


class RobustnessEvaluator:
    """Measures networks on the same crops, the same views and the same pairs, so that only the weights differ.

    The views are made once, when this is built, and kept in memory.

    Args:
        crops: ``(N, C, *size)`` float32, one crop per case (or an object with ``data``, ``case`` and ``intensity``, such as
            the loader's crops whose windows have the size that the network takes).
        config: how to measure.
        groups: case of each crop; crops of one case are never each other's negative. All differ by default.
        intensity: ``(N, C, 2)`` low and high value of each case's channels; from the crops by default.
        spacing: mm per axis.

    Attributes:
        fingerprint: hash over configuration, cases and crops, to recognise the same measurement after a restart.

    Raises:
        NnsslError: fewer than two crops, or what is not finite.
    """

    def __init__(
        self,
        crops: Any,
        config: RobustnessConfig | None = None,
        *,
        groups: Sequence[str] | None = None,
        intensity: Tensor | None = None,
        spacing: Sequence[float] | None = None,
    ) -> None:
        self.config = config or RobustnessConfig()
        data = crops if isinstance(crops, Tensor) else crops.data
        if not isinstance(crops, Tensor):
            groups = list(crops.case) if groups is None else groups
            intensity = crops.intensity if intensity is None else intensity
        if len(data) < 2:
            raise NnsslError(f"robustness compares cases: at least 2 held-out crops are needed, there are {len(data)}.")
        data = data.detach().float().cpu()
        if not bool(torch.isfinite(data).all()):
            raise NnsslError("a held-out crop of the robustness trace holds NaN or infinite values.")
        intensity = None if intensity is None else intensity.detach().float().cpu()
        self.groups = None if groups is None else [str(g) for g in groups]
        families, seed = self.config.families, self.config.seed
        self.views = tuple(
            photometric_view(data, seed, v, families=families, intensity=intensity, spacing=spacing) for v in (0, 1)
        )
        digest = hashlib.sha256(repr((self.config.to_dict(), self.groups, tuple(data.shape))).encode())
        digest.update(data.numpy().tobytes())
        self.fingerprint = digest.hexdigest()
        self._warned: set[str] = set()
        if self.n_cases < FEW_CASES:
            self._warn("few", f"Robustness rests on {self.n_cases} cases only; below {FEW_CASES} it is mostly noise.")

    def __len__(self) -> int:
        return len(self.views[0])

    @property
    def n_cases(self) -> int:
        """Number of different cases."""
        return len(self) if self.groups is None else len(set(self.groups))

    def evaluate(self, network: nn.Module | Encoder) -> RobustnessResult:
        """Measure a network.

        Args:
            network: an nnU-Net network (its ``encoder`` is used, also when wrapped), or any callable that returns the
                stage outputs ``(B, C, *size)`` from shallow to deep. Modules are put back into the mode they were in.

        Returns:
            The measurement; degenerate features give a NaN loss and a count, never an exception.
        """
        begin = time.perf_counter()
        module = unwrap(network) if isinstance(network, nn.Module) else nn.Identity()
        encoder = network
        if isinstance(network, nn.Module):
            encoder = PrimusEncoder(module) if is_primus(module) else getattr(module, "encoder", module)
        device = next((p.device for p in module.parameters()), torch.device("cpu"))
        with untouched(module):
            levels, shape = self._levels(encoder, device)
        result = self._result(levels, shape, begin)
        self._judge(result)
        return result

    def _levels(self, encoder: Encoder, device: torch.device) -> tuple[dict[int, list[Tensor]], tuple[int, ...]]:
        """Pooled features ``level -> [view 0, view 1]``, each ``(N, D)`` float64 on the CPU, and the map's shape."""
        wanted = dict.fromkeys((self.config.level, -1))
        pooled: dict[int, list[list[Tensor]]] = {level: [[], []] for level in wanted}
        shape: tuple[int, ...] = ()
        for v, view in enumerate(self.views):
            for x in view.split(self.config.batch_size):
                stages = encoder(x.to(device))
                stages = [stages] if isinstance(stages, Tensor) else list(stages)
                for level in wanted:
                    if not -len(stages) <= level < len(stages):
                        raise NnsslError(f"robustness level {level}: the encoder has {len(stages)} stages only.")
                    vectors = pool(stages[level], self.config.pooling, grid=self.config.grid)
                    pooled[level][v].append(vectors.cpu().double())
                shape = tuple(stages[self.config.level].shape[1:])
        return {level: [torch.cat(parts) for parts in views] for level, views in pooled.items()}, shape

    def _separate(self, anchors: Tensor, positives: Tensor) -> Separation | None:
        kind = self.config.distance
        if bool((degenerate(anchors, kind) | degenerate(positives, kind)).any()):
            return None
        return separate(anchors, positives, distance=kind, negatives=self.config.negatives, groups=self.groups)

    def _result(self, levels: dict[int, list[Tensor]], shape: tuple[int, ...], begin: float) -> RobustnessResult:
        config, n = self.config, len(self)
        anchors, positives = levels[config.level]
        bad = int((degenerate(anchors, config.distance) | degenerate(positives, config.distance)).sum())
        gaps, bottom = self._separate(anchors, positives), self._separate(*levels[-1])
        bottleneck = math.nan if bottom is None else float(robustness_loss(bottom, config.margin))
        if gaps is None:
            nan = math.nan
            margins = dict.fromkeys(config.margins, nan)
            seconds = time.perf_counter() - begin
            return RobustnessResult(nan, nan, nan, nan, (), margins, nan, bottleneck, n, shape, bad, seconds)
        loss = float(robustness_loss(gaps, config.margin))
        return RobustnessResult(
            loss=loss,
            score=config.margin - loss,
            positive=float(gaps.positive.mean()),
            negative=float(gaps.negative.mean()),
            per_crop=tuple(hinge(gaps, config.margin).tolist()),
            margins={m: float(robustness_loss(gaps, m)) for m in config.margins},
            clipped=float((-gaps.delta[gaps.mask] > config.margin).double().mean()),
            bottleneck=bottleneck,
            n=n,
            shape=shape,
            degenerate=bad,
            seconds=time.perf_counter() - begin,
        )

    def _judge(self, r: RobustnessResult) -> None:
        if r.degenerate:
            text = f"Robustness: {r.degenerate} of {r.n} crops have a zero, constant or non-finite representation."
            self._warn("degenerate", text)
        elif r.positive < WEAK_VIEWS:
            text = (
                f"Robustness: the two views look the same to the network (distance {r.positive:.1e}); too weak for it."
            )
            self._warn("weak", text)
        elif r.negative < COLLAPSED:
            text = (
                f"Robustness: different cases look the same (distance {r.negative:.1e}): collapse, or pooled too far."
            )
            self._warn("collapsed", text)
        if r.clipped > 0.5 and self.config.margin < 1:
            text = f"Robustness: {per_cent(r.clipped)} of the pairs are beyond the margin {self.config.margin}; see margin 1 too."
            self._warn("clipped", text)

    def _warn(self, key: str, text: str) -> None:
        if key not in self._warned:
            self._warned.add(key)
            log.warning("%s", text)
