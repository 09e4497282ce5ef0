"""``nnssl_transferability``: robustness of checkpoints on a dataset's images, run by run, and TIS where Dice is known."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from nnssl.command import run_command
from nnssl.errors import NnsslError
from nnssl.plans import resolve_dataset
from nnssl.transferability.compare import compare
from nnssl.transferability.distances import DISTANCES
from nnssl.transferability.evaluator import RobustnessConfig
from nnssl.transferability.pooling import POOLINGS
from nnssl.transferability.report import robustness_table, tis_table
from nnssl.transferability.robustness import NEGATIVES
from nnssl.transferability.schedule import RANDOM_INITS

__all__ = ["main", "parser"]

log = logging.getLogger("nnssl")


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    default = RobustnessConfig()
    p = argparse.ArgumentParser(
        prog="nnssl_transferability",
        allow_abbrev=False,
        description="How far do checkpoints tell two altered copies of a case from other cases? Measured on a dataset's "
        "images without labels, per run, beside random initialisations. An indicator within a run; it ranks nothing across "
        "runs and replaces no fine-tuning.",
    )
    p.add_argument("checkpoints", nargs="+", metavar="CKPT", help="checkpoints of any number of runs")
    p.add_argument("-d", required=True, metavar="DATASET", help="number or name of the target dataset")
    p.add_argument("-c", default="3d_fullres", metavar="CONFIGURATION", help="configuration (default: %(default)s)")
    p.add_argument("-p", default="nnUNetPlans", metavar="PLANS", help="plans identifier (default: %(default)s)")
    p.add_argument("-o", metavar="FOLDER", help="for CSV and PNG (default: transferability_<Dataset> here)")
    p.add_argument("-device", default="cuda", choices=("cuda", "cpu", "mps"), help="default: cuda")
    p.add_argument("--cases", metavar="FILE", help="text file of the cases to measure on, one a line")
    p.add_argument("--crops", type=int, default=64, metavar="N", help="at most N cases (default: %(default)s)")
    p.add_argument("--dice", metavar="CSV", help="columns checkpoint, dice[, setup]: adds TIS with its baselines")
    p.add_argument("--random-inits", type=int, default=RANDOM_INITS, metavar="K", help="default: %(default)s")
    p.add_argument("--distance", default=default.distance, choices=DISTANCES, help="default: %(default)s")
    p.add_argument("--margin", type=float, default=default.margin, help="default: %(default)s")
    p.add_argument(
        "--level", type=int, default=default.level, help="encoder stage, -1: bottleneck (default: %(default)s)"
    )
    p.add_argument("--pooling", default=default.pooling, choices=POOLINGS, help="default: %(default)s")
    p.add_argument("--grid", type=int, default=default.grid, metavar="G", help="cells per axis (default: %(default)s)")
    p.add_argument("--negatives", default=default.negatives, choices=NEGATIVES, help="default: %(default)s")
    p.add_argument("--seed", type=int, default=0, help="of crops, views and initialisations (default: 0)")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    args = parser().parse_args(argv)
    return run_command(lambda: _body(args))


def _body(args: argparse.Namespace) -> int:
    if args.device == "cuda" and not torch.cuda.is_available():
        raise NnsslError("there is no CUDA device on this machine: add -device cpu.")
    dataset = resolve_dataset(args.d)
    found = compare(
        dataset,
        args.checkpoints,
        configuration=args.c,
        plans=args.p,
        cases=_case_list(args.cases),
        crops=args.crops,
        random_inits=args.random_inits,
        dice=args.dice,
        output=args.o or f"transferability_{dataset}",
        device=args.device,
        distance=args.distance,
        margin=args.margin,
        level=args.level,
        pooling=args.pooling,
        grid=args.grid,
        negatives=args.negatives,
        seed=args.seed,
    )
    sys.stdout.write(robustness_table(found.runs, found.baseline) + "\n")
    if found.tis:
        sys.stdout.write("\n" + tis_table(found.tis) + "\n")
    log.info("\nWritten: %s", ", ".join(map(str, found.files)))
    return 0


def _case_list(path: str | None) -> list[str] | None:
    if path is None:
        return None
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise NnsslError(f"--cases {path} cannot be read: {error}") from error
    names = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not names:
        raise NnsslError(f"--cases {path} names no case.")
    return names


if __name__ == "__main__":
    sys.exit(main())
