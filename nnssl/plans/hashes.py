"""Two fingerprints of a plan: one of its network, one of its preprocessed voxels."""

from __future__ import annotations

import json
from typing import Any

from nnssl.files import hash_of

_WITHOUT_STATISTICS = ("ZScoreNormalization", "NoNormalization", "RescaleTo01Normalization", "RGBTo01Normalization")
_PER_STAGE = ("features_per_stage", "n_conv_per_stage", "n_blocks_per_stage")
_DEFAULTS = {"deep_supervision": False, "nonlin_first": False, "conv_bias": False}


def _digest(content: Any) -> str:
    return hash_of(json.dumps(content, sort_keys=True, separators=(",", ":")))


def _plain(value: Any) -> Any:
    """Numbers, lists and dicts in one form: 2.0 is 2, tuples are lists, numpy scalars are Python's."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def _per_axis(value: Any, n_stages: int, dim: int) -> list[list[int]]:
    stages = [value] * n_stages if isinstance(value, int) else value
    return [[int(s)] * dim if isinstance(s, int) else [int(i) for i in s] for s in stages]


def canonical_arch_kwargs(arch_kwargs: dict[str, Any], dim: int) -> dict[str, Any]:
    """``arch_kwargs`` of a configuration with every number spelt out: per stage, and strides and kernels per axis."""
    kwargs = {k: _plain(v) for k, v in arch_kwargs.items()}
    if "eva_depth" in kwargs:
        return _primus_kwargs(kwargs)
    n = int(kwargs["n_stages"])
    for key in ("strides", "kernel_sizes"):
        kwargs[key] = _per_axis(kwargs[key], n, dim)
    for key in _PER_STAGE:
        if isinstance(kwargs.get(key), int):
            kwargs[key] = [kwargs[key]] * n
    if isinstance(kwargs.get("n_conv_per_stage_decoder"), int):
        kwargs["n_conv_per_stage_decoder"] = [kwargs["n_conv_per_stage_decoder"]] * (n - 1)
    return kwargs


def _primus_kwargs(kwargs: dict[str, Any]) -> dict[str, Any]:
    """A Primus in the words of a U-Net: its tokens are the one stage. How much is dropped in training is no part of it."""
    token = kwargs["patch_embed_size"]
    stages = {"n_stages": 1, "features_per_stage": [kwargs["embed_dim"]], "strides": [token], "kernel_sizes": [token]}
    return {**{k: v for k, v in kwargs.items() if not k.endswith(("_drop_rate", "drop_path_rate"))}, **stages}


def architecture_hash(network_class: str, arch: dict[str, Any], n_channels: int) -> str:
    """sha256 (hex) of a network: its class, its canonical arguments and its input channels.

    Arguments at their default (``None``, deep supervision), the folder that a class is imported from, and ``inplace``
    change nothing. The number of classes does not enter.
    """
    kept: dict[str, Any] = {}
    for key, value in arch.items():
        if value is None or key == "deep_supervision" or (key in _DEFAULTS and value == _DEFAULTS[key]):
            continue
        if isinstance(value, dict):
            value = {k: v for k, v in value.items() if k != "inplace"}
            if not value:
                continue
        kept[key] = value.rsplit(".", 1)[-1] if isinstance(value, str) else value
    return _digest([network_class, kept, int(n_channels)])


def data_hash(configuration: dict[str, Any], plans: dict[str, Any]) -> str:
    """First 8 hex digits of the sha256 of what decides preprocessed voxels.

    That is spacing, normalisation with the intensity statistics that it uses, masks for normalisation, transpose,
    resampling of images, and the preprocessor.
    """
    statistics = plans.get(
        "foreground_intensity_properties_per_channel", plans.get("foreground_intensity_properties_by_modality", {})
    )
    schemes = list(configuration["normalization_schemes"])
    used = {str(i): statistics.get(str(i)) for i, s in enumerate(schemes) if s not in _WITHOUT_STATISTICS}
    content = {
        "spacing": configuration["spacing"],
        "normalization": schemes,
        "statistics": used,
        "masks": configuration.get("use_mask_for_norm"),
        "transpose": plans["transpose_forward"],
        "resampling": [configuration.get("resampling_fn_data"), configuration.get("resampling_fn_data_kwargs")],
        "preprocessor": configuration.get("preprocessor_name"),
    }
    return _digest(_plain(content))[:8]
