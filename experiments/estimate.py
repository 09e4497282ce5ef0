"""What ``--dry-run`` tells of the time: from what finished jobs took, else from a few timed steps of the plan's network."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from nnssl.experiments.jobs import PHASES, Graph, Job
from nnssl.experiments.records import Records
from nnssl.plans import Plan

START_SECONDS = {"network": 15.0, "pretrain": 30.0, "plan": 15.0, "train": 30.0, "predict": 30.0, "evaluate": 15.0}
"""What a job takes before its first step, and all of a job without steps: mostly Python's imports."""
PRETRAIN_FACTOR = 3.0
"""A step of pretraining over one of training, where none was measured: at least eight crops, two views, and an augmentation."""
CASE_SECONDS = 2.0
"""Reading, resampling and writing a predicted case, and evaluating it."""


@dataclass(frozen=True)
class Estimate:
    """Seconds of each job that is not finished, and which phases rest on measured jobs."""

    seconds: dict[str, float]
    measured: frozenset[str]

    def total(self, slots: int = 1) -> float:
        """Seconds of everything where so many run at a time; what waits for each other is not looked at."""
        return sum(self.seconds.values()) / max(1, slots)


def estimate_jobs(graph: Graph, records: Records, pending: Iterable[Job], device: str, timed: bool = True) -> Estimate:
    """Estimate what is not finished: from the median time per step or case of finished jobs of the phase (pretraining: of the
    method), else from a few timed steps of the network where the device is there; NaN without (``timed=False``)."""
    pending = list(pending)
    rates = _rates(graph, records)
    seconds: dict[str, float] = {}
    steps: dict[str, float | None] = {}
    plans = {r.name: r.network for r in graph.settings}
    for job in pending:
        rate = rates.get(_kind(job))
        if rate is not None:
            seconds[job.id] = rate * job.amount
            continue
        setting = str(job.about.get("setting", ""))
        if job.gpu and setting not in steps:
            steps[setting] = step_seconds(plans[setting], device) if timed else None
        seconds[job.id] = START_SECONDS[job.phase] + _rule(job, plans[setting], steps.get(setting))
    return Estimate(seconds, frozenset(phase for phase in PHASES if any(k[0] == phase for k in rates)))


def _kind(job: Job) -> tuple[Any, ...]:
    method = job.about.get("method") if job.phase == "pretrain" else None
    return (job.phase, job.about.get("setting"), method)


def _rates(graph: Graph, records: Records) -> Mapping[tuple[Any, ...], float]:
    found: dict[tuple[Any, ...], list[float]] = {}
    for job in graph.jobs.values():
        record = records.read(job.id)
        if record.get("status") == "done" and record.get("seconds") and job.amount:
            found.setdefault(_kind(job), []).append(float(record["seconds"]) / job.amount)
    return {kind: statistics.median(rates) for kind, rates in found.items()}


def _rule(job: Job, plan: Plan, step: float | None) -> float:
    if not job.gpu:
        return CASE_SECONDS * job.amount if job.phase == "evaluate" else 0.0
    if step is None:
        return math.nan
    if job.phase == "predict":
        sizes = zip(plan.median_shape[-plan.dim :], plan.patch_size)
        windows = math.prod(max(1, math.ceil(2 * (m / p - 1)) + 1) for m, p in sizes)
        slices = plan.median_shape[0] if plan.dim == 2 else 1
        flips = 1 if "--disable_tta" in job.command else 2**plan.dim
        return job.amount * (CASE_SECONDS + windows * slices * flips * step / 3 / plan.batch_size)
    return job.amount * step * (PRETRAIN_FACTOR if job.phase == "pretrain" else 1.3)


def step_seconds(plan: Plan, device: str, steps: int = 2) -> float | None:
    """Seconds of one forward and backward pass of a training batch; None where the device is not there.

    On a CPU they are those that the processor worked, so that other programs do not make the estimate longer.
    """
    import torch

    from nnssl.networks import build_network

    if device == "cuda" and not torch.cuda.is_available():
        return None
    network = build_network(plan).to(device)
    batch = torch.randn(plan.batch_size, plan.n_channels, *plan.patch_size, device=device)
    now = time.perf_counter if device != "cpu" else lambda: time.process_time() / torch.get_num_threads()
    times = []
    for _ in range(1 + steps):
        begin = now()
        found = network(batch)
        loss = sum(o.float().square().mean() for o in (found if isinstance(found, (list, tuple)) else [found]))
        loss.backward()  # type: ignore[union-attr]
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(now() - begin)
    return min(times[1:])
