"""Refuses plans JSON of which a field is missing or of a wrong kind: plans are to be blamed, not the images."""

from __future__ import annotations

import re
from typing import Any

from nnssl.errors import NnsslError
from nnssl.fields import Wanted, anything, check_fields, flag, listing, mapping, number, optional, text, whole

_PART = re.compile(r"[^/\\\x00-\x1f]{1,200}")
MANY = 1 << 16

part = Wanted(
    "the name of a folder, without / and ..",
    lambda value: isinstance(value, str) and _PART.fullmatch(value) is not None and value.strip(". ") != "",
)

_PLANS = {
    "dataset_name": part,
    "plans_name": part,
    "configurations": mapping(part, mapping(text, anything)),
    "transpose_forward": Wanted(
        "the numbers 0, 1 and 2 in some order",
        lambda v: isinstance(v, (list, tuple)) and all(whole(0).fits(i) for i in v) and sorted(v) == [0, 1, 2],
    ),
    "image_reader_writer": optional(text),
    "original_median_shape_after_transp": optional(listing(number(0), (3,))),
    "foreground_intensity_properties_per_channel": optional(mapping(text, mapping(text, anything))),
    "nnssl": optional(mapping(text, anything)),
}
_CONFIGURATION = {
    "data_identifier": part,
    "preprocessor_name": optional(text),
    "batch_size": whole(1, MANY),
    "patch_size": listing(whole(0, MANY), (2, 3)),  # 0: a variant's own message names the axis
    "median_image_size_in_voxels": listing(number(0), (2, 3)),
    "spacing": listing(number(0), (2, 3)),
    "normalization_schemes": listing(text),
    "use_mask_for_norm": listing(flag),
    "resampling_fn_data": optional(text),
    "resampling_fn_seg": optional(text),
    "resampling_fn_probabilities": optional(text),
    "architecture": mapping(text, anything),
    "previous_stage": optional(text),
}
_ARCHITECTURE = {
    "network_class_name": text,
    "arch_kwargs": mapping(text, anything),
    "_kw_requires_import": optional(listing(text)),
}


def check_part(name: str, what: str) -> None:
    """Refuse a name that cannot be a folder or file of its own below nnU-Net's folders: it has a separator or leads elsewhere."""
    if not part.fits(name):
        raise NnsslError(f"{what} {name!r} cannot be used: it must be {part.words}.")


def check_plans(plans: Any, what: str) -> None:
    """Of a whole plans file. Raises :class:`NnsslError` that names the fields."""
    check_fields(plans, _PLANS, what)
    for name, configuration in plans["configurations"].items():
        parents = {"inherits_from": optional(text), "previous_stage": optional(text)}
        check_fields(configuration, parents, what, f"configurations.{name}.")


def check_configuration(content: Any, what: str, name: str) -> None:
    """Of a configuration with what it inherits. Raises :class:`NnsslError` that names the fields."""
    at = f"configurations.{name}."
    check_fields(content, _CONFIGURATION, what, at)
    check_fields(content["architecture"], _ARCHITECTURE, what, f"{at}architecture.")
    axes = len(content["patch_size"])
    if len(content["spacing"]) != axes or len(content["median_image_size_in_voxels"]) != axes:
        raise NnsslError(
            f"{what}: '{at}patch_size', 'spacing' and 'median_image_size_in_voxels' must have as many axes as each other."
        )
    if len(content["use_mask_for_norm"]) != len(content["normalization_schemes"]):
        raise NnsslError(
            f"{what}: '{at}use_mask_for_norm' and 'normalization_schemes' must have one entry per channel."
        )


def check_arguments(kwargs: Any, what: str, name: str, axes: int) -> None:
    """Of a U-Net's arguments. Raises :class:`NnsslError` that names the fields."""
    at = f"configurations.{name}.architecture.arch_kwargs."
    check_fields(kwargs, {"n_stages": whole(1, 32)}, what, at)
    n = int(kwargs["n_stages"])
    size = listing(whole(1, 64), (axes,))
    per_axis = Wanted(
        f"one number, or {n} (one per stage), each a number or {axes} numbers",
        lambda v: (
            whole(1, 64).fits(v) or listing(Wanted("", lambda s: whole(1, 64).fits(s) or size.fits(s)), (n,)).fits(v)
        ),
    )

    def per_stage(count: int, high: int) -> Wanted:
        one = whole(1, high)
        return Wanted(
            f"a whole number or a list of {count}, each {one.words}",
            lambda v: one.fits(v) or listing(one, (count,)).fits(v),
        )

    check_fields(
        kwargs,
        {
            "features_per_stage": per_stage(n, MANY),
            "strides": per_axis,
            "kernel_sizes": per_axis,
            "n_conv_per_stage": optional(per_stage(n, 256)),
            "n_blocks_per_stage": optional(per_stage(n, 256)),
            "n_conv_per_stage_decoder": optional(per_stage(n - 1, 256)),
        },
        what,
        at,
    )
