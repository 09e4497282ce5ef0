"""Runs what is missing of an experiment, and keeps its tables and its report up to date."""

from __future__ import annotations

import logging
import math
import os

from nnssl.errors import NnsslError
from nnssl.experiments import report
from nnssl.experiments.collect import collect
from nnssl.experiments.dry_run import show
from nnssl.experiments.estimate import estimate_jobs
from nnssl.experiments.evaluate import need_surface_library
from nnssl.experiments.executor import Backend, LocalBackend, Outcome, run_jobs, settle_lost
from nnssl.experiments.jobs import Job
from nnssl.experiments.options import Options
from nnssl.experiments.records import try_lock
from nnssl.experiments.session import Session, open_session
from nnssl.files import remove_temporary
from nnssl.words import counted, spoken

log = logging.getLogger("nnssl")


def _gpus() -> list[str]:
    """The GPUs that jobs are spread over, as ``CUDA_VISIBLE_DEVICES`` names them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named:
        return [n.strip() for n in named.split(",") if n.strip()]
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count == 0:
        raise NnsslError(
            "no CUDA device is available. On a machine without a GPU add -device cpu, with a small network (see network:)."
        )
    return [str(i) for i in range(count)]


def _report(session: Session, *, last: bool) -> None:
    """Write the report; while jobs run, a fault in it gives a warning and does not stop them."""
    try:
        report.write(session.folder, session.published)
    except Exception as error:  # noqa: BLE001  a fault of the report must not end days of training
        if last:
            raise
        log.warning("The report could not be written now (%s: %s); the jobs go on.", type(error).__name__, error)


def run_experiment(options: Options, backend: Backend | None = None) -> Outcome:
    """What the command does; ``backend`` is where jobs run, in place of ``options.executor``.

    Raises:
        NnsslError: a fault in the file, missing data, another process at work in the output folder.
    """
    session = open_session(options)
    if options.dry_run:
        session.write_inputs()
        show(session, options.jobs or 1)
        return Outcome(finished=session.earlier().finished)
    need_surface_library()
    lock = try_lock(session.folder / ".lock")
    if lock is None and options.report_only:
        log.info("Another process is at work in this folder; this report shows what is there by now.")
        return _finish(session, session.earlier())
    if lock is None:
        raise NnsslError(
            f"another process is at work in {session.folder}. Wait for it, or choose another folder with --output."
        )
    with lock:
        for place in (
            session.folder,
            *(p for p in session.folder.glob("*") if p.is_dir()),
        ):  # whoever wrote them is dead
            remove_temporary(place)
        settle_lost(session.graph.jobs.values(), session.records)
        session.write_inputs()
        run = session.pending and not options.report_only
        return _finish(session, _run(session, options, backend) if run else session.earlier())


def _run(session: Session, options: Options, backend: Backend | None) -> Outcome:
    """Run what is not finished."""
    pending, slots = session.pending, 1
    environment = session.experiment.environment
    if backend is None and options.executor == "slurm":
        from nnssl.experiments.slurm import SlurmBackend

        backend, slots = SlurmBackend(session.records, session.experiment.slurm, environment), 100
    elif backend is None:
        gpus = _gpus() if session.device == "cuda" and any(job.gpu for job in pending) else []
        backend, slots = LocalBackend(session.records, environment, gpus), max(1, len(gpus))
    slots = options.jobs or slots
    jobs = session.graph.jobs
    log.info("%d of %d jobs to do, %d at a time. Logs: %s", len(pending), len(jobs), slots, session.folder / "logs")
    return run_jobs(jobs.values(), session.records, backend, slots, _Watch(session, slots))


def _finish(session: Session, outcome: Outcome) -> Outcome:
    """Write tables and report, and tell how it ended."""
    done = collect(session, outcome)
    _report(session, last=True)
    runs, page = len(session.graph.runs), session.folder / "report.html"
    log.info("%d of %d fine-tunings are evaluated. Report: %s", done, runs, page)
    if outcome.failed:
        failed = counted(len(outcome.failed), "job")
        lines = [f"  {i}: {reason}\n    log: {session.records.log(i)}" for i, reason in outcome.failed.items()]
        told = [f"{failed} failed, {len(outcome.blocked)} that need them were not run:", *lines]
        log.warning("%s\nThe same command tries them again.", "\n".join(told))
    return outcome


class _Watch:
    """Tells each end of a job with what is left, and writes the tables anew whenever all methods of one draw are through."""

    def __init__(self, session: Session, slots: int) -> None:
        self.session, self.slots = session, slots
        self.through: set[tuple] = set()

    def __call__(self, job: Job, outcome: Outcome) -> None:
        """Look at the jobs and groups after a job has ended."""
        self._tell(job, outcome)
        ended = {*outcome.finished, *outcome.done, *outcome.failed, *outcome.blocked}
        runs = self.session.graph.runs
        groups = {run.group for run in runs}
        new = groups - {run.group for run in runs if run.jobs[-1] not in ended} - self.through
        if not new or job.phase != "evaluate":
            return
        self.through |= new
        collect(self.session, outcome)
        _report(self.session, last=False)
        through = counted(len(self.through), "draw is", "draws are")
        table = self.session.folder / "table.md"
        log.info("%s of %d evaluated for all methods; tables: %s", through, len(groups), table)

    def _tell(self, job: Job, outcome: Outcome) -> None:
        """``train-... done in 3 min: 23 of 34, about 40 min left``."""
        graph, records = self.session.graph, self.session.records
        over = {*outcome.finished, *outcome.done}
        gone = {*outcome.failed, *outcome.blocked}
        left = [j for j in graph.jobs.values() if j.id not in over | gone]
        seconds = estimate_jobs(graph, records, left, self.session.device, timed=False).seconds.values()
        known = [s for s in seconds if not math.isnan(s)]
        word = "about" if len(known) == len(left) else "more than"
        time = f", {word} {spoken(sum(known) / self.slots)} left" if known else ", time unknown yet" if left else ""
        how = "done" if job.id in over else "FAILED"
        took = spoken(float(records.read(job.id).get("seconds") or 0.0))
        bad = f", {len(gone)} failed or not run" if gone else ""
        log.info("%s %s in %s: %d of %d%s%s", job.id, how, took, len(over), len(graph.jobs), bad, time)
