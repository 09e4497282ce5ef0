"""``nnssl_probe``: which checkpoint, and is it worth it? A linear layer on frozen features, beside random weights."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence

from nnssl.command import check_device, run_command
from nnssl.grammar import CommandParser
from nnssl.plans import resolve_dataset
from nnssl.streams import show

log = logging.getLogger("nnssl")


def parser() -> CommandParser:
    """The command's arguments."""
    p = CommandParser(
        "nnssl_probe",
        "[CKPT ...] -d DATASET [options]",
        "What does a linear layer make of a checkpoint's frozen features on a few labelled cases, beside random "
        "weights? Which checkpoint to take, in about a minute for a small network on a CPU. It tells what the features hold; "
        "what a fine-tuning gains is another figure.",
        "nnssl_probe -d 501 mae=FOLDER/checkpoint_final.pth hdense=FOLDER2",
    )
    p.add_argument(
        "checkpoints",
        nargs="*",
        metavar="CKPT",
        help="file, folder of a run, or NAME=FILE (default: the one that the plan names and all finished pretrainings for it)",
    )
    what = p.group("which cases")
    p.share(what, "dataset", required=True, help="number or name of the labelled dataset")
    p.share(what, "configuration")
    p.share(what, "plans")
    p.share(what, "fold", help="fold that the labelled cases come from (default: all)")
    p.share(
        what,
        "labels",
        help="labelled cases: a number, a share, or a file (default: those of the plan variant, else all, at most 16)",
    )
    what.add_argument(
        "--evaluate",
        default="loo",
        metavar="loo|val|FILE",
        help="leave each labelled case out once (loo, default); or fit on all and score the validation cases (val; of fold all: "
        "those that are not labelled), or the cases that a file names",
    )
    how = p.group("how")
    p.share(how, "device", "random_inits")
    p.share(how, "seed", help="random seed of labelled cases, voxels and random weights (default: 0)")
    how.add_argument(
        "--step",
        type=float,
        default=0.75,
        metavar="SHARE",
        help="distance of sliding windows, as a share of the patch (default: 0.75)",
    )
    p.share(how, "adapt", "coverage")
    p.share(how, "output", help="folder for probe.json, probe.csv and probe.png (default: probe_<Dataset> here)")
    p.renamed("-o", "--output")
    p.renamed("--device", "-device")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    args = parser().parse_args(argv)
    return run_command(lambda: _body(args), args)


def _body(args: argparse.Namespace) -> int:
    from nnssl.probe.report import table
    from nnssl.probe.run import probe

    check_device(args.device)
    dataset = resolve_dataset(args.dataset)
    found = probe(
        dataset,
        args.checkpoints,
        configuration=args.configuration,
        plans=args.plans,
        labels=args.labels,
        fold=args.fold,
        evaluate=args.evaluate,
        random_inits=args.random_inits,
        seed=args.seed,
        step=args.step,
        adapt=dict(args.adapt or ()),
        coverage=args.coverage,
        device=args.device,
        output=args.output or f"probe_{dataset}",
    )
    show("\n" + table(found) + "\n")
    for text in found.sentences:
        show(text)
    for text in found.warnings:
        log.warning("Warning: %s", text)
    log.info("\n%.0f s. Written: %s", found.seconds, ", ".join(map(str, found.files)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
