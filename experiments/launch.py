"""Runs one of the ordinary commands in this process: ``python -m nnssl.experiments.launch nnUNetv2_train 4 3d_fullres 0``.

It is what a job's process runs, and differs from typing the command in three things: the command need not be on the path,
nnU-Net finds the trainers of this package in any case, and on a CPU ``nnUNetv2_train`` keeps to ``OMP_NUM_THREADS``.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from nnssl.trainers.discovery import activate

EVALUATE = "nnssl_evaluate"
"""Name of the evaluation here; it has no console command of its own."""

COMMANDS = {
    "nnssl_pretrain": "nnssl.pretrain.cli:main",
    "nnssl_plan": "nnssl.plan_command:main",
    EVALUATE: "nnssl.experiments.evaluate:main",
    "nnUNetv2_train": "nnunetv2.run.run_training:run_training_entry",
    "nnUNetv2_predict": "nnunetv2.inference.predict_from_raw_data:predict_entry_point",
}
"""Name of each command -> where its function lies."""


def typed(command: Sequence[str]) -> tuple[str, ...]:
    """A job's command as it can be typed in a shell."""
    if command and command[0] == EVALUATE:
        return ("python", "-m", "nnssl.experiments.evaluate", *command[1:])
    return tuple(command)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that the first argument names; returns its exit status."""
    name, *arguments = sys.argv[1:] if argv is None else argv
    activate()
    threads = os.environ.get("OMP_NUM_THREADS", "")
    if name == "nnUNetv2_train" and threads.isdecimal() and int(threads) > 0:
        # nnU-Net asks for all cores on a CPU, whatever the variable says
        multiprocessing.cpu_count = lambda: int(threads)  # type: ignore[assignment]
    if name == "nnUNetv2_predict":
        from nnssl.experiments.evaluate import drop_unreadable

        drop_unreadable(Path(arguments[arguments.index("-o") + 1]))
    module, _, function = COMMANDS[name].partition(":")
    sys.argv = [name, *arguments]
    return int(getattr(import_module(module), function)() or 0)


if __name__ == "__main__":
    sys.exit(main())
