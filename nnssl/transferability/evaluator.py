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

from nnssl.config import config_dict, option
from nnssl.errors import NnsslError
from nnssl.networks.padding import own_padding
from nnssl.networks.primus import PrimusEncoder, is_primus
from nnssl.networks.state import unwrap
from nnssl.options import given
from nnssl.transferability.distances import DISTANCES, degenerate
from nnssl.transferability.pooling import POOLINGS, pool
from nnssl.transferability.robustness import NEGATIVES, Separation, hinge, robustness_loss, separate
from nnssl.transferability.verdict import FEW_CASES
from nnssl.transferability.views import MR_FAMILIES, photometric_view
from nnssl.words import per_cent

log = logging.getLogger("nnssl")

WEAK_VIEWS = 1e-6
COLLAPSED = 1e-3
HOW = "how"
"""Title of the command's options that say how is measured."""
Encoder = Callable[[Tensor], Sequence[Tensor]]


@dataclass(frozen=True, kw_only=True)
class RobustnessConfig:
    """How the trace is measured; the same for every evaluation of a run."""

    distance: str = given(
        "cosine", HOW, "--distance", choices=DISTANCES, help="distance of two embeddings (default: cosine)"
    )
    margin: float = given(
        0.5,
        HOW,
        "--margin",
        type=float,
        metavar="M",
        help="by how much farther other cases should be than the same case (default: 0.5)",
    )
    level: int = given(
        -2,
        HOW,
        "--level",
        type=int,
        metavar="STAGE",
        help="encoder stage, counted from 0, or from the bottleneck: -1, -2, ... (default: -2)",
    )
    pooling: str = given(
        "grid", HOW, "--pooling", choices=POOLINGS, help="pooling of a stage's features (default: grid)"
    )
    grid: int = given(
        2,
        HOW,
        "--grid",
        type=int,
        metavar="G",
        help="with --pooling grid: parts into which each axis is divided (default: 2)",
    )
    negatives: str = given(
        "all", HOW, "--negatives", choices=NEGATIVES, help="what counts as other cases (default: all)"
    )
    margins: tuple[float, ...] = option((0.0, 0.25, 0.5, 0.75, 1.0), "margins that are reported beside the margin")
    families: tuple[str, ...] = option(MR_FAMILIES, "kinds of change of the views")
    seed: int = given(0, HOW, help="random seed of crops, views and initialisations (default: 0)")
    batch_size: int = option(8, "crops per forward pass")


@dataclass(frozen=True)
class RobustnessResult:
    """One measurement. Distances are means over the crops."""

    loss: float  # robustness loss, LOWER IS BETTER; NaN where the features are degenerate
    score: float  # margin minus loss
    positive: float  # distance of the two views of a crop
    negative: float  # distance of crops of different cases
    per_crop: tuple[float, ...]  # mean hinge of each, for bootstraps over cases; empty where the loss is NaN
    margins: dict[float, float]  # margin -> loss
    clipped: float  # share of the pairs beyond the margin, whose gap no longer counts
    bottleneck: float  # the loss at level -1
    n: int  # crops
    shape: tuple[int, ...]  # channels and size of the feature map
    degenerate: int  # crops without a usable representation
    seconds: float

    def metrics(self) -> dict[str, float]:
        """Flat numbers for a log."""
        return {
            "loss": self.loss,
            "score": self.score,
            "distance_positive": self.positive,
            "distance_negative": self.negative,
            "loss_bottleneck": self.bottleneck,
        }


@contextmanager
def untouched(network: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients and without autocast; modes and torch's random state come back after it.

    Convolutions pad with zeros, as where the network is fine-tuned, whatever they do while pretraining. On a GPU they run in
    full float32 and deterministically: runner-up epochs often differ by less than 1e-3.
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

    Args:
        crops: ``(N, C, *size)`` float32, one crop per case (or an object with ``data``, ``case`` and ``intensity``, such as
            the loader's crops whose windows have the size that the network takes).
        config: how to measure.
        groups, intensity, spacing: see :func:`separate` and :func:`photometric_view`.

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
        digest = hashlib.sha256(repr((config_dict(self.config), self.groups, tuple(data.shape))).encode())
        digest.update(data.numpy().tobytes())
        self.fingerprint = digest.hexdigest()  # recognises the same measurement after a restart
        self._warned: set[str] = set()
        if self.n_cases < FEW_CASES:
            self._warn("few", f"{self.n_cases} cases only; below {FEW_CASES} it is mostly noise.")

    def __len__(self) -> int:
        return len(self.views[0])

    @property
    def n_cases(self) -> int:
        """Number of different cases."""
        return len(self) if self.groups is None else len(set(self.groups))

    def evaluate(self, network: nn.Module | Encoder) -> RobustnessResult:
        """Measure a network; degenerate features give a NaN loss and a count, never an exception.

        Args:
            network: an nnU-Net network (its ``encoder`` is used, also when wrapped), or any callable that returns the
                stage outputs ``(B, C, *size)`` from shallow to deep.
        """
        begin = time.perf_counter()
        module = unwrap(network) if isinstance(network, nn.Module) else nn.Identity()
        encoder = network
        if isinstance(network, nn.Module):
            encoder = PrimusEncoder(module) if is_primus(module) else getattr(module, "encoder", module)
        device = next((p.device for p in module.parameters()), torch.device("cpu"))
        with untouched(module):
            levels, shape = self._levels(encoder, device)
        numbers = self._numbers(levels)
        result = RobustnessResult(**numbers, n=len(self), shape=shape, seconds=time.perf_counter() - begin)
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

    def _separate(self, level: list[Tensor]) -> tuple[Separation | None, int]:
        """The separation of a level's views, None where a crop is degenerate, and how many are."""
        kind = self.config.distance
        bad = int((degenerate(level[0], kind) | degenerate(level[1], kind)).sum())
        if bad:
            return None, bad
        negatives = self.config.negatives
        return separate(*level, distance=kind, negatives=negatives, groups=self.groups, check=False), 0

    def _numbers(self, levels: dict[int, list[Tensor]]) -> dict[str, Any]:
        margin, margins, nan = self.config.margin, self.config.margins, math.nan
        bottom = self._separate(levels[-1])[0]
        gaps, bad = self._separate(levels[self.config.level])
        common = {"degenerate": bad, "bottleneck": nan if bottom is None else float(robustness_loss(bottom, margin))}
        if gaps is None:
            unknown = dict.fromkeys(("loss", "score", "positive", "negative", "clipped"), nan)
            return {**common, **unknown, "per_crop": (), "margins": dict.fromkeys(margins, nan)}
        loss = float(robustness_loss(gaps, margin))
        return {
            **common,
            "loss": loss,
            "score": margin - loss,
            "positive": float(gaps.positive.mean()),
            "negative": float(gaps.negative.mean()),
            "per_crop": tuple(hinge(gaps, margin).tolist()),
            "margins": {m: float(robustness_loss(gaps, m)) for m in margins},
            "clipped": float((-gaps.delta[gaps.mask] > margin).double().mean()),
        }

    def _judge(self, r: RobustnessResult) -> None:
        if r.degenerate:
            self._warn(
                "degenerate", f"{r.degenerate} of {r.n} crops have a zero, constant or non-finite representation."
            )
        elif r.positive < WEAK_VIEWS:
            self._warn(
                "weak", f"the two views look the same to the network (distance {r.positive:.1e}); too weak for it."
            )
        elif r.negative < COLLAPSED:
            self._warn(
                "collapsed", f"different cases look the same (distance {r.negative:.1e}): collapse, or pooled too far."
            )
        if r.clipped > 0.5 and self.config.margin < 1:
            self._warn(
                "clipped", f"{per_cent(r.clipped)} of the pairs are beyond margin {self.config.margin}; see 1 too."
            )

    def _warn(self, key: str, text: str) -> None:
        if key not in self._warned:
            self._warned.add(key)
            log.warning("Robustness: %s", text)
