"""What a state dict tells about its network: class, depth, widths, channels; and the pairing of stages of two depths."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

_STEMS = (
    *("encoder.stem.convs.0.conv.weight", "encoder.stages.0.0.convs.0.conv.weight"),
    *("down_projection.proj.weight", "down_projection.stem.blocks.0.conv1.conv.weight"),
)
_ENCODER = re.compile(r"encoder\.stages\.(\d+)\.")
_BLOCK = re.compile(r"eva\.blocks\.(\d+)\.")
_DECODER = re.compile(r"(decoder\.(?:stages|transpconvs)\.)(\d+)(\..*)")


def n_stages(weights: Mapping[str, Any]) -> int:
    """Number of encoder stages."""
    return len({match.group(1) for name in weights if (match := _ENCODER.match(name))})


def n_blocks(weights: Mapping[str, Any]) -> int:
    """Number of transformer blocks; 0 in a U-Net."""
    return len({match.group(1) for name in weights if (match := _BLOCK.match(name))})


def is_transformer(weights: Mapping[str, Any]) -> bool:
    """Whether they are of a network of tokens, as Primus is."""
    return any(name.startswith("eva.") for name in weights)


def describe(weights: Mapping[str, Any]) -> str:
    """Class and depth, from the names: ``"PlainConvUNet with 6 stages"``, ``"Primus with 12 blocks"``."""
    if is_transformer(weights):
        skips = any(n.startswith("down_projection.proj_to_tokens.") for n in weights)
        deep = "PrimusV3" if skips else "PrimusV2" if "down_projection.final_proj.weight" in weights else "Primus"
        return f"{deep} with {n_blocks(weights)} blocks"
    kind = "ResidualEncoderUNet" if any(n.startswith("encoder.stem.") for n in weights) else "PlainConvUNet"
    count = n_stages(weights)
    return f"{kind} with {count} stages" if count else "network of another kind"


def stem_name(weights: Mapping[str, Any]) -> str | None:
    """Name of the first convolution's weight."""
    return next((name for name in _STEMS if name in weights), None)


def stem_channels(weights: Mapping[str, Tensor]) -> int | None:
    """Image channels."""
    name = stem_name(weights)
    return int(weights[name].shape[1]) if name else None


def dimensions(weights: Mapping[str, Tensor]) -> int | None:
    """Spatial axes of the convolutions, the first or, where that is missing, any other of the encoder."""
    name = stem_name(weights) or next(
        (n for n in weights if n.startswith("encoder.") and n.endswith("conv.weight")), None
    )
    return weights[name].ndim - 2 if name else None


def widths(weights: Mapping[str, Tensor]) -> list[int]:
    """Channels after each encoder stage, highest resolution first; of a transformer the one length of its tokens."""
    if "eva.norm.weight" in weights:
        return [int(weights["eva.norm.weight"].shape[0])]
    found: dict[int, int] = {}
    for name, tensor in weights.items():
        match = _ENCODER.match(name)
        if match and name.endswith("conv.weight"):
            found.setdefault(int(match.group(1)), int(tensor.shape[0]))
    return [found[stage] for stage in sorted(found)]


def shift_stages(weights: Mapping[str, Tensor], by: int) -> dict[str, Tensor]:
    """Rename decoder stages, which are counted from the bottleneck up, as a network with ``by`` more encoder stages names them.

    Stages below that network's bottleneck fall out. Encoder stages are counted from the image down and keep their names.
    """
    renamed = {}
    for name, tensor in weights.items():
        match = _DECODER.fullmatch(name)
        if match is None:
            renamed[name] = tensor
        elif int(match.group(2)) + by >= 0:
            renamed[f"{match.group(1)}{int(match.group(2)) + by}{match.group(3)}"] = tensor
    return renamed


def shift_parts(parts: Mapping[str, Any], by: int) -> dict[str, Any]:
    """The same for ``{"encoder": bool, "decoder_stages": [indices]}``."""
    stages = [int(i) + by for i in parts.get("decoder_stages", ()) if int(i) + by >= 0]
    return {**parts, "decoder_stages": stages}
