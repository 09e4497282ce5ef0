"""What a probe found, before anything is drawn or written."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from nnssl.probe.scores import Setup
from nnssl.probe.sources import Source
from nnssl.probe.verdict import Row


@dataclass(frozen=True, eq=False)
class Probe:
    """What :func:`nnssl.probe.run.probe` found.

    Attributes:
        setup: cases, classes and folds.
        sources: the checkpoints.
        rows: the table: random weights first; encoder stages alone, then with decoder stages.
        sentences: one for each checkpoint and kind of stages, and which checkpoint is ahead.
        warnings: what makes a figure worth less.
        slices: row name -> case -> ``(classes, Y, X)`` bool, of layers on encoder stages.
        seconds: what it took.
        asked: what differs from the defaults.
        files: what was written.
    """

    setup: Setup
    sources: list[Source]
    rows: list[Row]
    sentences: list[str]
    warnings: list[str]
    slices: dict[str, dict[str, np.ndarray]]
    seconds: float
    asked: dict[str, Any]
    files: list[Path] = field(default_factory=list)
