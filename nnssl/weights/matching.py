"""Pairs the tensors of a network with those of a file, and counts what came of it."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from nnssl.parts import HEADS, UP, Part, part_names, part_of
from nnssl.weights.adapt import Adaptation, adapt_tensor, resize_positions
from nnssl.weights.layout import Layout, same_tensor
from nnssl.weights.report import PartReport, TransferReport
from nnssl.words import counted, size_text

_LEFT = {
    HEADS: "new heads for this dataset's classes",
    UP: "its widths depend on the number of classes, so that it is never transferred",
}
_STAGE = re.compile(r"(encoder|decoder)\.(?:stages|transpconvs)\.(\d+)")


@dataclass(frozen=True)
class Rules:
    """Which tensors are paired, and what may be done to them."""

    parts: Collection[Part]
    left_out: Mapping[Part, str]
    """Pretrained parts that are not taken, and why."""
    how: Adaptation
    grids: tuple[Sequence[int] | None, Sequence[int] | None]
    """Tokens per axis of the file's position embeddings and of the network's, where known."""


@dataclass
class Matched:
    """Tensors to copy, by canonical name; what was done to those that were changed; why the others are left out."""

    found: dict[str, Tensor] = field(default_factory=dict)
    adapted: dict[str, str] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    stale: int = 0  # tensors whose aliases disagree in the file


def _grid(recorded: Sequence[int] | None, tokens: int) -> tuple[int, ...] | None:
    """Tokens per axis: as recorded where that many there are, else a cube."""
    if recorded is not None and math.prod(recorded) == tokens:
        return tuple(int(n) for n in recorded)
    side = round(tokens ** (1 / 3))
    return (side,) * 3 if side**3 == tokens else None


def _fit(name: str, given: Tensor, wanted: Tensor, rules: Rules, stem: bool) -> tuple[Tensor, str] | str | None:
    """The given tensor in the shape of the network's, and what was done; None where it fits as it is; or why it cannot."""
    shape = wanted.shape
    if name.endswith("pos_embed") and given.ndim == len(shape) == 3 and given.shape[2] == shape[2]:
        old, new = _grid(rules.grids[0], given.shape[1]), _grid(rules.grids[1], shape[1])
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
    return adapt_tensor(given, shape, rules.how, stem=stem, upsampling=".transpconvs." in name)


def _projections(names: list[str]) -> list[str]:
    """The same names as a residual block has them that pools or does not: the projection's number says so."""
    swaps = ((".skip.0.", ".skip.1."), (".skip.1.", ".skip.0."))
    return [name.replace(old, new) for name in names for old, new in swaps if old in name]


def match(
    target: Mapping[str, Tensor], aliases: Mapping[str, str], source: Mapping[str, Tensor], rules: Rules
) -> Matched:
    """Pair each tensor of the network, by canonical name, with one of the file, under any of its ``aliases``.

    ``aliases``: every name of the network's tensors -> its canonical one, which comes first.
    """
    result, stem = Matched(), Layout.of(target).stem
    names: dict[str, list[str]] = defaultdict(list)
    for alias, name in aliases.items():
        names[name].append(alias)
    for name, wanted in target.items():
        part = part_of(name)
        if part not in rules.parts:
            why = rules.left_out.get(part)
            result.reasons[name] = f"left out on purpose ({why})" if why else _LEFT.get(part, "not pretrained")
            continue
        known = [alias for alias in names[name] if alias in source]
        if not known and rules.how.active:
            known = [alias for alias in _projections(names[name]) if alias in source]
        if not known:
            result.reasons[name] = "not in the checkpoint"
            continue
        given = source[known[0]]
        result.stale += not all(same_tensor(source[alias], given) for alias in known[1:])
        fitted = _fit(name, given, wanted, rules, stem=name == stem)
        if fitted is None:
            result.found[name] = given
        elif isinstance(fitted, str):
            result.reasons[name] = fitted
        else:
            result.found[name], result.adapted[name] = fitted
    return result


def count(source: str, target: Mapping[str, Tensor], matched: Matched) -> TransferReport:
    """The report of what :func:`match` found, each kind of adaptation on one line."""
    parts = {part: PartReport(part) for part in part_names(target)}
    done: Counter[str] = Counter()
    for name, tensor in target.items():
        row = parts[part_of(name)]
        row.parameters += tensor.numel()
        if name not in matched.found:
            row.random += 1
            row.reasons[matched.reasons[name]] += 1
            continue
        row.parameters_loaded += tensor.numel()
        if name in matched.adapted:
            row.adapted += 1
            stage = _STAGE.match(name)
            done[f"{f'{stage[1]} stage {stage[2]}' if stage else name}: {matched.adapted[name]}"] += 1
        else:
            row.loaded += 1
    lines = [f"{text} ({counted(n, 'tensor')})" for text, n in done.items()]
    return TransferReport(source, list(parts.values()), adaptations=lines)
