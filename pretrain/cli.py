"""The command ``nnssl_pretrain``: a thin shell over :func:`nnssl.pretrain.run`."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import textwrap
from collections.abc import Sequence
from importlib.metadata import entry_points
from typing import Any

from nnssl.command import run_command
from nnssl.errors import NnsslError, UsageError
from nnssl.grammar import CommandParser
from nnssl.options import add_options, from_args
from nnssl.pretrain.options import LENGTH, MACHINE, WHAT, RunOptions
from nnssl.streams import show
from nnssl.words import aligned


def parser() -> CommandParser:
    """The command's arguments: those of :class:`~nnssl.pretrain.options.RunOptions`, and what only a command line needs."""
    p = CommandParser(
        "nnssl_pretrain",
        "-d DATASET [DATASET ...] [-t TARGET] -m METHOD [options]",
        "Self-supervised pretraining of the network of a dataset's nnU-Net plans, on images without labels.",
        "nnssl_pretrain -d 500 -t 501 -m mae, then: nnUNetv2_train 501 3d_fullres 0 -tr nnUNetTrainerPretrained",
    )
    groups = add_options(p, RunOptions)
    groups[WHAT].add_argument("--list", action="store_true", help="list the objectives, or with -m all options of one")
    groups[LENGTH].add_argument(
        "--c",
        dest="go_on",
        action="store_true",
        help="continue the run in the output folder, with its saved configuration; with more --epochs than it had, lengthen it",
    )
    groups[LENGTH].add_argument(
        "--auto-continue",
        action="store_true",
        help="continue this very run where it has a checkpoint, else start it: for schedulers that start a command again",
    )
    machine = groups[MACHINE]
    machine.add_argument(
        "-num_gpus", type=int, default=1, metavar="N", help="GPUs of this machine to use, one process each (default: 1)"
    )
    machine.add_argument(
        "--restarts",
        type=int,
        default=0,
        metavar="N",
        help="with -num_gpus: times that all processes start again from the last checkpoint when one was killed (default: 0)",
    )
    machine.add_argument(
        "--preprocess-only", action="store_true", help="preprocess the images of -d and end; -m may be left out"
    )
    machine.add_argument(
        "--part",
        metavar="I/N",
        help="with --preprocess-only: only the I-th of N parts of the cases, one for each machine",
    )
    p.renamed("--device", "-device")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    p = parser()
    p.set_defaults(method=None)
    args = p.parse_args(arguments)
    if not args.list and (not args.sources or not (args.method or args.preprocess_only)):
        p.error("-d and -m are needed: which datasets to learn from, and how (--list names the objectives)")
    if args.part and not args.preprocess_only:
        p.error("--part needs --preprocess-only")
    return run_command(lambda: _body(args, arguments), args)


def _body(args: argparse.Namespace, arguments: list[str]) -> int:
    if args.list:
        show(_listing(args.method))
        return 0
    if args.preprocess_only:
        return _preprocess(args)
    if args.num_gpus < 1:
        raise UsageError(f"-num_gpus {args.num_gpus}: at least 1 is needed.")
    if args.restarts < 0:
        raise UsageError(f"--restarts {args.restarts}: 0 or more is needed.")
    if args.restarts and args.num_gpus == 1:
        raise UsageError(
            "--restarts needs -num_gpus: let what starts a single process start it again, with --auto-continue."
        )
    if args.num_gpus > 1 and "WORLD_SIZE" not in os.environ and not args.dry_run:
        return _several(args, arguments)
    options = from_args(RunOptions, args, continue_run="auto" if args.auto_continue and not args.go_on else args.go_on)
    from nnssl.pretrain.api import pretrain

    result = pretrain(options)
    return 0 if result.finished or args.dry_run else 128 + (result.signal or signal.SIGTERM)


def _preprocess(args: argparse.Namespace) -> int:
    from nnssl.pretrain.prepare.preparation import prepare
    from nnssl.pretrain.prepare.request import PrepareOptions

    prepare(from_args(PrepareOptions, args, target=args.target or args.labelled, part=args.part))
    return 0


def _several(args: argparse.Namespace, arguments: list[str]) -> int:
    from nnssl.pretrain.engine.devices import launch, pick_device

    device = pick_device(args.device)
    if device.type == "mps":
        raise NnsslError("-num_gpus: MPS has one device.")
    if device.type == "cuda":
        import torch

        if args.num_gpus > torch.cuda.device_count():
            raise NnsslError(f"-num_gpus {args.num_gpus}: this machine has {torch.cuda.device_count()}.")
    return launch(arguments, args.num_gpus, args.restarts)


def _listing(method: str | None) -> str:
    from nnssl.config import describe_options
    from nnssl.errors import did_you_mean
    from nnssl.pretrain.engine.config import EngineConfig
    from nnssl.pretrain.outline import outlines, source_value

    methods: dict[str, Any] = outlines()
    own = bool(method and method.endswith(".py"))
    if own or entry_points(group="nnssl.methods"):  # of others: these are imported, which takes seconds
        from nnssl.pretrain.methods import get_method, list_methods

        methods = dict(list_methods())
        if method and own:
            methods[method] = get_method(method)
    if method is None:
        rows = [f"  {name:10} {cls.title}" for name, cls in methods.items()]
        return "Methods (-m):\n" + "\n".join(rows) + "\n\nnnssl_pretrain --list -m METHOD shows a method's options.\n"
    if method not in methods:
        raise NnsslError(f"unknown method '{method}'.{did_you_mean(method, methods)} Known: {', '.join(methods)}.")
    cls = methods[method]
    omni = "nnssl.pretrain.omni.config"
    before, presets, omni_config = (source_value(omni, n) for n in ("PREFIX", "PRESETS", "OmniConfig"))
    lines = [f"{cls.name}: {cls.title}", *(f"  {c}" for c in cls.citation), ""]
    for title, config in (
        (f"Options of {cls.name} (-o key=value):", cls.Config),
        ("Options of the loop:", EngineConfig),
        ("Options with --labelled (-o omni.key=value; presets omni.preset=" + " or ".join(presets) + "):", omni_config),
    ):
        lines.append(title)
        prefix = before if config is omni_config else ""
        table = [(prefix + r[0], *r[1:]) for r in describe_options(config)]
        lines += [textwrap.indent(aligned(table, left=4), "  "), ""]
    parts = cls.default_transfer + (f" ({cls.transfer_reason})" if cls.transfer_reason else "")
    lines += [f"Segmentation networks get by default: {parts}; another choice: nnssl_plan --parts", ""]
    if cls.presets:
        lines.append("Presets (-o preset=NAME):")
        for name, values in cls.presets.items():
            lines.append(f"  {name}: " + ", ".join(f"{k}={v}" for k, v in values.items()))
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
