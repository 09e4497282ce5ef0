"""Watches one pretraining: the trace, the best epoch, the stop rule, the verdict and the curve."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from nnssl.config import config_dict
from nnssl.errors import NnsslError
from nnssl.transferability.evaluator import RobustnessEvaluator, RobustnessResult
from nnssl.transferability.schedule import BUDGET, RANDOM_INITS, Schedule
from nnssl.transferability.stopper import Stopper
from nnssl.transferability.verdict import FEW_CASES, Baseline, Verdict, judge

log = logging.getLogger("nnssl")


def random_baseline(
    evaluator: RobustnessEvaluator,
    build: Callable[[], nn.Module],
    *,
    k: int = RANDOM_INITS,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Baseline:
    """Measure ``k`` fresh networks; the global random state comes back after it.

    One is not enough: two draws of one architecture can differ by 0.1. The i-th is built after ``torch.manual_seed(seed + i)``.
    """
    results = []
    for i in range(k):
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed + i)  # the CPU's only: networks are built there
            network = build()
        results.append(evaluator.evaluate(network.to(device)))
    return Baseline(tuple(r.loss for r in results), tuple(r.per_crop for r in results if r.per_crop))


class RobustnessMonitor:
    """The trace of one run and what follows from it. It never trains, saves or stops anything itself.

    Args:
        evaluator, schedule, stopper: how and when to measure, patience and warm-up.
        stop: whether :meth:`stop_now` may say yes; without it, the best epoch is only remembered.
        coupled: whether the run's objective optimises a quantity of this kind; the verdict then says so.

    Attributes:
        trace: one dict per evaluation: ``epoch``, ``seconds``, ``n`` and the numbers of the measurement.
        baseline: random initialisations, None before :meth:`measure_baseline`.
        improved: whether the last evaluation is the best candidate so far.
    """

    def __init__(
        self,
        evaluator: RobustnessEvaluator,
        schedule: Schedule,
        stopper: Stopper | None = None,
        *,
        stop: bool = False,
        coupled: bool = False,
    ) -> None:
        self.evaluator, self.schedule = evaluator, schedule
        self.stopper = stopper or Stopper(warmup=max(1, round(0.05 * schedule.epochs)))
        self.stop, self.coupled = stop, coupled
        self.trace: list[dict[str, Any]] = []
        self.baseline: Baseline | None = None
        self.improved = False
        self._best: dict[str, Any] | None = None
        self._baseline_seconds = 0.0

    def due(self, epoch: int) -> bool:
        """Whether to evaluate after ``epoch`` epochs, and not done so yet."""
        return self.schedule.due(epoch) and all(row["epoch"] != epoch for row in self.trace)

    def measure_baseline(
        self, build: Callable[[], nn.Module], *, k: int = RANDOM_INITS, device: torch.device | str = "cpu"
    ) -> Baseline:
        """Measure the random initialisations once; see :func:`random_baseline`."""
        if self.baseline is None:
            begin = time.perf_counter()
            self.baseline = random_baseline(self.evaluator, build, k=k, seed=self.evaluator.config.seed, device=device)
            self._baseline_seconds = time.perf_counter() - begin
        return self.baseline

    def evaluate(self, network: nn.Module, epoch: int) -> dict[str, float]:
        """Measure the network that will be transferred after ``epoch`` epochs, and take the result into trace and stop rule.

        Returns flat numbers for the log; training state and random state are left as they are.
        """
        return self.record(epoch, self.evaluator.evaluate(network))

    def record(self, epoch: int, result: RobustnessResult) -> dict[str, float]:
        """Take in a measurement made elsewhere; :meth:`evaluate` without the measuring."""
        metrics = result.metrics()
        margins = {f"{m:g}": v for m, v in result.margins.items()}
        more = {"margins": margins, "clipped": result.clipped, "n": result.n, "seconds": round(result.seconds, 4)}
        self.trace.append({"epoch": epoch, **metrics, **more})
        self.improved = self.stopper.update(epoch, result.loss)
        if self.improved:
            self._best = {"loss": result.loss, "per_crop": list(result.per_crop)}
        return metrics

    def calibrate(self, epoch_seconds: float) -> bool:
        """Measure less often where the measured times exceed the budget; returns whether the schedule was changed.

        For intervals that the user chose, do not call it. ``epoch_seconds`` is the time of a trained epoch.
        """
        seconds = [row["seconds"] for row in self.trace]
        if not seconds or epoch_seconds <= 0:
            return False
        cost = min(seconds)
        affordable = BUDGET * epoch_seconds * self.schedule.epochs / cost - RANDOM_INITS
        if self.schedule.evaluations <= affordable:
            return False
        count = max(2.0, affordable - 1)
        self.schedule = self.schedule.slowed(self.schedule.epochs / (count - 1) / self.schedule.every)
        return True

    def share(self, seconds: float) -> float:
        """Share of ``seconds`` that the measurements took, those of the random initialisations included."""
        own = sum(row["seconds"] for row in self.trace) + self._baseline_seconds
        return own / seconds if seconds > 0 else 0.0

    @property
    def best_epoch(self) -> int | None:
        """Epoch with the lowest loss after warm-up, None so far."""
        return self.stopper.best_epoch

    @property
    def few(self) -> bool:
        """Whether the trace rests on too few cases to act on."""
        return self.evaluator.n_cases < FEW_CASES

    def stop_now(self) -> bool:
        """Whether to end the run: the rule has asked, the user allowed it, and there are enough cases to trust it."""
        return self.stop and self.stopper.stop and not self.few

    def judge(self) -> Verdict | None:
        """The verdict against random initialisations; None without a candidate or a baseline."""
        best, epoch = self._best, self.stopper.best_epoch
        if self.baseline is None or best is None or epoch is None:
            return None
        seed = self.evaluator.config.seed
        return judge(self.baseline, best["loss"], best["per_crop"], epoch=epoch, seed=seed, coupled=self.coupled)

    def verdict(self) -> str:
        """One plain sentence or two for the end of the run."""
        verdict = self.judge()
        return verdict.sentence if verdict else "Robustness says nothing: there was no usable evaluation after warm-up."

    def plot(self, ax: Any) -> None:
        """Draw the trace, the best epoch and the band of random initialisations (mean +- 2 SD) into a matplotlib axis."""
        points = [(row["epoch"], row["loss"]) for row in self.trace if math.isfinite(row["loss"])]
        if self.baseline is not None:
            self.baseline.plot(ax, "random weights (mean ± 2 SD)")
        if points:
            ax.plot(*zip(*points), marker=".", color="C2", label="this run")
        if self.best_epoch is not None:
            ax.plot(self.best_epoch, self.stopper.best, marker="*", markersize=11, color="C3", label="best so far")
        ax.set_title("Is a crop told from others, whatever its contrast?", fontsize=11.5, fontweight="bold", pad=20)
        hint = "lower is better; below the grey band: better than random weights"
        ax.text(0.5, 1.02, hint, transform=ax.transAxes, ha="center", va="bottom", fontsize=9, color="0.3")
        ax.set_ylabel("robustness loss of the encoder", fontsize=9)
        ax.legend(fontsize=8)

    def summary(self) -> dict[str, Any]:
        """What the checkpoint's ``nnssl`` part tells. No case names: only a hash over them and their voxels."""
        return {
            "config": config_dict(self.evaluator.config),
            "crops": {"n": len(self.evaluator), "sha256": self.evaluator.fingerprint},
            "schedule": self.schedule.to_dict(),
            "baseline": None if self.baseline is None else list(self.baseline.losses),
            "trace": [dict(row) for row in self.trace],
            "best_epoch": self.best_epoch,
        }

    def state_dict(self) -> dict[str, Any]:
        """What a continued run needs; plain values only."""
        return {
            "fingerprint": self.evaluator.fingerprint,
            "schedule": self.schedule.to_dict(),
            "stopper": self.stopper.state_dict(),
            "trace": [dict(row) for row in self.trace],
            "baseline": None if self.baseline is None else self.baseline.to_dict(),
            "baseline_seconds": self._baseline_seconds,
            "best": self._best,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue a trace.

        Raises:
            NnsslError: where it was measured on other crops or in another way: the numbers could not be compared.
        """
        if state["fingerprint"] != self.evaluator.fingerprint:
            raise NnsslError(
                "the robustness trace of this run was measured on other crops or with other settings, so it cannot be "
                "continued. Restore the held-out cases, or continue with --robustness-every 0."
            )
        self.schedule = Schedule.from_dict(state["schedule"])
        self.stopper.load_state_dict(state["stopper"])
        self.trace = [dict(row) for row in state["trace"]]
        self.baseline = None if state["baseline"] is None else Baseline.from_dict(state["baseline"])
        self._baseline_seconds = float(state["baseline_seconds"])
        self._best = state["best"]
