"""What a value must be, in words and as a check: of options, of experiment files, and of JSON that others wrote."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nnssl.errors import did_you_mean, raise_problems

LARGEST = 2**63 - 1
"""What is larger is no number that anything here counts with."""


@dataclass(frozen=True)
class Wanted:
    """What a field must be."""

    words: str  # for a person
    fits: Callable[[Any], bool]
    needed: bool = True  # whether the field must be there
    choices: tuple[str, ...] = ()  # the legal texts, where there are few


def whole(low: float | None = None, high: float | None = None) -> Wanted:
    """A whole number from ``low`` to ``high``; ``8.0`` counts as 8, true does not."""
    least, most = -LARGEST if low is None else low, LARGEST if high is None else high

    def fits(value: Any) -> bool:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= LARGEST:
            return False
        return value == int(value) and least <= value <= most

    return Wanted(f"a whole number{_limits(low, high)}", fits)


def number(
    above: float | None = None, below: float | None = None, *, low: float | None = None, high: float | None = None
) -> Wanted:
    """A finite number, greater than ``above``, at least ``low``, at most ``high``, less than ``below``."""

    def fits(value: Any) -> bool:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or abs(value) > 1e300:
            return False
        inside = (low is None or value >= low) and (high is None or value <= high)
        return math.isfinite(value) and inside and (above is None or value > above) and (below is None or value < below)

    return Wanted(f"a number{_limits(low, high, above, below)}", fits)


def choice(values: Sequence[Any]) -> Wanted:
    """One of several values."""
    return Wanted(" or ".join(map(repr, values)), lambda value: value in values, choices=tuple(map(str, values)))


def interval(
    low: float | None = None, high: float | None = None, above: float | None = None, below: float | None = None
) -> str:
    """``[0, 1)``, ``>= 0``, ``< 1`` or nothing."""
    left, right = (low if above is None else above), (high if below is None else below)
    if left is None and right is None:
        return ""
    if right is None:
        return f"{'>=' if above is None else '>'} {left}"
    if left is None:
        return f"{'<=' if below is None else '<'} {right}"
    return f"{'[' if above is None else '('}{left}, {right}{']' if below is None else ')'}"


def _limits(*limits: float | None) -> str:
    text = interval(*limits)
    for sign, words in ((">= ", " of at least "), ("<= ", " of at most "), ("> ", " above "), ("< ", " below ")):
        if text.startswith(sign):
            return f"{words}{text.removeprefix(sign)}"
    return f" in {text}" if text else ""


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
    """Refuse a mapping, read from JSON, of which fields are missing or of a wrong kind.

    ``what`` is the file, or what it holds, and begins the message; ``prefix`` the fields' names, as in ``"architecture."``.

    Raises:
        NnsslError: lists all fields that are wrong.
    """
    raise_problems(field_problems(content, wanted, prefix), what)


def field_problems(content: Any, wanted: Mapping[str, Wanted], prefix: str = "") -> list[str]:
    """One sentence for each field of a mapping that is missing or of a wrong kind, as :func:`check_fields` lists them."""
    if not isinstance(content, Mapping):
        return [f"'{prefix.rstrip('.')}' must be keys and values, not {shown(content)}"]
    problems = []
    for name, want in wanted.items():
        if name not in content:
            problems += [f"'{prefix}{name}' is missing"] if want.needed else []
        elif not want.fits(content[name]):
            problems.append(misfit(f"{prefix}{name}", want, content[name]))
    return problems


def misfit(name: str, wanted: Wanted, value: Any) -> str:
    """The sentence on a value that is not what is wanted; a text that is nearly one of the choices gets that one named."""
    near = did_you_mean(value, wanted.choices) if isinstance(value, str) and wanted.choices else ""
    return f"'{name}' must be {wanted.words}, not {shown(value)}{f'.{near}' if near else ''}"


def shown(value: Any) -> str:
    """A value in a message: short, however large or deep it is."""
    try:
        short = reprlib.repr(value) if isinstance(value, (Mapping, list, tuple)) else repr(value)
    except ValueError:
        return "a number of thousands of digits"
    return short if len(short) <= 60 else f"{short[:57]}..."
