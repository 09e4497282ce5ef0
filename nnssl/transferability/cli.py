"""``nnssl_transferability``: robustness of checkpoints on a dataset's images, run by run, and TIS where Dice is known."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence

from nnssl.command import check_device, run_command
from nnssl.grammar import CommandParser
from nnssl.options import add_options, from_args
from nnssl.plans import resolve_dataset
from nnssl.streams import show
from nnssl.transferability.compare import WHICH, CompareOptions, compare
from nnssl.transferability.evaluator import HOW
from nnssl.transferability.report import robustness_table, tis_table

log = logging.getLogger("nnssl")


def parser() -> CommandParser:
    """The command's arguments: those of :class:`CompareOptions`."""
    p = CommandParser(
        "nnssl_transferability",
        "CKPT [CKPT ...] -d DATASET [options]",
        "How far do checkpoints tell two altered copies of a case from other cases? Measured on a dataset's "
        "images without labels, per run, beside random initialisations. An indicator within a run; it ranks nothing across "
        "runs and replaces no fine-tuning.",
        "nnssl_transferability -d 501 RUN/checkpoint_*.pth",
    )
    add_options(p, CompareOptions, (WHICH, HOW))
    p.renamed("-o", "--output")
    p.renamed("--device", "-device")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    args = parser().parse_args(argv)
    return run_command(lambda: _body(args), args)


def _body(args: argparse.Namespace) -> int:
    check_device(args.device)
    args.output = args.output or f"transferability_{resolve_dataset(args.dataset)}"
    found = compare(**vars(from_args(CompareOptions, args)))
    show(robustness_table(found.runs, found.baseline))
    if found.tis:
        show("\n" + tis_table(found.tis))
    log.info("\nWritten: %s", ", ".join(map(str, found.files)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
