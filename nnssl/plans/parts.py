"""Which of a checkpoint's pretrained parts a segmentation network gets: the words for it, and who decides.

A method names a default with its reason (``Method.default_transfer`` of :mod:`nnssl.pretrain.methods`), the checkpoint carries
it, and a plan (``nnssl_plan --parts``) overrules it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nnssl.errors import NnsslError, did_you_mean
from nnssl.parts import ENCODER, Part, decoder_stage, promised_parts

CHOICES = ("default", "encoder", "encoder+bottom", "all")
"""What ``--parts`` takes: the default that the checkpoint names, the encoder alone, with it the decoder stage of the lowest
resolution, or everything that was pretrained."""
HEADS_ONLY = ("head_only", "linear_probe")
"""Schedules that train nothing below the heads: a random decoder would stay random, so that all pretrained parts come."""


def check_parts(choice: str) -> str:
    """Return ``choice`` where it is one of :data:`CHOICES`; else raise :class:`NnsslError` with the nearest."""
    if choice not in CHOICES:
        raise NnsslError(f"parts '{choice}': it can be {', '.join(CHOICES)}.{did_you_mean(str(choice), CHOICES)}")
    return choice


def parts_for(metadata: Mapping[str, Any], schedule: str | None = None) -> str:
    """What ``plans["nnssl"]`` asks for: its ``parts``, else everything where only heads are trained, else the default.

    ``schedule`` is the one that is followed, by default the one that ``metadata`` names.
    """
    if metadata.get("parts") is not None:
        return check_parts(str(metadata["parts"]))
    return "all" if (schedule or metadata.get("schedule")) in HEADS_ONLY else "default"


def select_parts(held: Sequence[Part], choice: str | Mapping[str, Any], default: str = "all") -> list[Part]:
    """The parts to take from a file.

    Args:
        held: those that the file holds.
        choice: one of :data:`CHOICES`, or ``{"encoder": bool, "decoder_stages": [indices from the bottom]}``.
        default: what ``"default"`` stands for.

    Raises:
        NnsslError: a part that was not pretrained is asked for, or an unknown word.
    """
    if isinstance(choice, Mapping):
        wanted = promised_parts(choice)
    else:
        word = check_parts(default if check_parts(choice) == "default" else choice)
        if word in ("all", "default"):
            return list(held)
        wanted = [ENCODER, decoder_stage(0)] if word == "encoder+bottom" else [ENCODER]
    missing = [part for part in wanted if part not in held]
    if missing:
        raise NnsslError(
            f"parts '{choice}' ask for {', '.join(missing)}, which the checkpoint has not pretrained. It holds: "
            f"{', '.join(held)}."
        )
    return wanted
