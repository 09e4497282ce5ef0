"""Programs that show a run while it trains: TensorBoard, Weights & Biases, MLflow. One interface, three adapters.

They get numbers and settings only: no image, no case name, no path; their own telemetry is off unless the user turns it on.
The packages are optional and are imported when a logger is opened. Pretraining takes names from ``--logger``, fine-tuning (and
pretraining without the option) from the environment variable ``nnssl_logger``.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

from nnssl.errors import NnsslError
from nnssl.files import read_json, write_json

__all__ = ["LOGGERS", "VARIABLE", "Logger", "check_loggers", "installed", "logger_names", "open_loggers"]

log = logging.getLogger("nnssl")

VARIABLE = "nnssl_logger"
"""Names of loggers where no option gives them, separated by commas; ``none``: none."""

IDENTIFIERS = "loggers.json"
"""In a run's folder: what each program calls this run, so that a continued run is the same one there."""


class Logger:
    """Where numbers of a run go: an adapter whose failures give one warning and end no run."""

    def __init__(self, adapter: Any) -> None:
        self.name: str = adapter.name
        self._adapter = adapter

    def settings(self, values: Mapping[str, Any]) -> None:
        """What the run is: plain values by name."""
        self._tell("settings", values)

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Numbers at a step: optimiser steps done in pretraining, epochs in fine-tuning."""
        self._tell("log", values, step)

    def summary(self, values: Mapping[str, float | str]) -> None:
        """What is logged once, at the end."""
        self._tell("summary", values)

    def close(self, finished: bool) -> None:
        """Write what is left; ``finished`` is False for a run that was ended early. May be called twice."""
        self._tell("close", finished)

    def _tell(self, what: str, *values: Any) -> None:
        if self._adapter is None:
            return
        try:
            getattr(self._adapter, what)(*values)
        except Exception as error:  # noqa: BLE001  networks, disks, foreign code
            self._adapter = None
            log.warning("%s gets no more numbers (%s: %s); the run goes on.", self.name, type(error).__name__, error)


class _TensorBoard:
    """Event files in ``tensorboard/`` of the run's folder."""

    name: ClassVar[str] = "tensorboard"
    package: ClassVar[str] = "tensorboard"

    def __init__(self, folder: Path, title: str, identifier: str | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.identifier = None
        self._writer = SummaryWriter(str(folder / "tensorboard"))

    def settings(self, values: Mapping[str, Any]) -> None:
        rows = "\n".join(f"| {k} | {v} |" for k, v in values.items())
        self._writer.add_text("settings", f"| setting | value |\n|---|---|\n{rows}")

    def log(self, values: Mapping[str, float], step: int) -> None:
        for key, value in values.items():
            self._writer.add_scalar(key, value, step)

    def summary(self, values: Mapping[str, float | str]) -> None:
        for key, value in values.items():
            if isinstance(value, str):
                self._writer.add_text(key, value)
            else:
                self._writer.add_scalar(key, value, 0)

    def close(self, finished: bool) -> None:
        self._writer.close()


class _WandB:
    """Weights & Biases. Its own variables choose where to: ``WANDB_MODE=offline``, ``WANDB_PROJECT``, ``WANDB_API_KEY``."""

    name: ClassVar[str] = "wandb"
    package: ClassVar[str] = "wandb"

    def __init__(self, folder: Path, title: str, identifier: str | None) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        quiet: dict[str, Any] = {"console": "off", "disable_code": True, "disable_git": True, "x_disable_meta": True}
        settings = wandb.Settings(silent=True, **quiet)
        project = os.environ.get("WANDB_PROJECT", "nnssl")
        given: dict[str, Any] = {"id": identifier, "resume": "allow" if identifier else None}
        self._run = wandb.init(project=project, name=title, dir=str(folder), settings=settings, **given)
        self.identifier = self._run.id
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def settings(self, values: Mapping[str, Any]) -> None:
        self._run.config.update(dict(values), allow_val_change=True)

    def log(self, values: Mapping[str, float], step: int) -> None:
        # the step is a number of its own: wandb's counter may not go back, ours may
        self._run.log({"step": step, **values})

    def summary(self, values: Mapping[str, float | str]) -> None:
        self._run.summary.update(dict(values))

    def close(self, finished: bool) -> None:
        # offline, the run stays in wandb/ for "wandb sync"
        self._run.finish(exit_code=0 if finished else 1)


class _MLflow:
    """MLflow, where ``MLFLOW_TRACKING_URI`` says (``MLFLOW_EXPERIMENT_NAME``: nnssl), else in ``mlruns/`` of the folder."""

    name: ClassVar[str] = "mlflow"
    package: ClassVar[str] = "mlflow"

    def __init__(self, folder: Path, title: str, identifier: str | None) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        from mlflow.entities import Metric, Param
        from mlflow.tracking import MlflowClient

        self._metric, self._param = Metric, Param
        where = os.environ.get("MLFLOW_TRACKING_URI")
        if where is None:
            where = (folder / "mlruns").absolute().as_uri()
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        self._client = MlflowClient(tracking_uri=where)
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "nnssl")
        known = self._client.get_experiment_by_name(name)
        experiment = known.experiment_id if known is not None else self._client.create_experiment(name)
        if identifier is None:
            identifier = self._client.create_run(experiment, run_name=title).info.run_id
        else:
            self._client.update_run(identifier, status="RUNNING")
        self.identifier = identifier

    def settings(self, values: Mapping[str, Any]) -> None:
        # cut to the length that MLflow takes; those of a continued run are already there
        known = self._client.get_run(self.identifier).data.params
        new = {k: str(v)[:500] for k, v in values.items() if k not in known}
        self._client.log_batch(self.identifier, params=[self._param(_named(k), v) for k, v in new.items()])

    def log(self, values: Mapping[str, float], step: int) -> None:
        now = int(1000 * time.time())
        metrics = [self._metric(_named(k), float(v), now, step) for k, v in values.items()]
        self._client.log_batch(self.identifier, metrics=metrics)

    def summary(self, values: Mapping[str, float | str]) -> None:
        self.log({k: v for k, v in values.items() if not isinstance(v, str)}, 0)
        for key, value in values.items():
            if isinstance(value, str):
                self._client.set_tag(self.identifier, _named(key), value[:5000])

    def close(self, finished: bool) -> None:
        self._client.set_terminated(self.identifier, "FINISHED" if finished else "KILLED")


def _named(key: str) -> str:
    """MLflow takes letters, digits and ``_-. :/`` in names."""
    return "".join(c if c.isalnum() or c in "_-. :/" else "_" for c in key)


LOGGERS: dict[str, type[Any]] = {c.name: c for c in (_TensorBoard, _WandB, _MLflow)}
"""Adapters by name."""

ADVICE = {"wandb": " WANDB_MODE=offline keeps the run in its folder.", "mlflow": " See MLFLOW_TRACKING_URI."}
"""Where one could not be opened."""


def logger_names(given: str | Sequence[str] | None = None, default: Sequence[str] = ()) -> tuple[str, ...]:
    """Names of loggers: those given (``none``: none), else those of the variable ``nnssl_logger``, else ``default``.

    Raises:
        NnsslError: an unknown name.
    """
    asked = os.environ.get(VARIABLE) or None if given is None else given
    if asked is None:
        return tuple(default)
    parts = [asked] if isinstance(asked, str) else list(asked)
    names = [n.strip().lower() for part in parts for n in part.split(",") if n.strip()]
    where = "--logger" if given is not None else VARIABLE
    for name in names:
        if name not in LOGGERS and name != "none":
            raise NnsslError(f"{where} {name}: unknown. Known are {', '.join(LOGGERS)} and none.")
    if "none" in names and len(set(names)) > 1:
        raise NnsslError(f"{where} {','.join(names)}: none stands alone.")
    return tuple(dict.fromkeys(n for n in names if n != "none"))


def installed(name: str) -> bool:
    """Whether a logger's package is there."""
    spec = find_spec(LOGGERS[name].package)
    return spec is not None and spec.origin is not None  # a folder of that name, such as wandb/, is no package


def check_loggers(names: Sequence[str]) -> None:
    """Refuse loggers whose package is missing, before anything long begins.

    Raises:
        NnsslError: names the extra to install.
    """
    for name in names:
        if not installed(name):
            package = {"mlflow": "mlflow-skinny"}.get(name, name)
            raise NnsslError(
                f"logger {name}: its package is not installed. Type: pip install 'nnssl[{name}]' (or pip install {package})"
            )


def open_loggers(names: Sequence[str], folder: Path, title: str, *, resume: bool = False) -> list[Logger]:
    """Open loggers (:data:`LOGGERS`) for a run under its title; one process of a run calls this.

    With ``resume`` they go on with the run that this folder's loggers have begun.

    Raises:
        NnsslError: a package is missing, or the program refuses (no login, an address that does not answer).
    """
    check_loggers(names)
    known = read_json(folder / IDENTIFIERS) if resume and (folder / IDENTIFIERS).is_file() else {}
    opened: list[Logger] = []
    for name in names:
        try:
            logger = LOGGERS[name](folder, title, known.get(name))
        except Exception as error:  # noqa: BLE001  networks, logins, foreign code
            for other in opened:
                other.close(False)
            lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
            raise NnsslError(f"logger {name} could not be opened: {lines[0]}.{ADVICE.get(name, '')}") from error
        if logger.identifier is not None:
            known[name] = logger.identifier
        opened.append(Logger(logger))
    if known:
        write_json(folder / IDENTIFIERS, known)
    return opened
