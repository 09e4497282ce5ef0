"""Jobs on a Slurm cluster, through submitit: one submission per job, sent once what it needs is finished."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nnssl.errors import NnsslError
from nnssl.experiments.executor import LAUNCHER, Handle, full_command
from nnssl.experiments.jobs import Job
from nnssl.experiments.records import Records


def run_command_line(command: Sequence[str], environment: Mapping[str, str], log: str) -> int:
    """What runs on the node: the command with its output in the log. Returns its exit status."""
    with open(log, "ab") as out:
        out.write(f"$ {' '.join(command)}\n".encode())
        out.flush()
        return subprocess.call(
            command, env={**os.environ, **environment}, stdin=subprocess.DEVNULL, stdout=out, stderr=out
        )


class _Submitted:
    """A job of submitit."""

    def __init__(self, job: Any) -> None:
        self.job = job

    def poll(self) -> int | None:
        if not self.job.done():
            return None
        try:
            return int(self.job.result())
        except Exception:  # noqa: BLE001  cancelled, out of time, lost node: submitit's own and Slurm's errors
            return 1

    def stop(self, wait: bool) -> None:
        """Submitted jobs go on; the next start of the experiment finds them."""


class SlurmBackend:
    """Submits jobs; a job that an earlier start submitted is waited for and not sent twice. All nodes must see the output folder.

    ``parameters`` are submitit's, for example ``{"slurm_partition": "gpu", "timeout_min": 1440}``; ``cluster`` None finds it out.
    """

    def __init__(
        self,
        records: Records,
        parameters: Mapping[str, Any] | None = None,
        environment: Mapping[str, str] | None = None,
        cluster: str | None = "slurm",
        launcher: Sequence[str] = LAUNCHER,
    ) -> None:
        try:
            import submitit
        except ImportError:
            raise NnsslError(
                "--executor slurm needs the package submitit. Type: pip install 'nnssl[slurm]' (or pip install submitit)"
            ) from None
        self.submitit, self.records, self.environment = submitit, records, dict(environment or {})
        self.launcher, self.cluster = list(launcher), cluster
        self.folder = Path(os.path.abspath(records.folder / "slurm"))
        self.parameters = {"timeout_min": 1440, **(parameters or {})}

    def _executor(self, job: Job) -> Any:
        try:
            executor = self.submitit.AutoExecutor(folder=str(self.folder), cluster=self.cluster)
            gpus = {} if "slurm_gres" in self.parameters or "gpus_per_node" in self.parameters else {"gpus_per_node": 1}
            executor.update_parameters(name=job.id[:100], **self.parameters, **(gpus if job.gpu else {}))
        except (RuntimeError, ValueError, TypeError, NameError, AssertionError) as error:
            raise NnsslError(
                f"--executor slurm: submitit refuses: {error}. See 'slurm:' in the experiment file."
            ) from error
        return executor

    def start(self, job: Job, slot: int) -> Handle:
        """Submit a job, or find the submission of an earlier start."""
        old = self.records.read(job.id)
        if old.get("status") in ("running", "stopped") and old.get("slurm_id"):
            return _Submitted(self.submitit.SlurmJob(folder=str(self.folder), job_id=str(old["slurm_id"])))
        log = self.records.log(job.id)
        log.parent.mkdir(parents=True, exist_ok=True)
        command = full_command(job)
        sent = self._executor(job).submit(
            run_command_line, [*self.launcher, *command], {**self.environment}, os.path.abspath(log)
        )
        self.records.write(job.id, status="running", slurm_id=str(sent.job_id), command=list(command))
        return _Submitted(sent)
