"""``nnssl_probe``: which checkpoint, and is it worth it? A linear layer on frozen features, beside random weights."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from dataclasses import replace

from nnssl.command import check_device, run_command
from nnssl.grammar import CommandParser
from nnssl.options import add_options, from_args
from nnssl.plans import resolve_dataset
from nnssl.probe.options import ProbeOptions
from nnssl.streams import show

log = logging.getLogger("nnssl")


def parser() -> CommandParser:
    """The command's arguments: those of :class:`~nnssl.probe.options.ProbeOptions`."""
    p = CommandParser(
        "nnssl_probe",
        "[CKPT ...] -d DATASET [options]",
        "What does a linear layer make of a checkpoint's frozen features on a few labelled cases, beside random "
        "weights? Which checkpoint to take, in about a minute for a small network on a CPU. It tells what the features hold; "
        "what a fine-tuning gains is another figure.",
        "nnssl_probe -d 501 mae=FOLDER/checkpoint_final.pth hdense=FOLDER2",
    )
    add_options(p, ProbeOptions)
    p.renamed("-o", "--output")
    p.renamed("--device", "-device")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    args = parser().parse_args(argv)
    return run_command(lambda: _body(args), args)


def _body(args: argparse.Namespace) -> int:
    from nnssl.probe.report import table
    from nnssl.probe.run import run_probe

    check_device(args.device)
    asked = from_args(ProbeOptions, args)
    dataset = resolve_dataset(asked.dataset)
    found = run_probe(replace(asked, dataset=dataset, output=asked.output or f"probe_{dataset}"))
    show("\n" + table(found) + "\n")
    for text in found.sentences:
        show(text)
    for text in found.warnings:
        log.warning("Warning: %s", text)
    log.info("\n%.0f s. Written: %s", found.seconds, ", ".join(map(str, found.files)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
