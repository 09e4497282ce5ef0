"""``nnssl_convert`` and ``nnssl_info``."""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Sequence
from pathlib import Path

from nnssl.command import run_command
from nnssl.errors import NnsslError
from nnssl.weights.formats import FORMATS, convert
from nnssl.weights.info import as_text, describe

__all__ = ["add_places", "convert_main", "info_main"]

log = logging.getLogger("nnssl")

_TRUST = "let the file run code while it is read (pickle); only for files whose origin you know"


def add_places(parser: argparse.ArgumentParser) -> None:
    """The options that say where nnU-Net's network lies in a file of others."""
    parser.add_argument(
        "--key", metavar="ENTRY", help="entry that holds the weights, where a file has several, such as teacher"
    )
    parser.add_argument("--prefix", metavar="TEXT", help="what stands before nnU-Net's names, where that is ambiguous")


def _convert(args: argparse.Namespace) -> None:
    form = args.to or ("safetensors" if Path(args.output).suffix == ".safetensors" else None)
    if form is None:
        raise NnsslError(f"--to is missing: {', '.join(FORMATS)}.")
    if (form == "safetensors") != (Path(args.output).suffix == ".safetensors"):
        raise NnsslError(
            f"{args.output}: a safetensors file, and only that, ends in .safetensors, so that it is read as one."
        )
    where = {"key": args.key, "prefix": args.prefix}
    read = convert(
        args.input, args.output, form, parts=args.parts, trusted=args.trust, overwrite=args.overwrite, **where
    )
    for line in read.told:
        log.info("%s: %s", args.input, line)
    log.info(f"Wrote {args.output} ({form})")


def convert_main(argv: Sequence[str] | None = None) -> int:
    """The command ``nnssl_convert``; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="nnssl_convert",
        allow_abbrev=False,
        description="Write a checkpoint of nnssl, of MIC-DKFZ's nnssl or of nnU-Net, or nnU-Net's network from a file of others, "
        "in another format. Weights stay bit-identical; states of training, logs and case names are left behind.",
    )
    parser.add_argument("input", help="file to read")
    parser.add_argument("output", help="file to write")
    parser.add_argument(
        "--to",
        choices=FORMATS,
        help="nnssl; upstream (MIC-DKFZ's nnssl, nnU-Net after 2.8.1); nnunet (-pretrained_weights); safetensors",
    )
    parser.add_argument(
        "--parts",
        choices=("promised", "encoder", "all"),
        default="promised",
        help="what is promised of a file of others: the encoder, or the decoder too (default: the encoder of a pretraining, "
        "both of a network that nnU-Net has trained)",
    )
    add_places(parser)
    parser.add_argument("--trust", action="store_true", help=_TRUST)
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")
    args = parser.parse_args(argv)
    return run_command(lambda: _convert(args))


def _info(args: argparse.Namespace) -> None:
    found = describe(args.file, trusted=args.trust, key=args.key, prefix=args.prefix)
    log.info(json.dumps(found, indent=2, default=str) if args.json else as_text(found))


def info_main(argv: Sequence[str] | None = None) -> int:
    """The command ``nnssl_info``; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="nnssl_info", allow_abbrev=False, description="Say what a checkpoint is and where it comes from."
    )
    parser.add_argument(
        "file", help="a checkpoint of nnssl, MIC-DKFZ's nnssl, nnU-Net or others, or a safetensors file"
    )
    parser.add_argument("--json", action="store_true", help="as JSON, for programs")
    add_places(parser)
    parser.add_argument("--trust", action="store_true", help=_TRUST)
    args = parser.parse_args(argv)
    return run_command(lambda: _info(args))
