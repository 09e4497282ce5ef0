"""What a state dict tells about its network, and the pairing of stages of two depths."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from nnssl.parts import DECODER, Part, decoder_stage

_STEMS = (
    *("encoder.stem.convs.0.conv.weight", "encoder.stages.0.0.convs.0.conv.weight"),
    *("down_projection.proj.weight", "down_projection.stem.blocks.0.conv1.conv.weight"),
)
_ENCODER = re.compile(r"encoder\.stages\.(\d+)\.")
_BLOCK = re.compile(r"eva\.blocks\.(\d+)\.")
_DECODER = re.compile(r"(decoder\.(?:stages|transpconvs)\.)(\d+)(\..*)")


@dataclass(frozen=True)
class Layout:
    """Class, depth and widths of a network, from the names and shapes of its tensors.

    Attributes:
        kind: ``"PlainConvUNet"``, ``"ResidualEncoderUNet"``, ``"Primus"``, ``"PrimusV2"``, ``"PrimusV3"`` or ``"network"``.
        stages: number of encoder stages; 0 in a transformer.
        blocks: number of transformer blocks; 0 in a U-Net.
        widths: channels after each encoder stage, highest resolution first; of a transformer the one length of its tokens.
        stem: name of the first convolution's weight; None where that is missing.
        channels: of the image; None without the first convolution.
        dim: spatial axes of the convolutions, the first or, where that is missing, any other of the encoder.
    """

    kind: str
    stages: int
    blocks: int
    widths: tuple[int, ...]
    stem: str | None
    channels: int | None
    dim: int | None

    @classmethod
    def of(cls, weights: Mapping[str, Tensor]) -> Layout:
        """The layout of a state dict by nnU-Net's names."""
        stages = {int(match[1]) for match in map(_ENCODER.match, weights) if match}
        blocks = {match[1] for match in map(_BLOCK.match, weights) if match}
        widths: dict[int, int] = {}
        for name, tensor in weights.items():
            match = _ENCODER.match(name)
            if match and name.endswith("conv.weight"):
                widths.setdefault(int(match[1]), int(tensor.shape[0]))
        if "eva.norm.weight" in weights:
            widths = {0: int(weights["eva.norm.weight"].shape[0])}
        stem = next((name for name in _STEMS if name in weights), None)
        conv = stem or next((n for n in weights if n.startswith("encoder.") and n.endswith("conv.weight")), None)
        return cls(
            kind=_kind(weights, bool(stages)),
            stages=len(stages),
            blocks=len(blocks),
            widths=tuple(widths[stage] for stage in sorted(widths)),
            stem=stem,
            channels=int(weights[stem].shape[1]) if stem else None,
            dim=weights[conv].ndim - 2 if conv else None,
        )

    @property
    def is_transformer(self) -> bool:
        """Whether it is a network of tokens."""
        return self.kind.startswith("Primus")

    def same_widths(self, other: Layout) -> bool:
        """Whether the stages that both have are equally wide."""
        return all(a == b for a, b in zip(self.widths, other.widths))

    def __str__(self) -> str:
        if self.is_transformer:
            return f"{self.kind} with {self.blocks} blocks"
        return f"{self.kind} with {self.stages} stages" if self.stages else "network of another kind"


def _kind(names: Collection[str], stages: bool) -> str:
    def any_begins(start: str) -> bool:
        return any(name.startswith(start) for name in names)

    if any_begins("eva."):
        if any_begins("down_projection.proj_to_tokens."):
            return "PrimusV3"
        return "PrimusV2" if "down_projection.final_proj.weight" in names else "Primus"
    if not stages:
        return "network"
    return "ResidualEncoderUNet" if any_begins("encoder.stem.") else "PlainConvUNet"


def same_tensor(a: Tensor, b: Tensor) -> bool:
    """Equal shape and values; the same memory is recognised without looking at them."""
    return a.shape == b.shape and (a.data_ptr() == b.data_ptr() or torch.equal(a, b))


def shift_stages(weights: Mapping[str, Tensor], by: int) -> dict[str, Tensor]:
    """Rename decoder stages, which are counted from the bottleneck up, as a network with ``by`` more encoder stages names them.

    Stages below that network's bottleneck fall out. Encoder stages are counted from the image down and keep their names.
    """
    renamed = {}
    for name, tensor in weights.items():
        match = _DECODER.fullmatch(name)
        if match is None:
            renamed[name] = tensor
        elif int(match[2]) + by >= 0:
            renamed[f"{match[1]}{int(match[2]) + by}{match[3]}"] = tensor
    return renamed


def shift_parts(parts: Iterable[Part], by: int) -> list[Part]:
    """The same for parts."""
    shifted = []
    for part in parts:
        if part.kind != DECODER or part.stage is None:
            shifted.append(part)
        elif part.stage + by >= 0:
            shifted.append(decoder_stage(part.stage + by))
    return shifted
