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
from nnssl.streams import show
from nnssl.weights.formats import FORMATS, convert
from nnssl.weights.info import as_text, describe

log = logging.getLogger("nnssl")


def _convert(args: argparse.Namespace) -> None:
    form = args.to or ("safetensors" if Path(args.output).suffix == ".safetensors" else None)
    if form is None:
        raise UsageError(f"--to is missing: {', '.join(FORMATS)}.")
    if (form == "safetensors") != (Path(args.output).suffix == ".safetensors"):
        raise NnsslError(
            f"{args.output}: a safetensors file, and only that, ends in .safetensors, so that it is read as one."
        )
    where = {"key": args.key, "prefix": args.prefix}
    read = convert(
        args.input, args.output, form, parts=args.parts, trusted=args.trust, overwrite=args.overwrite, **where
    )
    for line in read.remarks:
        log.info("%s: %s", args.input, line)
    log.info(f"Wrote {args.output} ({form})")


def convert_parser() -> CommandParser:
    """The arguments of ``nnssl_convert``."""
    p = CommandParser(
        "nnssl_convert",
        "INPUT OUTPUT [--to FORMAT] [options]",
        "Write a checkpoint of nnssl, of MIC-DKFZ's nnssl or of nnU-Net, or nnU-Net's network from a file of others, "
        "in another format. Weights stay bit-identical; states of training, logs and case names are left behind.",
        "nnssl_convert FOLDER/checkpoint_final.pth weights.pth --to nnunet",
    )
    p.add_argument("input", metavar="INPUT", help="file to read")
    p.add_argument("output", metavar="OUTPUT", help="file to write")
    how = p.group("how")
    how.add_argument(
        "--to",
        choices=FORMATS,
        help="nnssl; upstream (MIC-DKFZ's nnssl, nnU-Net after 2.8.1); nnunet (-pretrained_weights); safetensors",
    )
    how.add_argument(
        "--parts",
        choices=("promised", "encoder", "all"),
        default="promised",
        metavar="PARTS",
        help="which parts of a file of others count as pretrained: encoder, or all, which is the decoder too (default: the "
        "encoder of a pretraining, both of a network that nnU-Net has trained)",
    )
    p.share(how, "key", "prefix", "trust")
    how.add_argument("--overwrite", action="store_true", help="replace an existing output")
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
