"""``nnssl_convert`` and ``nnssl_info``."""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Sequence
from pathlib import Path

from nnssl.command import run_command
from nnssl.errors import NnsslError, UsageError
from nnssl.grammar import CommandParser
from nnssl.options import add_options, from_args
from nnssl.streams import show
from nnssl.weights.formats import FORMATS, ConvertOptions, run_convert
from nnssl.weights.info import as_text, describe

log = logging.getLogger("nnssl")


def _convert(args: argparse.Namespace) -> None:
    as_one = Path(args.target).suffix == ".safetensors"
    args.form = args.form or ("safetensors" if as_one else None)
    if args.form is None:
        raise UsageError(f"--to is missing: {', '.join(FORMATS)}.")
    if (args.form == "safetensors") != as_one:
        raise NnsslError(
            f"{args.target}: a safetensors file, and only that, ends in .safetensors, so that it is read as one."
        )
    for line in run_convert(from_args(ConvertOptions, args)).remarks:
        log.info("%s: %s", args.source, line)
    log.info("Wrote %s (%s)", args.target, args.form)


def convert_parser() -> CommandParser:
    """The arguments of ``nnssl_convert``."""
    p = CommandParser(
        "nnssl_convert",
        "INPUT OUTPUT [--to FORMAT] [options]",
        "Write a checkpoint of nnssl, of MIC-DKFZ's nnssl or of nnU-Net, or nnU-Net's network from a file of others, "
        "in another format. Weights stay bit-identical; states of training, logs and case names are left behind.",
        "nnssl_convert FOLDER/checkpoint_final.pth weights.pth --to nnunet",
    )
    add_options(p, ConvertOptions)
    return p


def convert_main(argv: Sequence[str] | None = None) -> int:
    """The command ``nnssl_convert``; returns the exit status."""
    args = convert_parser().parse_args(argv)
    return run_command(lambda: _convert(args), args)


def _info(args: argparse.Namespace) -> None:
    found = describe(args.file, trusted=args.trust, key=args.key, prefix=args.prefix)
    show(json.dumps(found, indent=2, default=str) if args.json else as_text(found))


def info_parser() -> CommandParser:
    """The arguments of ``nnssl_info``."""
    p = CommandParser(
        "nnssl_info",
        "FILE [options]",
        "Say what a checkpoint is and where it comes from.",
        "nnssl_info FOLDER/checkpoint_final.pth",
    )
    p.add_argument(
        "file",
        metavar="FILE",
        help="a checkpoint of nnssl, MIC-DKFZ's nnssl, nnU-Net or others, a safetensors file, or the folder of a run",
    )
    how = p.group("how")
    how.add_argument("--json", action="store_true", help="as JSON, for programs")
    p.share(how, "key", "prefix", "trust")
    return p


def info_main(argv: Sequence[str] | None = None) -> int:
    """The command ``nnssl_info``; returns the exit status."""
    args = info_parser().parse_args(argv)
    return run_command(lambda: _info(args), args)
