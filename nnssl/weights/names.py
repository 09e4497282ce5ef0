"""Names of tensors: which are those of nnU-Net's networks, whatever stands before them, and what others look like."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from torch import Tensor

_LAYER = r"(?:conv|norm|nonlin|all_modules)\."
"""What a convolution with its norm holds. Other networks have ``stages.0.blocks.0`` too, but not these below."""
_BLOCK = (
    rf"(?:(?:stages\.\d+\.\d+|stem)\.convs\.\d+\.{_LAYER}"
    rf"|stages\.\d+\.blocks\.\d+\.(?:(?:conv\d|skip\.\d+)\.{_LAYER}|nonlin\d\.|squeeze_excitation\.))"
)
_WHOLE = re.compile(
    rf"(?:^|(?<=\.))(?:(?:decoder\.)?encoder\.{_BLOCK}"
    r"|decoder\.(?:stages\.\d+\.convs\.\d+|transpconvs\.\d+|seg_layers\.\d+)\."
    r"|(?:eva\.(?:blocks\.\d+\.|norm\.|pos_embed|rope)|down_projection\.|up_projection\.)|mask_token$)"
)
_ENCODER_ALONE = re.compile(rf"(?:^|(?<=\.)){_BLOCK}")
_WRAPPERS = frozenset(("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"))

_KNOWN = (
    (r"(^|\.)swinViT\.", "SwinUNETR"),
    (r"(^|\.)(vit|patch_embedding)\..*|(^|\.)encoder1\.layer\.", "UNETR"),
    (r"(^|\.)enc_block_\d+\.", "MedNeXt"),
    (r"(^|\.)conv_blocks_context\.\d+\.\d+\.conv1\.", "STU-Net"),
    (r"(^|\.)down_tr\d+\.", "the U-Net of Models Genesis and SuPreM"),
    (r"(^|\.)convInit\.", "SegResNet"),
    (r"(^|\.)(input_block|downsamples\.\d+)\.conv1\.", "MONAI's DynUNet"),
    (r"(^|\.)model\.\d+\.(submodule|conv)\.", "MONAI's UNet"),
    (r"(^|\.)model_down\.", "nnFormer"),
    (r"(^|\.)image_encoder\.", "the image encoder of SAM"),
    (r"\.mamba\.", "U-Mamba"),
    (r"(^|\.)encoder\.initial_conv\.", "the residual U-Net of nnU-Net v1"),
    (r"(^|\.)(layers\d*|stages)(\.\d+)+\.blocks\.\d+\.attn\.", "a Swin transformer"),
    (r"(^|\.)blocks\.\d+\.attn\.qkv\.", "a vision transformer"),
    (r"(^|\.)layer1\.0\.conv1\.", "a ResNet"),
    (r"\.(dwconv|conv_dw)\.", "a ConvNeXt"),
)


def without_wrappers(name: str) -> str:
    """The name without what DDP, FSDP and torch.compile put into it, wherever that stands."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def own_name(name: str) -> tuple[str, str] | None:
    """Split a name into what a wrapper has put before it and the name in nnU-Net's network.

    ``"model.encoder.stem.convs.0.conv.weight"`` gives ``("model.", "encoder.stem...")``; an encoder that is stored alone
    (``"stem.convs.0..."``) gets its ``"encoder."`` back. None where nnU-Net's networks have no such name.
    """
    match = _WHOLE.search(name)
    if match:
        return name[: match.start()], name[match.start() :]
    match = _ENCODER_ALONE.search(name)
    return (name[: match.start()], f"encoder.{name[match.start() :]}") if match else None


def looks_like(names: Iterable[str]) -> str | None:
    """The network outside of nnU-Net that the names look like, or None."""
    names = list(names)
    return next((network for pattern, network in _KNOWN if any(re.search(pattern, name) for name in names)), None)


# ---- nnU-Net v1 --------------------------------------------------------------------------------------------------

_V1 = re.compile(r"(?:^|(?<=\.))(?:conv_blocks_context|conv_blocks_localization)\.\d+\.(?:\d+\.)?blocks\.\d+\.")
_V1_BLOCK = re.compile(
    r"(conv_blocks_(?:context|localization)\.\d+\.)(?:(\d+)\.)?blocks\.(\d+)\.(conv|instnorm)\.(\w+)"
)
_V1_SINGLE = re.compile(r"(tu|seg_outputs)\.(\d+)\.(\w+)")


def is_version_1(names: Iterable[str]) -> bool:
    """Whether they are names of the plain U-Net of nnU-Net v1 (``Generic_UNet``)."""
    return any(_V1.search(name) for name in names)


def from_version_1(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a ``Generic_UNet`` of nnU-Net v1 under the names of v2's PlainConvUNet, which computes the same.

    v1's transposed convolutions and heads have no bias; v2's get zeros. Names that v1's network does not have are left out, and
    whatever stands before the names.
    """
    first: dict[str, int] = {}  # convolutions in the first half of a stage that v1 keeps in two halves
    found: list[tuple[re.Match[str], Tensor]] = []
    for name, tensor in weights.items():
        match = _V1_BLOCK.search(name)
        if match:
            found.append((match, tensor))
            if match[2] == "0":
                first[match[1]] = max(first.get(match[1], 0), int(match[3]) + 1)
    renamed: dict[str, Tensor] = {}
    for match, tensor in found:
        place, stage = match[1].split(".")[:2]
        number = int(match[3]) + (first.get(match[1], 0) if match[2] == "1" else 0)
        layer = "conv" if match[4] == "conv" else "norm"
        middle = f"encoder.stages.{stage}.0" if place.endswith("context") else f"decoder.stages.{stage}"
        renamed[f"{middle}.convs.{number}.{layer}.{match[5]}"] = tensor
    for name, tensor in weights.items():
        match = _V1_SINGLE.search(name)
        if match:
            place = "transpconvs" if match[1] == "tu" else "seg_layers"
            renamed[f"decoder.{place}.{match[2]}.{match[3]}"] = tensor
            if match[3] == "weight":
                zeros = tensor.new_zeros(tensor.shape[1 if place == "transpconvs" else 0])
                renamed.setdefault(f"decoder.{place}.{match[2]}.bias", zeros)
    return renamed
