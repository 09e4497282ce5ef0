"""Robustness of finished checkpoints, grouped by run. Nothing is ranked across runs."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nnssl.errors import NnsslError, raise_problems
from nnssl.networks import build_network
from nnssl.plans import Plan
from nnssl.transferability.evaluator import RobustnessEvaluator, RobustnessResult
from nnssl.transferability.indicator import select_robust
from nnssl.weights import Checkpoint, apply, load

log = logging.getLogger("nnssl")


@dataclass(frozen=True)
class Measured:
    """One checkpoint and its robustness."""

    path: Path
    run: tuple[str, str]  # folder, and a hash of what the file tells of method, options and data
    method: str  # objective or trainer
    epoch: int | None  # epochs (or what the unit says) trained; None where neither file nor name tells
    encoder_percent: float  # share of the encoder's parameters that the file filled
    result: RobustnessResult
    unit: str = "epochs"  # "steps" where the file has these only; "in order" where it has neither

    @property
    def trained(self) -> str:
        """``3 epochs``, ``750 steps``, a dash."""
        unit = self.unit.removesuffix("s") if self.epoch == 1 else self.unit
        return "-" if self.epoch is None else f"{self.epoch:,} {unit}"


@dataclass
class Run:
    """Checkpoints of one run in the order of training.

    Attributes:
        name: for the reader: the folder's name, with a number where two runs share it.
        method: objective or trainer.
        rows: its checkpoints; epochs are distinct.
    """

    name: str
    method: str
    rows: list[Measured]

    @property
    def losses(self) -> dict[int, float]:
        """Epoch -> robustness loss."""
        return {int(r.epoch or 0): r.result.loss for r in self.rows}

    @property
    def best(self) -> Measured | None:
        """The checkpoint with the lowest loss; an untrained one (epoch 0) is never chosen. None where there is none."""
        epoch = select_robust({e: v for e, v in self.losses.items() if e > 0})
        return next((r for r in self.rows if r.epoch == epoch), None) if epoch is not None else None

    @property
    def lead(self) -> float:
        """Loss of the runner-up minus that of the best; NaN with fewer than two candidates."""
        values = sorted(v for e, v in self.losses.items() if e > 0 and math.isfinite(v))
        return values[1] - values[0] if len(values) > 1 else math.nan


def _trained(checkpoint: Checkpoint) -> tuple[int | None, str]:
    """How long was trained and in which unit, from the content, else the last number in the file's name."""
    own, content = checkpoint.nnssl, checkpoint.content
    found = ((own.get("epoch"), "epochs"), (own.get("step"), "steps"), (content.get("current_epoch"), "epochs"))
    for value, unit in found:
        if isinstance(value, int) and not isinstance(value, bool):
            return value, unit
    numbers = re.findall(r"\d+", checkpoint.path.stem)
    return (int(numbers[-1]) if numbers else None), "epochs"


def _run_of(checkpoint: Checkpoint) -> tuple[str, str]:
    own = checkpoint.nnssl
    identity: dict[str, Any] = {k: own.get(k) for k in ("method", "config", "data", "plan", "crop_size")}
    if not own:
        identity = {"trainer": checkpoint.content.get("trainer_name"), "origin": checkpoint.origin}
    text = json.dumps(identity, sort_keys=True, default=str)
    return str(checkpoint.path.resolve().parent), hashlib.sha256(text.encode()).hexdigest()


def measure_checkpoints(
    evaluator: RobustnessEvaluator, plan: Plan, paths: Sequence[str | Path], device: str = "cpu"
) -> list[Measured]:
    """Put each checkpoint's weights into the plan's own network, as fine-tuning would, and measure it.

    Raises:
        NnsslError: lists every file that cannot be read or does not fit the network.
    """
    measured, problems = [], []
    for path in dict.fromkeys(Path(p) for p in paths):
        try:
            checkpoint = load(path)
            network = build_network(plan)
            report = apply(network, checkpoint, plan, parts="all")
        except NnsslError as error:
            problems.append(str(error))
            continue
        result = evaluator.evaluate(network.to(device))
        epoch, unit = _trained(checkpoint)
        share = report.part("encoder").percent
        measured.append(Measured(path, _run_of(checkpoint), checkpoint.method, epoch, share, result, unit))
    raise_problems(problems, "Checkpoints")
    return measured


def group_runs(measured: Sequence[Measured]) -> list[Run]:
    """Group measurements by run, each sorted by epoch.

    Where epochs are unknown or two files of a run have the same one with different results, the order given counts instead
    (and is said); a second file with the same epoch and the same result (``latest`` and ``final``) is dropped.
    """
    runs: dict[tuple[str, str], list[Measured]] = {}
    for m in measured:
        runs.setdefault(m.run, []).append(m)
    out, used = [], Counter[str]()
    for (folder, _), rows in runs.items():
        name = Path(folder).name
        used[name] += 1
        name = name if used[name] == 1 else f"{name} ({used[name]})"
        out.append(Run(name, rows[0].method, _ordered(rows, name)))
    return out


def _ordered(rows: list[Measured], name: str) -> list[Measured]:
    known: dict[int, Measured] = {}
    for row in rows:
        if row.epoch is None or (row.epoch in known and known[row.epoch].result.loss != row.result.loss):
            log.warning("%s: the checkpoints do not all tell their epoch; the order given counts instead.", name)
            return [replace(r, epoch=i, unit="in order") for i, r in enumerate(rows, start=1)]
        if row.epoch in known:
            log.info("%s is the same as %s and is left out.", row.path.name, known[row.epoch].path.name)
        known.setdefault(row.epoch, row)
    return [known[e] for e in sorted(known)]
