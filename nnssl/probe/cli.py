"""``nnssl_probe``: which checkpoint, and is it worth it? A linear layer on frozen features, beside random weights."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence

import torch

from nnssl.command import run_command
from nnssl.errors import NnsslError
from nnssl.plans import resolve_dataset
from nnssl.probe.report import table
from nnssl.probe.run import RANDOM_INITS, probe

__all__ = ["main", "parser"]

log = logging.getLogger("nnssl")


def _pair(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not (key and equals and value):
        raise argparse.ArgumentTypeError(f"'{text}' is not of the form kind=how, such as channels=repeat")
    return key, value


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    p = argparse.ArgumentParser(
        prog="nnssl_probe",
        allow_abbrev=False,
        description="What does a linear layer make of a checkpoint's frozen features on a few labelled cases, beside random "
        "weights? Which checkpoint to take, in about a minute for a small network on a CPU. It tells what the features hold; "
        "what a fine-tuning gains is another figure.",
    )
    p.add_argument(
        "checkpoints",
        nargs="*",
        metavar="CKPT",
        help="file, folder of a run, or NAME=FILE (default: the one that the plan names and all finished pretrainings for it)",
    )
    p.add_argument("-d", required=True, metavar="DATASET", help="number or name of the labelled dataset")
    p.add_argument("-c", default="3d_fullres", metavar="CONFIGURATION", help="configuration (default: %(default)s)")
    p.add_argument("-p", default="nnUNetPlans", metavar="PLANS", help="plans identifier (default: %(default)s)")
    p.add_argument(
        "-f", default="all", metavar="FOLD", help="fold that labelled cases come from (default: %(default)s)"
    )
    p.add_argument("-device", default="cuda", choices=("cuda", "cpu", "mps"), help="default: cuda")
    p.add_argument(
        "-o", metavar="FOLDER", help="for probe.json, probe.csv and probe.png (default: probe_<Dataset> here)"
    )
    p.add_argument(
        "--labels",
        metavar="N|P%%|FILE",
        help="labelled cases: a number, a share, or a file (default: those of the plan variant, else all, at most 16)",
    )
    p.add_argument(
        "--evaluate",
        default="loo",
        metavar="loo|val|FILE",
        help="leave each labelled case out once; or fit on all and score the validation cases (of fold all: those that are "
        "not labelled), or the cases that a file names (default: %(default)s)",
    )
    p.add_argument("--random-inits", type=int, default=RANDOM_INITS, metavar="K", help="default: %(default)s")
    p.add_argument("--seed", type=int, default=0, help="of labelled cases, voxels and random weights (default: 0)")
    p.add_argument(
        "--step",
        type=float,
        default=0.75,
        help="distance of sliding windows, share of the patch (default: %(default)s)",
    )
    p.add_argument(
        "--adapt",
        type=_pair,
        nargs="+",
        action="extend",
        default=[],
        metavar="KIND=HOW",
        help="as in nnssl_plan: channels=repeat|first|skip, kernels=average|centre, depth=match",
    )
    p.add_argument("--coverage", type=float, metavar="SHARE", help="as in nnssl_plan, with --adapt")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    args = parser().parse_args(argv)
    return run_command(lambda: _body(args))


def _body(args: argparse.Namespace) -> int:
    if args.device == "cuda" and not torch.cuda.is_available():
        raise NnsslError("there is no CUDA device on this machine: add -device cpu.")
    dataset = resolve_dataset(args.d)
    found = probe(
        dataset,
        args.checkpoints,
        configuration=args.c,
        plans=args.p,
        labels=args.labels,
        fold=args.f,
        evaluate=args.evaluate,
        random_inits=args.random_inits,
        seed=args.seed,
        step=args.step,
        adapt=dict(args.adapt),
        coverage=args.coverage,
        device=args.device,
        output=args.o or f"probe_{dataset}",
    )
    sys.stdout.write("\n" + table(found) + "\n\n")
    for text in (*found.sentences, *(f"Warning: {w}" for w in found.warnings)):
        log.info(text)
    log.info("\n%.0f s. Written: %s", found.seconds, ", ".join(map(str, found.files)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
