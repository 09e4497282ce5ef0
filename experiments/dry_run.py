"""What ``--dry-run`` prints: an overview, each job with its command line and state, and the time."""

from __future__ import annotations

import logging
import math
import shlex
from collections.abc import Mapping, Sequence

from nnssl.experiments.estimate import estimate_jobs
from nnssl.experiments.jobs import PHASES, Graph, Job
from nnssl.experiments.session import Session
from nnssl.words import aligned, counted, spoken

log = logging.getLogger("nnssl")


def show(session: Session, slots: int) -> None:
    """Print it all, for so many jobs at a time."""
    graph, pending = session.graph, session.pending
    times = estimate_jobs(graph, session.records, pending, session.device)
    for setting in graph.settings:
        p = setting.network
        counts = ", ".join(str(n) for n in sorted({d.count for d in setting.subsets}))
        where = f"{len(setting.test)} test cases" if setting.test else "the validation cases of each fold"
        log.info(
            f"{setting.name}: {p.dataset_name}, {p.configuration}, {p.plans_name}; {counts} labelled of "
            f"{len(setting.pool)} cases; evaluated on {where}."
        )
    log.info("%s", overview(graph, {job.id for job in pending}, times.seconds))
    for job in graph.jobs.values():
        seconds = times.seconds.get(job.id)
        about = "" if seconds is None else "  ?" if math.isnan(seconds) else f"  {spoken(seconds)}"
        state = "exists" if seconds is None else _state(job, session)
        log.info(f"{state:13} {job.id}{about}\n              $ {job.shown}")
    log.info(f"\n{len(graph.jobs)} jobs, {len(graph.jobs) - len(pending)} of them finished. Output: {session.folder}")
    variables = session.experiment.environment.items()
    exports = "".join(f"\n              $ export {k}={shlex.quote(v)}" for k, v in variables)
    log.info(
        "Each line with $ can be typed, in this order%s; the lists of cases that they name are in %s.%s",
        ", after what the experiment file sets" if exports else "",
        session.folder / "lists",
        exports,
    )
    if any(map(math.isnan, times.seconds.values())):
        log.info(
            f"Time: unknown without the device '{session.device}'; it is estimated from the first jobs that finish."
        )
    elif pending:
        timed = [phase for phase in PHASES if phase not in times.measured and any(j.phase == phase for j in pending)]
        note = f"rough for {', '.join(timed)}: a few steps were timed" if timed else "from the jobs that have finished"
        log.info(f"Time: about {spoken(times.total(slots))} with {counted(slots, 'job')} at a time ({note}).")


def _state(job: Job, session: Session) -> str:
    """Of a job that is not finished."""
    status = session.records.read(job.id).get("status")
    if status == "failed":
        return "failed before"
    if status in ("stopped", "running") or any(path.is_file() for path in job.resume):
        return "begun"
    # "to check": made by hand, or by a job that was killed: maybe not whole
    return "to check" if job.recorded and all(path.is_file() for path in job.outputs) else "to do"


def overview(graph: Graph, pending: set[str], seconds: Mapping[str, float]) -> str:
    """Methods by numbers of labels: draws that are evaluated and to do, and how long; pretrainings have lines of their own."""
    lines = [("", "labels", "done", "to do", "time")]
    for setting in graph.settings:
        before = [j for j in graph.jobs.values() if j.about.get("setting") == setting.name and "labels" not in j.about]
        for job in before:
            what = job.about.get("method") or "network"
            word = "pretraining" if job.phase == "pretrain" else "plan"
            lines.append(_line(f"{what}, {word}", "", [job.id], [job.id], pending, seconds))
        runs = [run for run in graph.runs if run.resolved.name == setting.name]
        for arm, count in dict.fromkeys((run.arm.name, run.subset.count) for run in runs):
            mine = [run for run in runs if (run.arm.name, run.subset.count) == (arm, count)]
            jobs = [i for run in mine for i in run.jobs if "labels" in graph.jobs[i].about]
            lines.append(_line(arm, str(count), [run.jobs[-1] for run in mine], jobs, pending, seconds))
    return aligned(lines)


def _line(what: str, labels: str, ends: Sequence[str], jobs: Sequence[str], pending: set[str],
          seconds: Mapping[str, float]) -> tuple[str, str, str, str, str]:  # fmt: skip
    todo = sum(i in pending for i in ends)
    known = [seconds[i] for i in dict.fromkeys(jobs) if i in pending]
    time = "" if not known else "?" if any(math.isnan(s) for s in known) else spoken(sum(known))
    return what, labels, str(len(ends) - todo), str(todo), time
