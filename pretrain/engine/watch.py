"""Watches a pretraining by the robustness of its encoder: the trace, ``checkpoint_robust.pth``, the stop, the verdict.

Rank 0 measures, on the target's own images where these are not learnt from, else on the held-out cases; the others only get
whether to stop. How it is measured and what it can tell: :mod:`nnssl.transferability`, docs/transferability.md.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from nnssl.distributed import mean_over_ranks, rank
from nnssl.errors import NnsslError
from nnssl.networks import build_network
from nnssl.paths import preprocessed_folder
from nnssl.preprocessed import list_cases
from nnssl.pretrain.engine.hooks import Hook
from nnssl.transferability.compare import modality
from nnssl.transferability.crops import choose_cases, read_crops
from nnssl.transferability.evaluator import RobustnessConfig, RobustnessEvaluator
from nnssl.transferability.monitor import RobustnessMonitor
from nnssl.transferability.schedule import plan_schedule
from nnssl.transferability.stopper import Stopper
from nnssl.transferability.verdict import FEW_CASES
from nnssl.transferability.views import choose_families
from nnssl.words import per_cent

if TYPE_CHECKING:
    from nnssl.pretrain.engine.loop import Engine
    from nnssl.pretrain.engine.spec import RunSpec

log = logging.getLogger("nnssl")

ROBUST_CHECKPOINT = "checkpoint_robust.pth"
PATIENCE = 5
LEAST_WARMUP = 0.05


class RobustnessHook(Hook):
    """Measures robustness every few epochs.

    Args:
        every: epochs between two measurements; 0 turns it off; None chooses it, and the number of crops, so that they cost at
            most 3 % of the run's time, and in a continued run keeps what the run began with.
        stop: end the run once the measure has not improved for :data:`PATIENCE` measurements after warm-up; None: as the run
            began, else no.

    Attributes:
        monitor: the trace; None on other ranks than 0 and where nothing is measured.
    """

    name = "robustness"

    def __init__(self, every: int | None = None, stop: bool | None = None) -> None:
        if every is not None and every < 0:
            raise NnsslError(f"--robustness-every {every}: 0 (off) or a number of epochs is wanted.")
        if stop and every == 0:
            raise NnsslError("--stop robustness needs the measure: leave out --robustness-every 0.")
        self.every, self.stop = every, stop
        self.monitor: RobustnessMonitor | None = None
        self._asked = every is not None or bool(stop)
        self._saved: dict[str, Any] = {}
        self._seconds = 0.0

    def start(self, engine: Engine) -> None:
        """Read the crops and measure random initialisations and, before the first step, the network."""
        self.every = self._saved.get("every") if self.every is None else self.every
        self.stop = bool(self._saved.get("stop") if self.stop is None else self.stop)
        if rank() != 0 or self.every == 0:
            return
        try:
            self.monitor = self._build(engine.spec)
        except NnsslError as error:
            if self._asked:
                raise
            log.warning("Robustness is not measured: %s", error)
        monitor = self.monitor
        if monitor is None:
            return
        if "monitor" in self._saved:
            monitor.load_state_dict(self._saved["monitor"])
            self._seconds = float(self._saved["seconds"])
        monitor.measure_baseline(lambda: build_network(engine.spec.plan), device=engine.spec.device)
        if engine.step == 0:
            numbers = monitor.evaluate(engine.method.network, 0)
            baseline = [] if monitor.baseline is None else list(monitor.baseline.losses)
            engine.log.event("robustness", epoch=0, step=0, random_inits=baseline, **numbers)

    def after_epoch(self, engine: Engine, row: dict[str, Any]) -> None:
        """Measure where it is due, keep the best network, and stop all ranks together."""
        self._seconds += float(row.get("step_s") or 0.0) * engine.spec.iterations
        if self.monitor is not None:
            self._measure(self.monitor, engine, row)
        if not self.stop:
            return
        now = self.monitor is not None and self.monitor.stop_now()  # rank 0's decision, on all ranks
        if mean_over_ranks(torch.tensor([float(now)], device=engine.spec.device)).item() > 0:
            best = "" if self.monitor is None else f" since epoch {self.monitor.best_epoch}"
            engine.stop_reason = f"robustness has not improved{best} (--stop robustness)"
            log.info("Stopping after epoch %d: %s.", row["epoch"], engine.stop_reason)

    def _measure(self, monitor: RobustnessMonitor, engine: Engine, row: dict[str, Any]) -> None:
        epoch = int(row["epoch"])
        if len(monitor.trace) <= 1 and self.every is None and monitor.calibrate(self._seconds / max(1, epoch)):
            log.info(
                "Robustness is measured every %d epochs, to keep it below 3 %% of the time.", monitor.schedule.every
            )
        if not monitor.due(epoch):
            return
        numbers = monitor.evaluate(engine.method.network, epoch)
        row.update({f"robustness/{k}": v for k, v in numbers.items()})
        if monitor.improved:
            engine.spec.save(engine, engine.spec.folder.path / ROBUST_CHECKPOINT, None)
        best = f", lowest {monitor.stopper.best:.4g} at epoch {monitor.best_epoch}"
        best = "" if monitor.best_epoch is None else best
        random = math.nan if monitor.baseline is None else monitor.baseline.mean
        log.info("robustness loss %.4g (random %.4g%s)", numbers["loss"], random, best)

    def finish(self, engine: Engine) -> str | None:
        """The verdict against random initialisations, where the best network is, and what measuring has cost."""
        monitor = self.monitor
        if monitor is None:
            return None
        share = monitor.share(self._seconds)
        text = f"{monitor.verdict()} Measuring took {per_cent(share, 1)} of the training time."
        if monitor.best_epoch is not None and monitor.best_epoch != monitor.trace[-1]["epoch"]:
            text += f" The network of epoch {monitor.best_epoch} is {ROBUST_CHECKPOINT}."
        return text

    def panel(self) -> Callable[[Any], None] | None:
        """What draws the trace into an axis of ``progress.png``; None where nothing is measured."""
        return None if self.monitor is None else self.monitor.plot

    def state_dict(self) -> dict[str, Any]:
        """Settings, trace, stop rule and time."""
        settings = {"every": self.every, "stop": self.stop}
        if self.monitor is None:
            return settings
        return {**settings, "monitor": self.monitor.state_dict(), "seconds": self._seconds}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Kept until :meth:`start`."""
        self._saved = dict(state)

    def checkpoint_info(self) -> dict[str, Any]:
        """``{"robustness": ...}``: the trace with its settings and a hash of the crops, no names."""
        return {} if self.monitor is None else {"robustness": self.monitor.summary()}

    def _build(self, spec: RunSpec) -> RobustnessMonitor | None:
        cases, where = _cases(spec)
        size = spec.request.size
        schedule = plan_schedule(spec.epochs, spec.iterations * spec.batch_size, len(cases), every=self.every or None)
        if schedule is None:
            reason = (
                f"it compares cases that are not learnt from, at least 2, and {len(cases)} of them is there"
                if len(cases) < 2
                else "the run is too short for 3 % of it"
            )
            log.info("Robustness is not measured: %s.", reason)
            if self.stop:
                raise NnsslError(f"--stop robustness: {reason}. Give --robustness-every, or leave out --stop.")
            return None
        chosen = choose_cases(cases, schedule.crops, spec.seed)
        families = choose_families(modality(spec.plan), getattr(spec.method, "view_families", ()))
        config = RobustnessConfig(seed=spec.seed, families=families, level=max(-2, -spec.plan.n_stages))
        crops = read_crops([cases[k] for k in chosen], spec.plan, size, seed=spec.seed)
        evaluator = RobustnessEvaluator(crops, config, groups=chosen, spacing=spec.plan.spacing)
        log.info(
            "Robustness: %d crops of %s, every %s, %d times, about %.1f %% of the time; views by %s.",
            len(chosen),
            where,
            "epoch" if schedule.every == 1 else f"{schedule.every} epochs",
            schedule.evaluations,
            100 * schedule.share,
            ", ".join(families),
        )
        if self.stop and len(chosen) < FEW_CASES:
            log.warning("--stop robustness will not stop this run: it rests on %d cases only.", len(chosen))
        warmup = max(getattr(spec.config, "warmup", 0.0), LEAST_WARMUP)
        stopper = Stopper(patience=PATIENCE, warmup=max(1, math.ceil(warmup * spec.epochs)))
        coupled = bool(getattr(spec.method, "optimises_robustness", False))
        return RobustnessMonitor(evaluator, schedule, stopper, stop=bool(self.stop), coupled=coupled)


def _cases(spec: RunSpec) -> tuple[dict[str, tuple[Path, str]], str]:
    """Cases that the run does not learn from, by key, and what they are."""
    plan = spec.plan
    if all(ref.source != plan.dataset_name for ref in spec.case_set.cases):
        folder = preprocessed_folder() / plan.dataset_name / plan.data_identifier
        names = list_cases(folder)
        if len(names) >= 2:
            return {f"{plan.dataset_name}/{n}": (folder, n) for n in names}, f"images of {plan.dataset_name}"
    return {ref.key: (ref.folder, ref.name) for ref in spec.case_set.held_out}, "held-out cases"
