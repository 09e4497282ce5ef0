"""Plan variants: plans files that share their base's preprocessed data and tell a trainer what to do."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any

from nnssl.errors import NnsslError
from nnssl.files import read_json
from nnssl.grammar import pair, whole_numbers
from nnssl.options import check_names, given, meanings
from nnssl.paths import preprocessed_folder
from nnssl.plans.datasets import resolve_dataset
from nnssl.plans.figures import MEAN_TEACHER, SCHEDULES, USED, FineTuningConfig, check_options, schedule_name, spelt
from nnssl.plans.labels import choose_cases, choose_validating, folds_of
from nnssl.plans.parts import CHOICES, check_parts
from nnssl.plans.plan import Plan, plans_in
from nnssl.plans.primus import check_patch, parse_network

log = logging.getLogger("nnssl")

SCHEMA = 1
# nnU-Net gives the lowest of its deep-supervision outputs no weight: with two stages that is the only one, and the loss is nan
MIN_STAGES = 3
_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9_-]*[A-Za-z0-9-])?")
_LEAST = {"epochs": 0, "iterations": 1, "val_iterations": 1, "batch_size": 1}
_PER_STAGE = ("features_per_stage", "strides", "kernel_sizes", "n_conv_per_stage", "n_blocks_per_stage")

WEIGHTS, NETWORK, LENGTH, CASES = "pretrained weights", "network", "fine-tuning", "which cases"
"""Titles in the help of ``nnssl_plan``."""


def check_name(name: str, what: str = "--name") -> str:
    """Return ``name`` where it can be part of nnU-Net's folder names.

    Raises:
        NnsslError: where it holds anything but letters, digits, ``-`` and ``_``, holds ``__`` (nnU-Net splits folder names on
            it), or starts or ends with ``_``.
    """
    if not _NAME.fullmatch(name) or "__" in name:
        raise NnsslError(
            f"{what} '{name}' cannot be used: letters, digits, '-' and single '_' only, '_' not at either end, "
            "since nnU-Net splits folder names on '__'."
        )
    return name


@dataclass(frozen=True, kw_only=True)
class Changes:
    """What a variant has that its base has not; None leaves a thing as it is. ``nnssl_plan`` has an option for most of them."""

    checkpoint: str | Path | None = given(
        None, WEIGHTS, "--checkpoint", metavar="FILE", help="pretrained weights that the trainer takes"
    )
    parts: str | None = given(
        None,
        WEIGHTS,
        "--parts",
        metavar="PARTS",
        help=f"which pretrained parts the network gets: {', '.join(CHOICES)} (default: what the checkpoint's method found best, "
        "which the transfer report names)",
    )
    adapt: Mapping[str, str] | None = given(None, WEIGHTS, read=dict)
    coverage: float | None = given(None, WEIGHTS)
    network: str | None = given(
        None,
        NETWORK,
        "--network",
        metavar="primus-s",
        help="a transformer in place of the U-Net: primus-s, -b, -m, -l as nnU-Net's Primus trainers build them (also primusv2-, "
        "primusv3-), or primus:WIDTH,BLOCKS,HEADS",
    )
    features: Sequence[int] | None = given(
        None,
        NETWORK,
        "--features",
        type=whole_numbers,
        metavar="8,16,32",
        help="channels per stage; fewer stages cut the network",
    )
    patch: Sequence[int] | None = given(
        None,
        NETWORK,
        "--patch",
        type=whole_numbers,
        metavar="32,40,32",
        help="training patch in voxels, one number per axis",
    )
    batch_size: int | None = given(None, NETWORK, "--batch-size", type=int, metavar="N", help="training batch")
    epochs: int | None = given(
        None, LENGTH, help="epochs of the fine-tuning (default: nnU-Net's 1000); 0: the weights as they are"
    )
    iterations: int | None = given(None, LENGTH, help="training steps of an epoch (default: nnU-Net's 250)")
    val_iterations: int | None = given(
        None,
        LENGTH,
        "--val-iterations",
        type=int,
        metavar="N",
        help="validation steps of an epoch (default: nnU-Net's 50)",
    )
    schedule: str | None = given(
        None,
        LENGTH,
        "--schedule",
        metavar="NAME",
        help=f"schedule of the learning rate: {', '.join(map(spelt, SCHEDULES))}",
    )
    figures: Mapping[str, Any] | None = given(
        None,
        LENGTH,
        dest="options",
        type=pair("warmup=0.1"),
        read=dict,
        help="options of the schedule, for example -o peak_lr=3e-4 warmup=0.1",
    )
    labels: int | str | None = given(
        None,
        CASES,
        help="train on a number of cases, a percentage of each fold's training cases, or the cases that a file names",
    )
    seed: int | None = given(None, CASES, default=None, help="which cases --labels takes (default: 0)")
    validate: str | Path | None = given(
        None,
        CASES,
        "--validate",
        metavar="FILE",
        help="with --labels: the cases that validate in fold all, one a line (default: all that are not trained on)",
    )
    unlabelled: Sequence[int | str] | None = given(
        None,
        CASES,
        "--unlabelled",
        nargs="+",
        metavar="DATASET",
        help="with the schedule mean-teacher, which it sets: datasets whose images are learnt from without labels, preprocessed "
        "for these plans "
        "(default: what --labels leaves out, and the images that the checkpoint was pretrained on)",
    )
    transductive: bool | None = given(
        None,
        CASES,
        "--transductive",
        action="store_true",
        default=None,
        help="let these images include the fold's validation cases and known test images",
    )
    exclude: str | Path | None = given(
        None,
        CASES,
        "--exclude",
        metavar="FILE",
        help="with the schedule mean-teacher, which it sets: cases that are not learnt from without labels, CASE or "
        "DATASET/CASE, one a line",
    )
    sha256: str | None = field(default=None, metadata={"help": "hash of the checkpoint"})
    place: Mapping[str, str] | None = field(
        default=None, metadata={"help": "where the weights lie in a file of others: key, prefix"}
    )
    cases: Mapping[str, Any] | None = field(
        default=None, metadata={"help": "train_cases (fold -> case names) and val_cases, in place of labels"}
    )
    backbone: Sequence[str] | None = field(
        default=None, metadata={"help": "the parts that freeze_unfreeze freezes first"}
    )


def _truncate(plan: Plan, config: dict[str, Any], features: Sequence[int]) -> None:
    """Cut the network of a resolved configuration to ``len(features)`` stages with these channels."""
    n = len(features)
    if not MIN_STAGES <= n <= plan.n_stages:
        can = (
            f"{MIN_STAGES} to {plan.n_stages} numbers can be given"
            if plan.n_stages > MIN_STAGES
            else "it cannot be cut"
        )
        raise NnsslError(
            f"--features names {n} stages; the network of {plan.plans_name} ({plan.configuration}) has {plan.n_stages}. "
            f"At least {MIN_STAGES} are needed, so {can}."
        )
    if min(features) < 1:
        raise NnsslError(f"--features {','.join(map(str, features))}: each at least 1.")
    kwargs = config["architecture"]["arch_kwargs"]
    for key in _PER_STAGE:
        if isinstance(kwargs.get(key), (list, tuple)):
            kwargs[key] = list(kwargs[key])[:n]
    if isinstance(kwargs.get("n_conv_per_stage_decoder"), (list, tuple)):
        # listed from the bottleneck up: the stages that stay are the last ones
        kwargs["n_conv_per_stage_decoder"] = list(kwargs["n_conv_per_stage_decoder"])[-(n - 1) :]
    kwargs["n_stages"] = n
    kwargs["features_per_stage"] = [int(f) for f in features]


def _check_patch(plan: Plan) -> None:
    """Refuse a patch that the network's strides do not divide or that leaves a single bottleneck voxel."""
    if plan.is_primus:
        return  # its tokens have been looked at
    axes = "zyx"[-plan.dim :]
    wrong = [
        f"axis {axis} has {size} voxels, which the network's total stride {stride} does not divide "
        f"(nearest: {' or '.join(map(str, sorted({max(1, size // stride) * stride, (size // stride + 1) * stride})))})"
        for axis, size, stride in zip(axes, plan.patch_size, plan.total_stride)
        if size < 1 or size % stride
    ]
    if wrong:
        raise NnsslError(f"--patch {','.join(map(str, plan.patch_size))}: {'; '.join(wrong)}.")
    if prod(p // s for p, s in zip(plan.patch_size, plan.total_stride)) < 2:
        raise NnsslError(
            f"--patch {','.join(map(str, plan.patch_size))} leaves one voxel at the bottleneck (total stride "
            f"{plan.total_stride}), which instance normalisation cannot train. Enlarge one axis or give fewer --features."
        )


def free_children(plans: dict[str, Any], base: Plan) -> None:
    """Write out the configurations that inherit from the chosen one, so that changing it leaves them as they were."""
    for name in list(plans["configurations"]):
        parent: str | None = name
        seen: set[str] = set()
        while parent is not None and parent not in seen:
            seen.add(parent)
            parent = plans["configurations"].get(parent, {}).get("inherits_from")
        if name != base.configuration and base.configuration in seen:
            resolved = deepcopy(base.manager.get_configuration(name).configuration)
            resolved.pop("inherits_from", None)
            plans["configurations"][name] = resolved


def _change_configuration(plans: dict[str, Any], plan: Plan, asked: Changes) -> None:
    """Put network, patch and batch into the configuration of ``plans``."""
    if all(x is None for x in (asked.network, asked.features, asked.patch, asked.batch_size)):
        return
    free_children(plans, plan)
    config = plans["configurations"][plan.configuration] = deepcopy(plan.config.configuration)
    config.pop("inherits_from", None)
    if asked.features is not None:
        if plan.is_primus or asked.network is not None:
            raise NnsslError(
                "--features are the stages of a U-Net; a Primus is chosen with --network, for example primus-s."
            )
        _truncate(plan, config, asked.features)
    if asked.patch is not None:
        if len(asked.patch) != plan.dim:
            raise NnsslError(
                f"--patch has {len(asked.patch)} numbers; configuration {plan.configuration} has {plan.dim} axes."
            )
        config["patch_size"] = [int(p) for p in asked.patch]
    if asked.network is not None:
        config["architecture"] = parse_network(asked.network)
        token = config["architecture"]["arch_kwargs"]["patch_embed_size"]
        check_patch(config["patch_size"], token, f"--network {asked.network}")
    if asked.batch_size is not None:
        config["batch_size"] = int(asked.batch_size)


def _set_schedule(metadata: dict[str, Any], plan: Plan, asked: Changes) -> None:
    """Put schedule, figures and lengths into the entry for the trainer; the figures of another schedule leave."""
    before = plan.schedule
    schedule = before if asked.schedule is None else schedule_name(asked.schedule)
    learns_from_pool = asked.unlabelled or asked.transductive or asked.exclude is not None
    if learns_from_pool and asked.schedule is None and not metadata.get("schedule"):
        schedule = MEAN_TEACHER  # no other learns from these images; its control follows it too
    if learns_from_pool and schedule != MEAN_TEACHER:
        raise NnsslError(
            f"--unlabelled, --transductive and --exclude are for the schedule mean-teacher, not {spelt(schedule)}; "
            "add --schedule mean-teacher."
        )
    if schedule != before:
        for key in {*(key for used in USED.values() for key in used), "backbone"}:
            metadata.pop(key, None)
    if asked.schedule is not None or asked.figures or learns_from_pool:
        metadata["schedule"] = schedule  # a plan that asks for none can be trained with any trainer
    metadata.update(check_options(asked.figures or {}, schedule))
    for key, least in _LEAST.items():
        value = getattr(asked, key)
        if value is not None and value < least:
            raise NnsslError(f"--{key.replace('_', '-')} {value}: at least {least}.")
        if value is not None and key != "batch_size":
            metadata[key] = int(value)


def _set_weights(metadata: dict[str, Any], asked: Changes) -> None:
    """Put the checkpoint, and what is taken of it, into the entry for the trainer."""
    if asked.checkpoint is not None:
        for key in ("adapt", "coverage", "parts", "place", "backbone"):  # said of the file named before
            metadata.pop(key, None)
        metadata.update(checkpoint=str(asked.checkpoint), sha256=asked.sha256)
    if asked.parts is not None:
        check_parts(asked.parts)
    for key in ("adapt", "coverage", "place", "parts"):
        value = getattr(asked, key)
        if value is not None:
            metadata[key] = dict(value) if isinstance(value, Mapping) else value
    if asked.backbone is not None and metadata.get("schedule") == "freeze_unfreeze":
        metadata["backbone"] = list(asked.backbone)


def _set_cases(metadata: dict[str, Any], plan: Plan, asked: Changes) -> None:
    """Put the cases with labels, and the datasets without, into the entry for the trainer."""
    metadata.update(asked.cases or {})
    if asked.labels is not None:
        folds, seed = folds_of(plan), asked.seed or 0
        metadata |= {"labels": str(asked.labels), "seed": seed, "train_cases": choose_cases(folds, asked.labels, seed)}
        if asked.validate is not None:
            metadata["val_cases"] = choose_validating(folds, Path(asked.validate))
    if asked.unlabelled:
        metadata["unlabelled"] = [resolve_dataset(source) for source in asked.unlabelled]
    if asked.transductive:
        metadata["transductive"] = True
    if asked.exclude is not None:
        from nnssl.plans.unlabelled import choose_excluded  # reads images: the variants of others need not wait for it

        metadata["excluded"] = choose_excluded(plan, Path(asked.exclude), metadata.get("unlabelled") or ())


def derive(plan: Plan, name: str, changes: Changes | None = None, **others: Any) -> Plan:
    """Make a variant of a plan in memory; nothing is written and ``plan`` stays as it is.

    Args:
        plan: what it is derived from, itself a variant or not.
        name: joined to the plans name with ``_``.
        changes: what it has that ``plan`` has not.
        others: more of them, by the names of :class:`Changes`: ``derive(plan, "small", features=(8, 16, 32))``.

    Raises:
        NnsslError: an illegal name, features that the network has no stages for, a patch that the strides or tokens do not
            divide, a figure that the schedule does not have or that is out of range, labels that there are not.
    """
    check_names(others, meanings(Changes))
    asked = replace(changes or Changes(), **others)
    plans = deepcopy(plan.plans)
    plans["plans_name"] = f"{plan.plans_name}_{check_name(name)}"
    metadata = {**plan.nnssl, "schema": SCHEMA, "base_plans": plan.base_plans, "configuration": plan.configuration}
    _set_schedule(metadata, plan, asked)
    _change_configuration(plans, plan, asked)
    _set_weights(metadata, asked)
    _set_cases(metadata, plan, asked)
    plans["nnssl"] = metadata
    variant = Plan.from_dicts(plans, plan.configuration, plan.dataset_json, second_stage=True)
    FineTuningConfig.from_plans(plans, variant.schedule, variant.trainer())
    if asked.features is not None or asked.patch is not None:
        _check_patch(variant)
    return variant


@dataclass(frozen=True)
class Variant:
    """One line of ``nnssl_plan --list``: name of the plans, and what their ``nnssl`` entry says."""

    plans_name: str
    path: Path
    nnssl: dict[str, Any]
    patch_size: tuple[int, ...]
    features: tuple[int, ...]


def list_variants(dataset: int | str) -> list[Variant]:
    """The variants of a dataset, sorted by name; plain plans are left out."""
    folder = preprocessed_folder() / resolve_dataset(dataset)
    found = []
    for name in plans_in(folder) if folder.is_dir() else []:
        path = folder / f"{name}.json"
        plans = read_json(path)
        metadata = plans.get("nnssl")
        if not isinstance(metadata, dict):
            continue
        configuration = metadata.get("configuration", "3d_fullres")
        try:
            plan = Plan.from_dicts(plans, configuration, {}, second_stage=True)
            found.append(Variant(name, path, metadata, plan.patch_size, plan.features))
        except (NnsslError, KeyError, TypeError):
            log.warning("%s is left out: its configuration '%s' cannot be read.", path, configuration)
    return found
