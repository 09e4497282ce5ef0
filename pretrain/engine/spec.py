"""What a run is made of, and what it left behind."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from nnssl.loggers import Logger
from nnssl.plans import Plan
from nnssl.pretrain.data import CaseSet
from nnssl.pretrain.engine.config import EngineConfig
from nnssl.pretrain.engine.folder import RunFolder
from nnssl.pretrain.engine.hooks import Hook
from nnssl.pretrain.methods.base import Method
from nnssl.pretrain.types import CropRequest

if TYPE_CHECKING:
    from nnssl.pretrain.engine.loop import Engine


@dataclass
class RunSpec:
    """All that defines a run; :func:`nnssl.pretrain.run` fills it in.

    Attributes:
        sources: names of the datasets that the cases come from.
        save: writes a checkpoint; rank 0 only.
        seed: of network initialisation, sampling and views.
        weights: how often the cases of each source are drawn, by its name; None for equally often.
        start: weights to start from, :class:`nnssl.pretrain.onwards.Start`; None for random ones.
        auxiliary: what is read beside the crops: ``reader(split)`` gives the auxiliary loader of a split, ``random(crops)`` puts
            random values beside random crops.
        identity: what makes the run what it is; the checkpoint carries it.
        loggers: get the numbers of rank 0; whoever opens them closes them.
    """

    method: type[Method]
    config: Any
    plan: Plan
    case_set: CaseSet
    sources: list[str]
    request: CropRequest
    engine: EngineConfig
    batch_size: int
    epochs: int
    iterations: int
    seed: int
    device: torch.device
    workers: int
    folder: RunFolder
    save: Callable[[Engine, Any, dict[str, Any] | None], None]
    hooks: list[Hook] = field(default_factory=list)
    weights: dict[str, float] | None = None
    auxiliary: Any = None
    identity: dict[str, Any] = field(default_factory=dict)
    start: Any = None
    loggers: Sequence[Logger] = ()

    @property
    def steps(self) -> int:
        """Length of the run in optimiser steps."""
        return self.epochs * self.iterations


@dataclass(frozen=True)
class RunResult:
    """What a run left behind.

    Attributes:
        folder: the output folder.
        checkpoint: ``checkpoint_final.pth``; None where the run was stopped early or only estimated.
        finished: whether it ran to its end; ``--c`` continues it where a signal ended it early.
        learnt: the method's own verdict on held-out crops.
        sentence: the verdict for a person, and on lines of their own what else was measured.
        metrics: held-out terms at the end (training terms where nothing is held out).
        signal: number of the signal that stopped the run early; 0 where none did.
    """

    folder: Path
    checkpoint: Path | None
    finished: bool
    learnt: bool
    sentence: str
    metrics: dict[str, float]
    signal: int = 0
