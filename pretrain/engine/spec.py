"""What a run is made of, and how it ended."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
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
        save: writes a checkpoint: ``save(engine, path, training_state)``; rank 0 only.
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
class Outcome:
    """How a run ended.

    Attributes:
        finished: False where a signal ended it early; ``--c`` continues it.
        signal: its number; 0 where none ended the run.
        learnt: the method's own verdict on held-out crops.
        sentence: the verdict for a person, and on lines of their own what else was measured.
        first, last: held-out terms before the first step and at the end (training terms where nothing is held out).
    """

    finished: bool
    learnt: bool
    sentence: str
    first: dict[str, float]
    last: dict[str, float]
    history: list[dict[str, Any]]
    signal: int = 0
