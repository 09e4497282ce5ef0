"""Primus in plans: the sizes of nnU-Net's Primus trainers, how a plan names one, and which stock trainer builds the same.

Wald et al. 2025, "Primus" (arXiv:2503.01835). nnU-Net's own Primus trainers take nothing but the patch from the plans and hold
the network in their code. A plan variant of ours (``nnssl_plan --network primus-s``) writes it into ``architecture``, as plans do
for U-Nets, so that pretraining and fine-tuning read it there; the stock trainers ignore the entry.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from nnssl.errors import NnsslError, did_you_mean

CLASSES = {"primus": "Primus", "primusv2": "PrimusV2", "primusv3": "PrimusV3"}
"""Kind as a user writes it -> class in dynamic_network_architectures."""

_MODULE = "dynamic_network_architectures.architectures.primus"
_SIZES = {"s": (396, 12, 6), "b": (792, 12, 12), "m": (864, 16, 12), "l": (1056, 24, 16)}  # width, blocks, heads
_TOKEN = [8, 8, 8]
_STOCK = {"patch_embed_size": _TOKEN, "drop_path_rate": 0.2, "scale_attn_inner": True, "init_values": 0.1}
_ASKED = re.compile(r"(primus(?:v2|v3)?)(?:-([sbml])|:(\d+),(\d+),(\d+))")


def parse_network(text: str) -> dict[str, Any]:
    """The ``architecture`` entry of a network as a user names it.

    Args:
        text: ``"primus-s"``, ``-b``, ``-m`` or ``-l`` (the sizes of nnU-Net's trainers; also ``primusv2-``, ``primusv3-``), or
            ``"primus:96,4,4"``: width, blocks, heads.

    Raises:
        NnsslError: no such network, or a width that the heads cannot share.
    """
    asked = _ASKED.fullmatch(text.strip().lower())
    known = [f"{kind}-{size}" for kind in CLASSES for size in _SIZES]
    if asked is None:
        raise NnsslError(
            f"--network {text}: there is no such network.{did_you_mean(text, known)} There are: {', '.join(known)}, and "
            "primus:WIDTH,BLOCKS,HEADS."
        )
    kind, size, *numbers = asked.groups()
    width, depth, heads = _SIZES[size] if size else (int(n) for n in numbers)
    entry = architecture(CLASSES[kind], width, depth, heads)
    problems = problems_of(entry["arch_kwargs"])
    if problems:
        raise NnsslError(f"--network {text}: {'; '.join(problems)}.")
    return entry


def architecture(class_name: str, width: int, depth: int, heads: int, **others: Any) -> dict[str, Any]:
    """The ``architecture`` entry of a Primus of ``depth`` blocks; ``others`` replace what nnU-Net's trainers give the class."""
    kwargs = {"embed_dim": width, "eva_depth": depth, "eva_numheads": heads, **_STOCK, **others}
    return {
        "network_class_name": f"{_MODULE}.{class_name}",
        "arch_kwargs": {k: list(v) if isinstance(v, (list, tuple)) else v for k, v in kwargs.items()},
        "_kw_requires_import": [],
    }


def problems_of(kwargs: Mapping[str, Any]) -> list[str]:
    """What keeps a Primus with these arguments from being built or pretrained."""
    missing = [key for key in ("embed_dim", "eva_depth", "eva_numheads", "patch_embed_size") if key not in kwargs]
    if missing:
        return [f"arch_kwargs of a Primus need {', '.join(missing)}"]
    problems = []
    width, heads = int(kwargs["embed_dim"]), int(kwargs["eva_numheads"])
    if min(width, heads, int(kwargs["eva_depth"])) < 1:
        problems.append("width, blocks and heads must be at least 1")
    elif width % (6 * heads):
        problems.append(
            f"a width of {width} does not fit {heads} heads: rotary positions in 3D need a multiple of {6 * heads}"
        )
    if kwargs.get("num_register_tokens"):
        problems.append("register tokens are not supported, as none of nnU-Net's trainers has any")
    if not (kwargs.get("use_rot_pos_emb", True) and kwargs.get("use_abs_pos_embed", True)):
        problems.append("both kinds of positions are needed, as nnU-Net's trainers have them")
    if kwargs.get("patch_drop_rate"):
        problems.append("patch_drop_rate must be 0: pretraining drops tokens by itself")
    return problems


def check_patch(patch: Sequence[int], token: Sequence[int], what: str) -> None:
    """Raise :class:`NnsslError`, with the nearest patch, where tokens do not fill a patch, or where one does alone."""
    if len(patch) != 3:
        raise NnsslError(
            f"{what}: Primus is 3D only (its position codes and its decoder are), and this configuration has {len(patch)} axes. "
            "Use a 3D configuration (-c 3d_fullres)."
        )
    if any(p < t or p % t for p, t in zip(patch, token)):
        near = ",".join(str(max(t, round(p / t) * t)) for p, t in zip(patch, token))
        raise NnsslError(
            f"{what}: Primus cuts its patch into tokens of {'x'.join(map(str, token))} voxels, and {'x'.join(map(str, patch))} "
            f"voxels are not a whole number of them. Give the variant another patch: --patch {near}"
        )
    if all(p == t for p, t in zip(patch, token)):
        raise NnsslError(
            f"{what}: a patch of {'x'.join(map(str, patch))} voxels is a single token, and attention needs two or more."
        )


def stock_trainer(class_name: str, kwargs: Mapping[str, Any]) -> str | None:
    """The trainer of nnU-Net that builds the same network from a patch, ``"nnUNet_Primus_S_Trainer"``; None where none does."""
    given = {k: list(v) if isinstance(v, (list, tuple)) else v for k, v in kwargs.items()}
    for size, numbers in _SIZES.items():
        if class_name in CLASSES.values() and given == architecture(class_name, *numbers)["arch_kwargs"]:
            middle = f"Primus_{size.upper()}" if class_name == "Primus" else f"{class_name}{size.upper()}"
            return f"nnUNet_{middle}_Trainer"
    return None
