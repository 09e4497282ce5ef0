"""``nnssl_plan``: derives plan variants and lists them."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from nnssl.command import run_command
from nnssl.errors import NnsslError, UsageError
from nnssl.files import write_json
from nnssl.grammar import CommandParser
from nnssl.options import add_options, asked, from_args
from nnssl.paths import preprocessed_folder
from nnssl.plans.commands import preprocess_command, pretrain_command, train_command
from nnssl.plans.datasets import dataset_id, resolve_dataset
from nnssl.plans.figures import MEAN_TEACHER, FineTuningConfig, spelt
from nnssl.plans.plan import Plan, load_plan
from nnssl.plans.unlabelled import list_cases
from nnssl.plans.variants import LENGTH, WEIGHTS, Changes, Variant, list_variants
from nnssl.results import find_pretrainings
from nnssl.streams import show
from nnssl.weights import write_variant
from nnssl.words import aligned, first_few, size_text

log = logging.getLogger("nnssl")


def parser() -> CommandParser:
    """The command's arguments: those of :class:`~nnssl.plans.Changes`, and what only a command line needs."""
    p = CommandParser(
        "nnssl_plan",
        "-d DATASET [-c CONFIGURATION] [-p PLANS] --name NAME [options]",
        "Derive a plan variant: nnUNet_preprocessed/<Dataset>/<plans>_<name>.json. It shares the preprocessed data of its base, "
        "tells the trainer which checkpoint to take and how long to train, and gets results folders of its own.",
        "nnssl_plan -d 501 --checkpoint FOLDER/checkpoint_final.pth --schedule freeze-unfreeze --labels 8 --name macl8",
    )
    what = p.group("which plan")
    p.share(what, "dataset", required=True)
    p.share(what, "configuration")
    p.share(what, "plans", help="plans to derive from (default: nnUNetPlans)")
    p.share(what, "name", help="name of the variant: letters, digits, - and _")
    what.add_argument("--list", action="store_true", help="show the dataset's variants and end")
    groups = add_options(p, Changes)
    p.share(groups[WEIGHTS], "key", "prefix")
    groups[LENGTH].add_argument(
        "--lengthen",
        type=int,
        metavar="N",
        help="give the variant -p N epochs in all, more than it has, and end; nnUNetv2_train --c then goes on",
    )
    return p


_COLUMNS = ("epochs", "iterations", "schedule", "labels", "seed", "checkpoint")


def _table(variants: list[Variant]) -> str:
    rows: list[tuple[str, ...]] = [("plans", "configuration", "base", "patch", "features", *_COLUMNS)]
    for v in variants:
        entries = [None if v.nnssl.get(key) is None else _said(key, v.nnssl[key]) for key in _COLUMNS]
        sizes = [size_text(v.patch_size), ",".join(map(str, v.features))]
        cells = [v.plans_name, v.nnssl.get("configuration"), v.nnssl.get("base_plans"), *sizes, *entries]
        rows.append(tuple("-" if cell is None else str(cell) for cell in cells))
    return aligned(rows, left=len(rows[0]))


def _summary(plan: Plan) -> str:
    hidden = ("schema", "sha256", "configuration", "base_plans", "train_cases", "val_cases", "excluded")
    entries = {k: v for k, v in plan.nnssl.items() if k not in hidden}
    width = max((len(k) for k in entries), default=0)
    cases, excluded = plan.nnssl.get("train_cases", {}), plan.nnssl.get("excluded") or ()
    return "\n".join(
        [
            f"  network   {plan.network_text}",
            f"  patch     {' x '.join(map(str, plan.patch_size))} voxels, total stride {plan.total_stride}, "
            f"batch {plan.batch_size}",
            f"  data      {plan.data_identifier} (shared with {plan.base_plans})",
            *(["  trainer"] if entries else []),
            *(f"    {k.replace('_', ' '):<{width}}  {_said(k, v)}" for k, v in entries.items()),
            *(f"  fold {fold:<4} trains on {len(names)}: {', '.join(names)}" for fold, names in cases.items()),
            *([f"  not learnt from without labels ({len(excluded)}): {first_few(excluded, 3)}"] if excluded else []),
            *_next(plan),
        ]
    )


def _next(plan: Plan) -> list[str]:
    """What to type with this plan: the training alone where it finds weights, else what comes before it."""
    finds = bool(plan.nnssl.get("checkpoint"))
    with suppress(NnsslError):  # nnUNet_results may not be set yet
        finds = finds or any(run.finished for run in find_pretrainings(plan))
    pool = plan.nnssl.get("unlabelled") or ()
    missing = [source for source in pool if not list_cases(plan, source)]
    first = [f"First, for the images without labels: {preprocess_command(plan, missing)}"] if missing else []
    if finds:
        return [*first, f"Next: {train_command(plan)}"]
    pretrain = pretrain_command(plan, pool)
    if plan.schedule == MEAN_TEACHER:
        return [
            *first,
            f"Next, from random weights: {train_command(plan, pretrained=False)}",
            f"Or from pretrained ones: {pretrain}, and then -tr {plan.trainer()}",
        ]
    others = f" (or, on images without labels of another dataset N: -d N -t {dataset_id(plan.dataset_name)})"
    return [
        f"Next, the pretraining{'' if pool else others}, and then the fine-tuning:",
        f"  {pretrain}",
        f"  {train_command(plan)}",
    ]


def _said(key: str, value: Any) -> str:
    """A value of the plan as a person types or reads it."""
    if key == "schedule":
        return spelt(str(value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        return ", ".join(f"{k}={_said('', v)}" for k, v in value.items())
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _lengthen(args: argparse.Namespace) -> None:
    """Raise the number of epochs of an existing variant, so that ``nnUNetv2_train --c`` goes on with it."""
    plan = load_plan(args.dataset, args.configuration, args.plans, second_stage=True)
    old, new = plan.nnssl.get("epochs", FineTuningConfig.epochs), args.lengthen
    if not plan.nnssl:
        raise NnsslError(
            f"--lengthen: {args.plans} is no plan variant and has nnU-Net's own length. Name a variant with -p."
        )
    if new <= old:
        raise NnsslError(f"--lengthen {new}: {args.plans} has {old} epochs already. Give more in all than that.")
    path = preprocessed_folder() / plan.dataset_name / f"{args.plans}.json"
    write_json(path, {**plan.plans, "nnssl": {**plan.nnssl, "epochs": new}})
    log.info(
        f"{path}: {old} -> {new} epochs. A training goes on after its last epoch, at the learning rate that one of "
        f"{new} epochs has there.\nNext: {train_command(plan)} --c"
    )


_NEEDS = (
    (("key", "prefix"), "checkpoint", "--key and --prefix say where the weights lie in --checkpoint; name one."),
    (("seed",), "labels", "--seed chooses the cases of --labels; without it there is nothing to choose."),
    (("validate",), "labels", "--validate names validation cases beside those of --labels; give both."),
    (("adapt", "coverage"), "checkpoint", "--adapt and --coverage say how --checkpoint is taken; name one."),
    (
        ("coverage",),
        "adapt",
        "--coverage counts where --adapt lets something differ; without it the whole promise is asked for.",
    ),
)
"""Options, what they need beside them, and what is said where that is missing."""


def _run(args: argparse.Namespace) -> None:
    if args.lengthen is not None:
        _lengthen(args)
        return
    if args.list:
        name = resolve_dataset(args.dataset)
        variants = list_variants(name)
        show(
            _table(variants) if variants else f"{name} has no plan variants. Make one with: nnssl_plan --name NAME ..."
        )
        return
    if not args.name:
        raise UsageError("--name is missing: the variant is written as <plans>_<name>.json.")
    plan = load_plan(args.dataset, args.configuration, args.plans, second_stage=True)
    for names, needed, why in _NEEDS:
        if any(getattr(args, name) is not None for name in names) and getattr(args, needed) is None:
            raise UsageError(why)
    changes = asked(from_args(Changes, args))
    if not changes:
        raise UsageError(
            "Nothing to change: give --checkpoint, --network, --features, --patch, --epochs or another option (--help)."
        )
    place = {key: getattr(args, key) for key in ("key", "prefix") if getattr(args, key) is not None}
    if place:
        changes["place"] = place
    path = write_variant(plan, args.name, **changes)
    log.info(f"Wrote {path}")
    log.info(_summary(load_plan(args.dataset, args.configuration, path.stem, second_stage=True)))


def main(argv: Sequence[str] | None = None) -> int:
    """Console entry point; returns the exit status."""
    args = parser().parse_args(argv)
    return run_command(lambda: _run(args), args)
