"""``nnssl_transferability``: robustness of checkpoints on a dataset's images, run by run, and TIS where Dice is known."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from nnssl.case_lists import read_case_list
from nnssl.command import check_device, run_command
from nnssl.grammar import CommandParser
from nnssl.plans import resolve_dataset
from nnssl.streams import show
from nnssl.transferability.compare import compare
from nnssl.transferability.distances import DISTANCES
from nnssl.transferability.evaluator import RobustnessConfig
from nnssl.transferability.pooling import POOLINGS
from nnssl.transferability.report import robustness_table, tis_table
from nnssl.transferability.robustness import NEGATIVES
from nnssl.transferability.schedule import RANDOM_INITS

log = logging.getLogger("nnssl")


def parser() -> CommandParser:
    """The command's arguments."""
    default = RobustnessConfig()
    p = CommandParser(
        "nnssl_transferability",
        "CKPT [CKPT ...] -d DATASET [options]",
        "How far do checkpoints tell two altered copies of a case from other cases? Measured on a dataset's "
        "images without labels, per run, beside random initialisations. An indicator within a run; it ranks nothing across "
        "runs and replaces no fine-tuning.",
        "nnssl_transferability -d 501 RUN/checkpoint_*.pth",
    )
    p.add_argument("checkpoints", nargs="+", metavar="CKPT", help="checkpoints of any number of runs")
    what = p.group("which cases")
    p.share(what, "dataset", required=True, help="number or name of the target dataset")
    p.share(what, "configuration", "plans")
    p.share(what, "cases", help="text file of the cases to measure on, one a line")
    what.add_argument(
        "--crops", type=int, default=64, metavar="N", help="cases to measure on, one crop of each (default: 64)"
    )
    what.add_argument(
        "--dice",
        metavar="CSV",
        help="columns checkpoint, dice[, setup]: shows how well robustness ranks the checkpoints, beside simple guesses",
    )
    how = p.group("how")
    p.share(how, "device")
    p.share(
        how, "random_inits", default=RANDOM_INITS, help=f"random networks to compare with (default: {RANDOM_INITS})"
    )
    how.add_argument(
        "--distance",
        default=default.distance,
        choices=DISTANCES,
        help=f"distance of two embeddings (default: {default.distance})",
    )
    how.add_argument(
        "--margin",
        type=float,
        default=default.margin,
        metavar="M",
        help=f"by how much farther other cases should be than the same case (default: {default.margin:g})",
    )
    how.add_argument(
        "--level",
        type=int,
        default=default.level,
        metavar="STAGE",
        help=f"encoder stage, counted from 0, or from the bottleneck: -1, -2, ... (default: {default.level})",
    )
    how.add_argument(
        "--pooling",
        default=default.pooling,
        choices=POOLINGS,
        help=f"pooling of a stage's features (default: {default.pooling})",
    )
    how.add_argument(
        "--grid",
        type=int,
        default=default.grid,
        metavar="G",
        help=f"with --pooling grid: parts into which each axis is divided (default: {default.grid})",
    )
    how.add_argument(
        "--negatives",
        default=default.negatives,
        choices=NEGATIVES,
        help=f"what counts as other cases (default: {default.negatives})",
    )
    p.share(how, "seed", help="random seed of crops, views and initialisations (default: 0)")
    p.share(how, "output", help="folder for CSV and PNG (default: transferability_<Dataset> here)")
    p.renamed("-o", "--output")
    p.renamed("--device", "-device")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    args = parser().parse_args(argv)
    return run_command(lambda: _body(args), args)


def _body(args: argparse.Namespace) -> int:
    check_device(args.device)
    dataset = resolve_dataset(args.dataset)
    found = compare(
        dataset,
        args.checkpoints,
        configuration=args.configuration,
        plans=args.plans,
        cases=read_case_list(Path(args.cases), "--cases") if args.cases else None,
        crops=args.crops,
        random_inits=args.random_inits,
        dice=args.dice,
        output=args.output or f"transferability_{dataset}",
        device=args.device,
        distance=args.distance,
        margin=args.margin,
        level=args.level,
        pooling=args.pooling,
        grid=args.grid,
        negatives=args.negatives,
        seed=args.seed,
    )
    show(robustness_table(found.runs, found.baseline))
    if found.tis:
        show("\n" + tis_table(found.tis))
    log.info("\nWritten: %s", ", ".join(map(str, found.files)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
