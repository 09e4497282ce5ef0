"""What happened to each job: a small file per job, and a lock that lasts as long as a process of the job does."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from nnssl import files
from nnssl.errors import NnsslError
from nnssl.experiments.jobs import Job
from nnssl.files import read_json, write_json


def try_lock(path: Path) -> IO[str] | None:
    """An open file with an exclusive lock, or None where somebody has it. Child processes that get the file keep the lock."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = open(path, "a+", encoding="utf-8")  # noqa: SIM115  the lock lives as long as the file is open
    if files.try_lock(file) is False:
        file.close()
        return None
    return file


def end_group(group: int, sign: int = signal.SIGTERM) -> bool:
    """Send a signal to a process group; False where there is none (any more)."""
    try:
        os.killpg(group, sign)
    except (ProcessLookupError, PermissionError, AttributeError):
        return False
    return True


_KINDS: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("status", "phase", "reason"), str),
    **dict.fromkeys(("started", "seconds", "amount"), (int, float)),
    "pid": int,
}


def _sound(content: dict[str, Any]) -> dict[str, Any]:
    """A record without what is not of its kind, as a hand may leave it: such a job is looked at anew."""
    out = {
        k: v for k, v in content.items() if k not in _KINDS or (isinstance(v, _KINDS[k]) and not isinstance(v, bool))
    }
    return out if 0 < out.get("pid", 1) < 1 << 31 else {k: v for k, v in out.items() if k != "pid"}


class Records:
    """The records of an output folder: ``jobs/<id>.json``, ``jobs/<id>.lock``, ``logs/<id>.log``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._cache: dict[str, dict[str, Any]] = {}

    def log(self, job_id: str) -> Path:
        """The log of a job; all its starts append to it."""
        return self.folder / "logs" / f"{job_id}.log"

    def lock(self, job_id: str) -> Path:
        """The lock file of a job."""
        return self.folder / "jobs" / f"{job_id}.lock"

    def read(self, job_id: str) -> dict[str, Any]:
        """The record of a job; empty where it was never started."""
        if job_id not in self._cache:
            file = self.folder / "jobs" / f"{job_id}.json"
            content: dict[str, Any] = {}
            if file.is_file():
                with suppress(NnsslError):
                    content = _sound(read_json(file))
            self._cache[job_id] = content
        return dict(self._cache[job_id])

    def write(self, job_id: str, **changes: Any) -> None:
        """Change the record of a job."""
        content = {**self.read(job_id), **changes}
        folder = self.folder / "jobs"
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / f"{job_id}.json", content)
        self._cache[job_id] = content

    def finished(self, job: Job) -> bool:
        """Whether a job need not be run: its outputs are there and, where they may be half written, its record says so."""
        if job.recorded and self.read(job.id).get("status") != "done":
            return False
        return all(path.is_file() for path in job.outputs)

    def last_line(self, job_id: str) -> str:
        """The last line of a job's log that says something; empty where there is none."""
        file = self.log(job_id)
        if not file.is_file():
            return ""
        with file.open("rb") as handle:
            handle.seek(max(0, file.stat().st_size - 20_000))
            text = handle.read().decode(errors="replace")
        lines = [line.rsplit("\r", 1)[-1].strip() for line in text.split("\n")]
        return next((line for line in reversed(lines) if line), "")
