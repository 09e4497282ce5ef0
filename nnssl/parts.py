"""The parts of a network that weights are counted by, and which of its tensors belong to which.

Of a Primus these are the encoder (embedding and transformer) and the up-projection, whose widths depend on the number of classes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

_STAGE = re.compile(r"(\w+) stage (\d+)")
_DECODER_STAGE = re.compile(r"decoder\.(?:transpconvs|stages)\.(\d+)\.")
_ENCODER_NAMES = ("encoder.", "decoder.encoder.", "down_projection.", "eva.")


class Part(str):
    """A part of a network or a stage of one: ``Part("encoder")``, ``Part("decoder stage 0")``, ``Part("seg_layers")``.

    It is the very text that reports, plans and checkpoints hold, and knows what the text says. ``str(part)`` is plain text, for
    files that may hold nothing else (``torch.load(weights_only=True)``).

    Attributes:
        kind: the first word: ``"encoder"``, ``"decoder"``, ``"seg_layers"``, ``"up_projection"`` or ``"other"``.
        stage: its number; None of a part that is no stage. Encoder stages are counted from the image down, decoder stages from
            the lowest resolution up; to these belongs the transposed convolution before them.
    """

    kind: str
    stage: int | None

    def __new__(cls, text: str) -> Part:  # noqa: D102
        part = super().__new__(cls, text)
        found = _STAGE.fullmatch(text)
        part.kind = text.split(" ")[0]
        part.stage = int(found[2]) if found else None
        return part

    @property
    def is_head(self) -> bool:
        """Whether it is made for a dataset's classes, and so transferred at most to the very same ones."""
        return self.kind in (HEADS, UP)


ENCODER = Part("encoder")
DECODER = "decoder"
"""The kind of all decoder stages."""
HEADS = Part("seg_layers")
UP = Part("up_projection")
OTHER = Part("other")
_ORDER = (ENCODER, DECODER, OTHER, UP, HEADS)


def encoder_stage(index: int) -> Part:
    """A stage of the encoder; 0 has the image's resolution."""
    return Part(f"{ENCODER} stage {index}")


def decoder_stage(index: int) -> Part:
    """A stage of the decoder; 0 is the lowest resolution."""
    return Part(f"{DECODER} stage {index}")


def part_of(name: str) -> Part:
    """The part that a tensor of the state dict belongs to.

    Args:
        name: any of the tensor's names, ``decoder.encoder...`` included; ``"other"`` for what no network of nnU-Net has.
    """
    if name.startswith(_ENCODER_NAMES):
        return ENCODER
    if name.startswith("up_projection.") or name == "mask_token":
        return UP
    if name.startswith("decoder.seg_layers."):
        return HEADS
    stage = _DECODER_STAGE.match(name)
    return decoder_stage(int(stage[1])) if stage else OTHER


def part_names(names: Iterable[str]) -> list[Part]:
    """The parts of the given tensor names, in the order of computation, heads last."""
    return sorted({part_of(name) for name in names}, key=lambda part: (_ORDER.index(part.kind), part.stage or 0))


def is_head(part: str) -> bool:
    """Whether a part is made for a dataset's classes, and so transferred at most to the very same ones."""
    return Part(part).is_head


def promised_parts(promise: Mapping[str, Any]) -> list[Part]:
    """The parts in ``{"encoder": bool, "decoder_stages": [indices from the bottom]}``, the form of a promise."""
    encoder = [ENCODER] if promise.get("encoder") else []
    return encoder + [decoder_stage(i) for i in sorted(map(int, promise.get("decoder_stages", ())))]
