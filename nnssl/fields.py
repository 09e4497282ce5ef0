"""Checks the fields of JSON that others wrote: each wrong one is named with what is wanted, before anything is made of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from nnssl.errors import raise_problems

__all__ = ["Wanted", "anything", "check_fields", "flag", "listing", "mapping", "number", "optional", "text", "whole"]


@dataclass(frozen=True)
class Wanted:
    """What a field must be.

    Attributes:
        words: for a person.
        fits: whether a value is that.
        needed: whether the field must be there.
    """

    words: str
    fits: Callable[[Any], bool]
    needed: bool = True


def whole(low: int | None = None, high: int = 2**53) -> Wanted:
    """A whole number from ``low`` to ``high``; ``8.0`` counts as 8, true does not."""

    def fits(value: Any) -> bool:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= high:
            return False
        return value == int(value) and (low is None or value >= low)

    limits = ("" if low is None else f" of at least {low}") + ("" if high == 2**53 else f" and at most {high}")
    return Wanted(f"a whole number{limits}", fits)


def number(above: float | None = None) -> Wanted:
    """A finite number, greater than ``above``."""

    def fits(value: Any) -> bool:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or abs(value) > 1e300:
            return False
        return math.isfinite(value) and (above is None or value > above)

    return Wanted("a number" + ("" if above is None else f" above {above:g}"), fits)


text = Wanted("text", lambda value: isinstance(value, str) and value != "")
flag = Wanted("true or false", lambda value: isinstance(value, bool))
anything = Wanted("anything", lambda value: True)


def mapping(keys: Wanted | None = None, values: Wanted | None = None) -> Wanted:
    """Keys and values, each as wanted."""

    def fits(value: Any) -> bool:
        return isinstance(value, Mapping) and all(
            (keys is None or keys.fits(k)) and (values is None or values.fits(v)) for k, v in value.items()
        )

    return Wanted("keys and values" + ("" if values is None else f", each value {values.words}"), fits)


def listing(item: Wanted, lengths: tuple[int, ...] = ()) -> Wanted:
    """A list of such items, of one of the lengths."""

    def fits(value: Any) -> bool:
        return (
            isinstance(value, (list, tuple)) and (not lengths or len(value) in lengths) and all(map(item.fits, value))
        )

    many = f" of {' or '.join(map(str, lengths))}" if lengths else ""
    return Wanted(f"a list{many}, each {item.words}", fits)


def optional(wanted: Wanted) -> Wanted:
    """The same, or null, or not there."""
    return Wanted(f"{wanted.words}, or null", lambda value: value is None or wanted.fits(value), needed=False)


def check_fields(content: Any, wanted: Mapping[str, Wanted], what: str, prefix: str = "") -> None:
    """Refuse a mapping of which fields are missing or of a wrong kind.

    Args:
        content: read from JSON.
        wanted: by field.
        what: the file, or what it holds; begins the message.
        prefix: of the fields' names, for example ``"architecture."``.

    Raises:
        NnsslError: lists all fields that are wrong.
    """
    if not isinstance(content, Mapping):
        raise_problems([f"'{prefix.rstrip('.')}' must be keys and values, not {_shown(content)}"], what)
    problems = []
    for name, want in wanted.items():
        if name not in content:
            problems += [f"'{prefix}{name}' is missing"] if want.needed else []
        elif not want.fits(content[name]):
            problems.append(f"'{prefix}{name}' must be {want.words}, not {_shown(content[name])}")
    raise_problems(problems, what)


def _shown(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."
