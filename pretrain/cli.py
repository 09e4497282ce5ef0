"""The command ``nnssl_pretrain``: a thin shell over :func:`nnssl.pretrain.run`."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from importlib.metadata import entry_points
from typing import Any

from nnssl.command import run_command
from nnssl.errors import NnsslError

__all__ = ["main", "parser"]


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    p = argparse.ArgumentParser(
        prog="nnssl_pretrain",
        allow_abbrev=False,
        description="Self-supervised pretraining of the network of a dataset's nnU-Net plans, on images without labels.",
        epilog="Example: nnssl_pretrain -d 500 -t 501 -m macl, "
        "then: nnUNetv2_train 501 3d_fullres 0 -tr nnUNetTrainerPretrained",
    )
    p.add_argument(
        "-d",
        nargs="+",
        metavar="DATASET",
        help="dataset ids or names to learn from; labels are never used. 500:8 501:1 draws each case of 500 eight times as often",
    )
    p.add_argument("-t", metavar="TARGET", help="dataset whose plans are used (default: the one of -d)")
    p.add_argument("-m", metavar="METHOD", help="objective; --list names them. Or the file of one's own: ./simclr.py")
    p.add_argument(
        "-c", dest="configuration", metavar="CONFIGURATION", default="3d_fullres", help="default: 3d_fullres"
    )
    p.add_argument("-p", metavar="PLANS", default="nnUNetPlans", help="plans identifier (default: nnUNetPlans)")
    p.add_argument(
        "--planner",
        metavar="NAME",
        help="which of nnU-Net's planners plans a dataset without labels and plans: default, resenc_m, resenc_l, resenc_xl",
    )
    p.add_argument(
        "-gpu_memory_target", type=float, metavar="GB", help="GPU memory that this planner fills (its default)"
    )
    p.add_argument("-device", default="cuda", help="cuda (default), cpu or mps")
    p.add_argument("-num_gpus", type=int, default=1, help="GPUs of this machine to use, one process each (default: 1)")
    p.add_argument("-np", type=int, metavar="N", help="processes for preprocessing (default: nnU-Net's)")
    p.add_argument(
        "--c",
        dest="go_on",
        action="store_true",
        help="continue the run in the output folder, with its saved configuration; with more --epochs than it had, lengthen it",
    )
    p.add_argument("--epochs", type=int, help="length of the run (default: 200)")
    p.add_argument("--iterations", type=int, help="optimiser steps per epoch (default: 250)")
    p.add_argument("--seed", type=int, help="of initialisation, sampling and views (default: 0)")
    p.add_argument(
        "--init",
        metavar="FILE",
        help="start from these weights: of a pretraining, of MIC-DKFZ's nnssl, of nnU-Net, or of its network in files of others",
    )
    p.add_argument(
        "--adapt",
        nargs="+",
        action="extend",
        metavar="KIND=HOW",
        help="let --init come from another network: channels=repeat|first|skip, kernels=average|centre, depth=match",
    )
    p.add_argument(
        "--coverage",
        type=float,
        metavar="SHARE",
        help="with --adapt: least share of the encoder to be filled (default: 0.5)",
    )
    p.add_argument("--key", metavar="ENTRY", help="with --init: entry that holds the weights, such as teacher")
    p.add_argument(
        "--prefix", metavar="TEXT", help="with --init: what stands before nnU-Net's names in a file of others"
    )
    p.add_argument("--name", help="tells this run from others that would share its folder")
    p.add_argument("--crop", metavar="Z,Y,X", help="pretraining crop in voxels, in place of the method's choice")
    p.add_argument("--cases", metavar="FILE", help="text file of the cases to learn from, one a line")
    p.add_argument("--exclude", metavar="FILE", help="text file of cases to leave out, one a line")
    p.add_argument("--skip-bad", action="store_true", help="go on without images that cannot be used (see the report)")
    p.add_argument("--allow-mismatch", action="store_true", help="accept differing channels or modality of -d and -t")
    p.add_argument(
        "--robustness-every",
        type=int,
        metavar="K",
        help="epochs between two measurements of robustness, 0: none (default: so many that they take 3 %% of the time)",
    )
    p.add_argument("--stop", choices=("robustness",), help="end once robustness has not improved for five measurements")
    p.add_argument(
        "--auto-continue",
        action="store_true",
        help="continue this very run where it has a checkpoint, else start it: for schedulers that start a command again",
    )
    p.add_argument(
        "--restarts",
        type=int,
        default=0,
        metavar="N",
        help="with -num_gpus: times that all processes start again from the last checkpoint when one was killed (default: 0)",
    )
    p.add_argument(
        "--preprocess-only", action="store_true", help="preprocess the images of -d and end; -m may be left out"
    )
    p.add_argument(
        "--part",
        metavar="I/N",
        help="with --preprocess-only: only the I-th of N parts of the cases, one for each machine",
    )
    p.add_argument(
        "--labelled",
        metavar="DATASET",
        help="learn from the labels of this dataset too, and later from pseudo-labels of -d; implies -t (see --list -m)",
    )
    p.add_argument(
        "--labelled-cases",
        metavar="FILE",
        help="with --labelled: text file of the cases whose labels are learnt from, one a line; 'case: class, class' where only "
        "these classes are annotated",
    )
    p.add_argument("--dry-run", action="store_true", help="only tell crop, batch, memory and time")
    p.add_argument(
        "-o", nargs="+", action="extend", metavar="KEY=VALUE", help="options of method and engine; see --list -m"
    )
    p.add_argument("--list", action="store_true", help="list the methods, or with -m all options of one")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    p = parser()
    args = p.parse_args(arguments)
    if not args.list and (not args.d or not (args.m or args.preprocess_only)):
        p.error("-d and -m are needed (or --list)")
    if args.part and not args.preprocess_only:
        p.error("--part needs --preprocess-only")
    return run_command(lambda: _body(args, arguments))


def _body(args: argparse.Namespace, arguments: list[str]) -> int:
    if args.list:
        sys.stdout.write(_listing(args.m))
        return 0
    if args.preprocess_only:
        return _preprocess(args)
    if args.num_gpus < 1:
        raise NnsslError(f"-num_gpus {args.num_gpus}: at least 1 is needed.")
    if args.restarts < 0:
        raise NnsslError(f"--restarts {args.restarts}: 0 or more is needed.")
    if args.restarts and args.num_gpus == 1:
        raise NnsslError(
            "--restarts needs -num_gpus: let what starts a single process start it again, with --auto-continue."
        )
    if args.num_gpus > 1 and "WORLD_SIZE" not in os.environ and not args.dry_run:
        return _several(args, arguments)
    from nnssl.config import parse_assignments
    from nnssl.pretrain.api import run

    result = run(
        args.d,
        method=args.m,
        target=args.t,
        configuration=args.configuration,
        plans=args.p,
        device=args.device,
        epochs=args.epochs,
        iterations=args.iterations,
        seed=args.seed,
        name=args.name,
        options=parse_assignments(args.o),
        crop=_crop(args.crop),
        cases=args.cases,
        exclude=args.exclude,
        skip_bad=args.skip_bad,
        allow_mismatch=args.allow_mismatch,
        continue_run="auto" if args.auto_continue and not args.go_on else args.go_on,
        dry_run=args.dry_run,
        processes=args.np,
        robustness_every=args.robustness_every,
        stop=args.stop,
        planner=args.planner,
        gpu_memory_target=args.gpu_memory_target,
        labelled=args.labelled,
        labelled_cases=args.labelled_cases,
        init=args.init,
        adapt=parse_assignments(args.adapt),
        coverage=args.coverage,
        key=args.key,
        prefix=args.prefix,
    )
    return 0 if result.finished or args.dry_run else 128 + (result.signal or signal.SIGTERM)


def _preprocess(args: argparse.Namespace) -> int:
    from nnssl.pretrain.prepare.preparation import preprocess

    preprocess(
        args.d,
        target=args.t or args.labelled,
        configuration=args.configuration,
        plans=args.p,
        method=args.m,
        part=args.part,
        cases=args.cases,
        exclude=args.exclude,
        skip_bad=args.skip_bad,
        allow_mismatch=args.allow_mismatch,
        processes=args.np,
        planner=args.planner,
        gpu_memory_target=args.gpu_memory_target,
    )
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


def _crop(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.replace("x", ",").split(","))
    except ValueError:
        raise NnsslError(f"--crop {text}: whole numbers are wanted, for example 32,64,64.") from None


def _listing(method: str | None) -> str:
    from nnssl.config import describe_options
    from nnssl.errors import nearest
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
        raise NnsslError(f"unknown method '{method}'.{nearest(method, methods)} Known: {', '.join(methods)}.")
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
        widths = [max(len(r[i]) for r in table) for i in range(3)]
        lines += ["  " + "  ".join([*(r[i].ljust(widths[i]) for i in range(3)), r[3]]).rstrip() for r in table]
        lines.append("")
    reason = f" ({cls.transfer_reason})" if cls.transfer_reason else ""
    lines += [
        f"Segmentation networks get by default: {cls.default_transfer}{reason}; another choice: nnssl_plan --parts",
        "",
    ]
    if cls.presets:
        lines.append("Presets (-o preset=NAME):")
        for name, values in cls.presets.items():
            lines.append(f"  {name}: " + ", ".join(f"{k}={v}" for k, v in values.items()))
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
