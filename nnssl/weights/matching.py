"""Pairs the tensors of a network with those of a file, and counts what came of it."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nnssl.weights.adapt import Adaptation, adapt_tensor, resize_positions
from nnssl.weights.layout import stem_name
from nnssl.weights.parts import HEADS, UP, part_names, part_of
from nnssl.weights.report import PartReport, TransferReport
from nnssl.words import size_text

Grids = tuple[Sequence[int] | None, Sequence[int] | None]

_LEFT = {
    HEADS: "new heads for this dataset's classes",
    UP: "its widths depend on the number of classes, so that it is never transferred",
}
_STAGE = re.compile(r"(encoder|decoder)\.(?:stages|transpconvs)\.(\d+)")


@dataclass
class Matched:
    """What :func:`match` found.

    Attributes:
        found: tensors to copy, by canonical name.
        adapted: what was done to those of them that were changed.
        reasons: why the others are left out.
        stale: number of tensors whose aliases disagree in the file.
    """

    found: dict[str, Tensor] = field(default_factory=dict)
    adapted: dict[str, str] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    stale: int = 0


def _grid(recorded: Sequence[int] | None, tokens: int) -> tuple[int, ...] | None:
    """Tokens per axis: as recorded where that many there are, else a cube."""
    if recorded is not None and math.prod(recorded) == tokens:
        return tuple(int(n) for n in recorded)
    side = round(tokens ** (1 / 3))
    return (side,) * 3 if side**3 == tokens else None


def _fit(
    name: str, given: Tensor, target: Mapping[str, Tensor], how: Adaptation, grids: Grids
) -> tuple[Tensor, str] | str | None:
    """The given tensor in the shape of the network's, and what was done; None where it fits as it is; or why it cannot."""
    shape = target[name].shape
    if name.endswith("pos_embed") and given.ndim == len(shape) == 3 and given.shape[2] == shape[2]:
        old, new = _grid(grids[0], given.shape[1]), _grid(grids[1], shape[1])
        if old == new and given.shape == shape:
            return None
        if old is None or new is None:
            return (
                f"{given.shape[1]} positions in the checkpoint, {shape[1]} here; the file does not tell its patch, and only "
                "cubic token grids are then interpolated"
            )
        text = f"positions of {size_text(old)} tokens -> {size_text(new)}, interpolated"
        return resize_positions(given, old, new), text
    if given.shape == shape:
        return None
    return adapt_tensor(given, shape, how, stem=name == stem_name(target), upsampling=".transpconvs." in name)


def _projections(names: list[str]) -> list[str]:
    """The same names as a residual block has them that pools or does not: the projection's number says so."""
    swaps = ((".skip.0.", ".skip.1."), (".skip.1.", ".skip.0."))
    return [name.replace(old, new) for name in names for old, new in swaps if old in name]


def match(
    target: Mapping[str, Tensor],
    names: Mapping[str, list[str]],
    source: Mapping[str, Tensor],
    parts: list[str],
    how: Adaptation,
    grids: Grids = (None, None),
    left_out: Mapping[str, str] | None = None,
) -> Matched:
    """Pair each tensor of the network with one of the file.

    Args:
        target: the network's tensors by canonical name.
        names: canonical name -> its aliases.
        source: the file's tensors, under any of these names.
        parts: the parts that are taken.
        how: what may be adapted.
        grids: tokens per axis of the file's position embeddings and of the network's, where known.
        left_out: pretrained parts that are not taken, and why.
    """
    result = Matched()
    for name in target:
        part = part_of(name)
        if part not in parts:
            why = (left_out or {}).get(part)
            result.reasons[name] = f"left out on purpose ({why})" if why else _LEFT.get(part, "not pretrained")
            continue
        aliases = [name, *names[name]]
        known = [alias for alias in aliases if alias in source]
        if not known and how.active:
            known = [alias for alias in _projections(aliases) if alias in source]
        if not known:
            result.reasons[name] = "not in the checkpoint"
            continue
        given = source[known[0]]
        same = (source[k].data_ptr() == given.data_ptr() or torch.equal(source[k], given) for k in known[1:])
        result.stale += not all(same)
        fitted = _fit(name, given, target, how, grids)
        if fitted is None:
            result.found[name] = given
        elif isinstance(fitted, str):
            result.reasons[name] = fitted
        else:
            result.found[name], result.adapted[name] = fitted
    return result


def count(source: str, target: Mapping[str, Tensor], matched: Matched) -> TransferReport:
    """The report of what :func:`match` found, each kind of adaptation on one line."""
    parts = {name: PartReport(name) for name in part_names(target)}
    done: Counter[str] = Counter()
    for name, tensor in target.items():
        part = parts[part_of(name)]
        part.parameters += tensor.numel()
        if name not in matched.found:
            part.random += 1
            part.reasons[matched.reasons[name]] += 1
            continue
        part.parameters_loaded += tensor.numel()
        if name in matched.adapted:
            part.adapted += 1
            stage = _STAGE.match(name)
            done[f"{f'{stage[1]} stage {stage[2]}' if stage else name}: {matched.adapted[name]}"] += 1
        else:
            part.loaded += 1
    lines = [f"{text} ({n} tensor{'s' * (n > 1)})" for text, n in done.items()]
    return TransferReport(source, list(parts.values()), adaptations=lines)
