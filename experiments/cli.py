"""``nnssl_label_efficiency``: from an experiment file to tables with error bars."""

from __future__ import annotations

from collections.abc import Sequence

from nnssl.command import run_command
from nnssl.experiments.options import Options
from nnssl.grammar import CommandParser
from nnssl.options import add_options, from_args


def parser() -> CommandParser:
    """The command's arguments: those of :class:`~nnssl.experiments.options.Options`."""
    p = CommandParser(
        "nnssl_label_efficiency",
        "EXPERIMENT.yaml [options]",
        "Compare pretrainings and scratch with few labels: runs what is missing of an experiment and writes its "
        "tables, curves and report. The same command continues where it was.",
        "nnssl_label_efficiency prostate.yaml --dry-run",
    )
    add_options(p, Options)
    p.renamed("--device", "-device")
    p.renamed("-n", "--jobs")
    p.renamed("-o", "--output")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Console entry point; returns the exit status: 1 where a job failed."""
    args = parser().parse_args(argv)

    def body() -> int:
        from nnssl.experiments.run import run_experiment

        return 1 if run_experiment(from_args(Options, args)).failed else 0

    return run_command(body, args)
