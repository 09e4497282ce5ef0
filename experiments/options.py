"""What ``nnssl_label_efficiency`` can be asked for, stated once: its parser and the arguments of a run.

Imports nothing heavy, so that ``--help`` is there at once.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

from nnssl.options import given

WHERE, WHAT = "where jobs run", "what is done"


@dataclass(frozen=True)
class Options:
    """The options of the command."""

    experiment: Path = given(
        ...,
        None,
        type=Path,
        metavar="EXPERIMENT.yaml",
        help="the experiment: dataset, methods, label counts, seeds; examples/label_efficiency has some",
    )
    device: str = given("cuda", WHERE, help="for training and prediction: cuda (default), cpu or mps")
    executor: str = given(
        "local", WHERE, "--executor", choices=("local", "slurm"), help="where jobs run (default: local)"
    )
    jobs: int | None = given(
        None, WHERE, "--jobs", type=int, metavar="N", help="jobs at a time (default: one per GPU, or one; slurm: 100)"
    )
    dry_run: bool = given(False, WHAT, help="only show the jobs, what exists already, and the estimated time")
    report_only: bool = given(
        False,
        WHAT,
        "--report-only",
        action="store_true",
        help="run nothing; write tables and report from what is there",
    )
    compare: Path | None = given(
        None,
        WHAT,
        "--compare",
        type=Path,
        metavar="FILE",
        help="CSV of published figures to put beside ours in the table",
    )
    output: Path | None = given(
        None, WHAT, type=Path, help="folder of the experiment (default: label_efficiency_<name> here)"
    )

    @property
    def command(self) -> str:
        """The command line, with every option that is not the default."""
        words = [str(self.experiment), *(["-device", self.device] if self.device != "cuda" else [])]
        words += ["--executor", self.executor] if self.executor != "local" else []
        for name in ("jobs", "compare", "output"):
            value = getattr(self, name)
            words += [] if value is None else [f"--{name}", str(value)]
        return shlex.join(["nnssl_label_efficiency", *words])
