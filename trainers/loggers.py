"""The loggers of :mod:`nnssl.loggers` in nnU-Net's own list of loggers, chosen by the environment variable ``nnssl_logger``."""

from __future__ import annotations

import atexit
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nnssl.loggers import Logger, logger_names, open_loggers

_TIMES = ("epoch_start_timestamps", "epoch_end_timestamps")


class FineTuningLogger:
    """What nnU-Net's ``MetaLogger`` calls, passed on: numbers only, never plans, paths or lists of cases."""

    def __init__(self, inner: Logger) -> None:
        self.inner = inner
        self.finished = False  # whether the training has come to its end; logged when the process ends
        atexit.register(self.close)  # nnU-Net validates after the training's end, and tells the result

    def update_config(self, config: Mapping[str, Any]) -> None:
        """Plain values only."""
        plain = {k: v for k, v in config.items() if isinstance(v, (int, float, str))}
        if plain:
            self.inner.settings(plain)

    def log(self, key: str, value: Any, step: int) -> None:
        """A number of an epoch."""
        number = _number(value)
        if key not in _TIMES and number is not None:
            self.inner.log({f"finetuning/{key}": number}, step)

    def log_summary(self, key: str, value: Any) -> None:
        """A number that is logged once, such as the Dice of the final validation."""
        number = _number(value)
        if number is not None:
            self.inner.summary({key: number})

    def close(self) -> None:
        """End the run."""
        self.inner.close(self.finished)


def _number(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def add_loggers(trainer: Any, settings: Mapping[str, Any]) -> list[FineTuningLogger]:
    """Open the loggers that ``nnssl_logger`` names, on rank 0, and put them into the trainer's; with ``--c`` they go on.

    Weights & Biases is left to nnU-Net where ``nnUNet_wandb_enabled`` is set.

    Raises:
        NnsslError: an unknown name, a missing package, a program that refuses.
    """
    own_wandb = os.environ.get("nnUNet_wandb_enabled", "0") not in ("0", "false", "False")
    names = [name for name in logger_names() if not (name == "wandb" and own_wandb)]
    if trainer.local_rank != 0 or not names:
        return []
    folder = Path(trainer.output_folder)
    title = f"{folder.parent.name} {folder.name}"
    added = [FineTuningLogger(each) for each in open_loggers(names, folder, title, resume=trainer.logger.resume)]
    for each in added:
        each.update_config(settings)
    trainer.logger.loggers.extend(added)
    return added
