"""Options of ``--labelled``: ``-o omni.key=value``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nnssl.config import make_config, option, split_options
from nnssl.errors import NnsslError, did_you_mean

PREFIX = "omni."


@dataclass(frozen=True)
class OmniConfig:
    """Options of the omni-supervised stages, settable by ``-o omni.key=value`` beside the method's own."""

    switch: float = option(
        1 / 3, "share of the steps before pseudo-labels are learnt from; 1: never", low=0.0, high=1.0
    )
    schedule: str = option(
        "stages",
        "learning rate, of the method's peak: a rise and a fall in each stage and a new optimiser state at the switch, or the "
        "method's own over both",
        choices=("stages", "method"),
    )
    warmup: float = option(0.05, "of schedule=stages: share of each stage in which the rate rises", low=0.0, high=0.99)
    fold: str = option(
        "0",
        "learn from the labels of this fold's training cases; --labelled-cases comes before it",
        choices=("0", "1", "2", "3", "4", "all"),
    )
    annotated: tuple[str, ...] = option((), "classes or regions that are annotated: liver,spleen; empty: all")
    ssl_weight: float = option(1.0, "weight of the self-supervised loss", low=0.0, high=1000.0)
    seg_weight: float = option(1.0, "weight of the loss on labelled patches", low=0.0, high=1000.0)
    semi_weight: float = option(1.0, "weight of the loss on pseudo-labelled patches", low=0.0, high=1000.0)
    batch: int | None = option(
        None, "labelled patches a step over all GPUs; auto: the plan's batch, a multiple of the GPUs", low=1
    )
    unlabelled: int | None = option(None, "pseudo-labelled patches a step over all GPUs; auto: as omni.batch", low=1)
    patch: tuple[int, ...] = option((), "voxels of these patches, z,y,x; empty: the plan's patch", low=1)
    foreground: float = option(0.33, "share of labelled patches around a labelled voxel", low=0.0, high=1.0)
    teacher: str = option(
        "ema",
        "who makes pseudo-labels: the moving average of the network from the switch on, or from the first step on, or its "
        "snapshot at the switch",
        choices=("ema", "running", "snapshot"),
    )
    momentum: float = option(0.99, "of the moving average; less in its first steps", low=0.0, high=1.0)
    threshold: float = option(0.0, "least probability of a pseudo-label; voxels below are ignored", low=0.0, high=1.0)
    largest: str = option(
        "auto",
        "pseudo-labels keep the largest component of a class: where all labelled cases show it as one piece, of all classes, or "
        "of none",
        choices=("auto", "always", "never"),
    )
    pseudo_from: str = option(
        "moved",
        "image that the teacher sees: the student's before its intensities change, the clean patch, or the student's",
        choices=("moved", "clean", "augmented"),
    )
    semi_through_encoder: bool = option(True, "pseudo-labels train the encoder too; false: decoder and heads only")
    augment: bool = option(True, "turn, scale, mirror both kinds of patches and change their intensities")
    intensities: str = option(
        "strong",
        "how these change: noise, contrast, brightness and gamma, each with probability 0.3, or nnU-Net's augmentation",
        choices=("strong", "nnunet"),
    )
    strength: float = option(
        2.0, "of intensities=strong: factor on that probability and on the noise for pseudo-labelled patches", low=0.0
    )
    mirror: bool = option(True, "mirroring among it; false where left and right are different labels")
    compared: int = option(
        32,
        "patches of held-out labelled cases that pseudo-labels are compared on after each epoch; 0: none",
        low=0,
        was="agreement",
    )
    volumes: int = option(4, "cases whose pseudo-labels are written as volumes at the end; 0: none", low=0)
    volumes_every: int = option(0, "epochs between two more such sets; 0: only at the end", low=0)


OMNI_RUNTIME = frozenset({"compared", "volumes", "volumes_every"})
"""Options that do not change what is learnt: they may differ when a run is continued."""

_ONE: dict[str, Any] = {"switch": 0.5, "schedule": "method", "largest": "never", "intensities": "nnunet"}
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {**_ONE, "teacher": "snapshot", "pseudo_from": "clean"},
    "code": {**_ONE, "teacher": "snapshot", "pseudo_from": "augmented", "semi_through_encoder": False},
    "running": {**_ONE, "teacher": "running", "pseudo_from": "clean", "threshold": 0.8},
}
"""``paper``: the recipe as published; ``code``: what the released code does; ``running``: the average of the whole run."""


def take_omni(options: Mapping[str, Any] | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split options into the method's and engine's, and those that begin with ``omni.`` (without it)."""
    given = dict(options or {})
    mine = {k[len(PREFIX) :]: given.pop(k) for k in list(given) if k.startswith(PREFIX)}
    return given, mine


def resolve_omni(given: Mapping[str, Any], saved: Mapping[str, Any] | None = None) -> OmniConfig:
    """Fill in defaults: what a continued run was started with, under a preset, under what the user gave.

    Args:
        given: options without the prefix; ``preset`` among them.
        saved: ``identity["omni"]["options"]`` of the run that is continued.

    Raises:
        NnsslError: unknown or illegal options, an unknown preset, a run of a version with one schedule over both stages.
    """
    if saved and "schedule" not in saved:
        raise NnsslError(
            "this run with --labelled began with a version that had one schedule over both stages, and this one cannot go on "
            "with it exactly. Finish it with that version, or start it anew with a --name; -o omni.preset=running is that recipe."
        )
    options = dict(given)
    preset = options.pop("preset", None)
    if preset is not None and preset not in PRESETS:
        raise NnsslError(
            f"-o omni.preset={preset}: known are {', '.join(PRESETS)}.{did_you_mean(str(preset), PRESETS)}"
        )
    base = PRESETS[preset] if preset else {**({"intensities": "nnunet"} if saved else {}), **(saved or {})}
    try:
        (mine,) = split_options(options, [OmniConfig])
        return make_config(OmniConfig, mine, base)
    except NnsslError as error:
        raise NnsslError(f"omni: {error}") from error
