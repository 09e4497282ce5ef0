"""Runs jobs that need each other: some at a time, going on where one fails, and where it was after a kill."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from nnssl.command import stop_on_signals
from nnssl.experiments.jobs import Job
from nnssl.experiments.records import Records, end_group, try_lock

log = logging.getLogger("nnssl")

LAUNCHER = (sys.executable, "-m", "nnssl.experiments.launch")
POLL_SECONDS = 0.2
GRACE_SECONDS = 60.0
"""For jobs to save after they were asked to end."""
KILL = getattr(signal, "SIGKILL", signal.SIGTERM)  # Windows has no SIGKILL


class Handle(Protocol):
    """A job that runs somewhere."""

    def poll(self) -> int | None:
        """Exit status, or None while it runs."""

    def stop(self, wait: bool) -> None:
        """Ask it to end; with ``wait`` return once it has."""


class Backend(Protocol):
    """Where jobs run."""

    def start(self, job: Job, slot: int) -> Handle:
        """Start a job."""


@dataclass
class Outcome:
    """What became of the jobs, by id: finished before, done now, failed (with the reason), blocked (with the failed job that they
    need)."""

    finished: list[str] = field(default_factory=list)
    done: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    blocked: dict[str, str] = field(default_factory=dict)


def full_command(job: Job) -> tuple[str, ...]:
    """The job's command, with ``--c`` where it was begun before."""
    return (*job.command, "--c") if any(path.is_file() for path in job.resume) else job.command


class _Process:
    """A process of ours."""

    def __init__(self, process: subprocess.Popen) -> None:
        self.process, self.poll = process, process.poll

    def stop(self, wait: bool) -> None:
        end_group(self.process.pid)
        if not wait:
            return
        try:
            self.process.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            end_group(self.process.pid, KILL)
            self.process.wait()


class _Left:
    """A process that an earlier start left running: it is waited for, by its lock; how it ended nobody knows."""

    def __init__(self, lock: Path, started: float | None) -> None:
        self.lock, self.age = lock, max(0.0, time.time() - started) if started else 0.0

    def poll(self) -> int | None:
        file = try_lock(self.lock)
        if file is None:
            return None
        file.close()
        return 0

    def stop(self, wait: bool) -> None:
        """It was not started here and is left alone."""


class LocalBackend:
    """Jobs on this machine, each in a process group of its own with its own log; slot ``i`` has ``gpus[i]``, if there are any."""

    def __init__(
        self,
        records: Records,
        environment: Mapping[str, str] | None = None,
        gpus: Sequence[str] = (),
        launcher: Sequence[str] = LAUNCHER,
    ) -> None:
        self.records, self.gpus, self.launcher = records, list(gpus), list(launcher)
        self.environment = {**os.environ, "PYTHONUNBUFFERED": "1", **(environment or {})}

    def start(self, job: Job, slot: int) -> Handle:
        """Start a job, or take over the process that an earlier start left running."""
        path, record = self.records.lock(job.id), self.records.read(job.id)
        lock = try_lock(path)
        if lock is None:
            pid = int(record.get("pid") or 0)
            if pid and _alive(pid):
                log.info("%s is still running from an earlier start (process %d): waiting for it.", job.id, pid)
                return _Left(path, record.get("started"))
            if pid:
                end_group(pid, KILL)
            lock = _wait_for_lock(path)
            if lock is None:
                return _Left(path, None)
        file = self.records.log(job.id)
        file.parent.mkdir(parents=True, exist_ok=True)
        command = full_command(job)
        environment = dict(self.environment)
        if self.gpus and job.gpu:
            environment["CUDA_VISIBLE_DEVICES"] = self.gpus[slot % len(self.gpus)]
        with file.open("ab") as out, lock:
            out.write(f"$ {' '.join(command)}\n".encode())
            out.flush()
            process = subprocess.Popen(
                [*self.launcher, *command], env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT,
                start_new_session=True, pass_fds=[lock.fileno()] if os.name == "posix" else (),
            )  # fmt: skip
        self.records.write(job.id, status="running", pid=process.pid, started=time.time(), command=list(command))
        return _Process(process)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    with suppress(OSError, IndexError):
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] != "Z"
    return True


def _wait_for_lock(path: Path) -> Any:
    """The lock of a job whose processes were just killed."""
    for _ in range(50):
        lock = try_lock(path)
        if lock is not None:
            return lock
        time.sleep(0.1)
    return None


@dataclass
class _Running:
    """A job that runs, in one of the slots."""

    job: Job
    slot: int
    handle: Handle
    records: Records
    begin: float = field(default_factory=time.monotonic)

    def record(self, **changes: Any) -> None:
        """Write down what became of it, and the time of all its starts."""
        age = self.handle.age if isinstance(self.handle, _Left) else 0.0
        spent = float(self.records.read(self.job.id).get("seconds") or 0.0) + time.monotonic() - self.begin + age
        self.records.write(self.job.id, seconds=spent, phase=self.job.phase, **changes)


def run_jobs(
    jobs: Iterable[Job],
    records: Records,
    backend: Backend,
    slots: int = 1,
    on_end: Callable[[Job, Outcome], None] | None = None,
) -> Outcome:
    """Run what is not finished, in the given order (each after those that it needs) as far as needs and slots allow.

    A job fails where its exit status is not 0 or an output is missing; those that need it are blocked, all others go on. One that
    an earlier start left running and that ended without its outputs is started again. ``on_end`` is called after each end.
    """
    jobs = list(jobs)
    outcome = Outcome(finished=[job.id for job in jobs if records.finished(job)])
    waiting = {job.id: job for job in jobs if job.id not in set(outcome.finished)}
    running: list[_Running] = []
    free = list(range(slots))[::-1]
    with stop_on_signals():
        try:
            while waiting or running:
                _block(waiting, outcome)
                for job in _ready(waiting, outcome, len(free)):
                    log.info("%s: %s", job.id, job.shown)
                    slot = free.pop()
                    running.append(_Running(job, slot, backend.start(job, slot), records))
                    del waiting[job.id]
                ended = [(run, status) for run in running if (status := run.handle.poll()) is not None]
                for run, status in ended:
                    running.remove(run)
                    free.append(run.slot)
                    if isinstance(run.handle, _Left) and _missing(
                        run.job
                    ):  # killed late, or failed: a start of our own tells
                        log.info("%s has ended without its outputs: it is started again.", run.job.id)
                        run.record(status="stopped")
                        waiting = {run.job.id: run.job, **waiting}
                        continue
                    _settle(run, status, outcome)
                    if on_end is not None:
                        on_end(run.job, outcome)
                if running and not ended:
                    time.sleep(POLL_SECONDS)
        except BaseException:
            for wait in (False, True):
                for run in running:
                    run.handle.stop(wait)
            for run in running:
                if not isinstance(run.handle, _Left):  # that one goes on, and its record with it
                    run.record(status="stopped")
            raise
    return outcome


def _missing(job: Job) -> list[Path]:
    return [path for path in job.outputs if not path.is_file()]


def _ready(waiting: Mapping[str, Job], outcome: Outcome, number: int) -> list[Job]:
    there = {*outcome.finished, *outcome.done}
    return [job for job in waiting.values() if there.issuperset(job.needs)][:number]


def _block(waiting: dict[str, Job], outcome: Outcome) -> None:
    """Take out what needs a job that failed; each stands after those that it needs."""
    for job in list(waiting.values()):
        gone = [need for need in job.needs if need in outcome.failed or need in outcome.blocked]
        if gone:
            outcome.blocked[job.id] = outcome.blocked.get(gone[0], gone[0])
            del waiting[job.id]


def _settle(run: _Running, status: int, outcome: Outcome) -> None:
    job, missing = run.job, _missing(run.job)
    if status == 0 and not missing:
        run.record(status="done", amount=job.amount, returncode=0)
        outcome.done.append(job.id)
        return
    reason = f"exit status {status}" if status else f"{missing[0]} is missing though the command ended well"
    last = run.records.last_line(job.id)
    reason = f"{reason}: {last}" if last else reason
    run.record(status="failed", returncode=status, reason=reason)
    outcome.failed[job.id] = reason
    log.warning("%s FAILED (%s). Its log: %s. The others go on.", job.id, reason, run.records.log(job.id))


def settle_lost(jobs: Iterable[Job], records: Records) -> None:
    """Put right the records of jobs that ended while nobody looked: the program was killed beside them or before.

    Their time runs to the last sign of life, in log or outputs. A job that was killed after all that it is for was written (a
    training in its validation, where test cases decide) is done.
    """
    for job in jobs:
        record = records.read(job.id)
        status, pid = record.get("status"), int(record.get("pid") or 0)
        whole = not job.recorded and not _missing(job)
        if status == "running" and pid and not _alive(pid):
            started = float(record.get("started") or 0.0)
            signs = [p.stat().st_mtime for p in (records.log(job.id), *job.outputs) if p.is_file()]
            spent = float(record.get("seconds") or 0.0) + max(0.0, max(signs, default=started) - started)
            record = {"status": "stopped", "seconds": spent, "phase": job.phase}
        elif not (whole and status in ("stopped", "failed")):
            continue
        done = {"status": "done", "amount": job.amount, "phase": job.phase, "reason": ""} if whole else {}
        records.write(job.id, **{**record, **done})
