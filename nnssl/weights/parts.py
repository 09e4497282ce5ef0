"""The parts of a network that weights are counted by: encoder, decoder stages from the bottom up, segmentation heads.

Of a Primus these are the encoder (embedding and transformer) and the up-projection, whose widths depend on the number of classes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

HEADS = "seg_layers"
UP = "up_projection"
OTHER = "other"
_ENCODER = ("encoder.", "decoder.encoder.", "down_projection.", "eva.")
_STAGE = re.compile(r"decoder\.(?:transpconvs|stages)\.(\d+)\.")


def decoder_stage(index: int) -> str:
    """Name of a decoder stage's part; 0 is the lowest resolution and includes the transposed convolution before it."""
    return f"decoder stage {index}"


def part_of(name: str) -> str:
    """The part that a tensor of the state dict belongs to: ``"encoder"``, ``"decoder stage 0"``, ..., ``"seg_layers"``.

    Args:
        name: any of the tensor's names, ``decoder.encoder...`` included; ``"other"`` for what no network of nnU-Net has.
    """
    if name.startswith(_ENCODER):
        return "encoder"
    if name.startswith("up_projection.") or name == "mask_token":
        return UP
    if name.startswith("decoder.seg_layers."):
        return HEADS
    stage = _STAGE.match(name)
    return decoder_stage(int(stage.group(1))) if stage else OTHER


def decoder_stages(names: Iterable[str]) -> list[int]:
    """The decoder stages that the given tensor names are of, from the lowest resolution on."""
    return sorted({int(stage.group(1)) for stage in map(_STAGE.match, names) if stage})


def part_names(names: Iterable[str]) -> list[str]:
    """The parts of the given tensor names, in the order of computation, heads last."""
    names = list(names)
    found = {part_of(name) for name in names}
    return [p for p in ("encoder", *map(decoder_stage, decoder_stages(names)), OTHER, UP, HEADS) if p in found]


def is_head(part: str) -> bool:
    """Whether a part is made for a dataset's classes, and so transferred at most to the very same ones."""
    return part in (HEADS, UP)


def wanted_parts(parts: Mapping[str, Any]) -> list[str]:
    """Names of the parts in ``{"encoder": bool, "decoder_stages": [indices]}``."""
    encoder = ["encoder"] if parts.get("encoder") else []
    return encoder + [decoder_stage(int(i)) for i in sorted(parts.get("decoder_stages", ()))]
