"""From ``-o key=value``, YAML and JSON to frozen dataclasses, and back to text for ``--list``.

A field's annotation and its :func:`option` say what is legal; what is not is named with what is wanted (:mod:`nnssl.fields`).
"""

from __future__ import annotations

import numbers
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, Field, asdict, field, fields, is_dataclass
from typing import Any, TypeVar

from nnssl.errors import ProblemsError, did_you_mean, raise_problems
from nnssl.fields import (
    LARGEST,
    Wanted,
    anything,
    choice,
    flag,
    interval,
    listing,
    mapping,
    misfit,
    number,
    shown,
    whole,
)

__all__ = [
    "build",
    "config_dict",
    "describe_options",
    "make_config",
    "option",
    "parse_assignments",
    "problems_of",
    "split_options",
    "unknown_keys",
]

C = TypeVar("C")
FLAGS = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}
NOTHING = ("none", "auto", "")
"""Texts that leave an option to be chosen."""


def option(
    default: Any,
    help: str = "",
    *,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    below: float | None = None,
    choices: tuple = (),
    was: str = "",
) -> Any:
    """A field of a config dataclass that ``--list`` can explain and every way of setting it checks.

    Args:
        default: the value where none is given; the annotation decides how text is read.
        help: one line on meaning and unit.
        low, high: range of a number, or of each of a tuple, ends included.
        above, below: ends that are not included, in place of these.
        choices: the legal values of a string.
        was: its name before, which is still taken.
    """
    about = {"help": help, "low": low, "high": high, "above": above, "below": below, "choices": choices, "was": was}
    if isinstance(default, (dict, list)):
        return field(default_factory=lambda: type(default)(default), metadata=about)
    return field(default=default, metadata=about)


def parse_assignments(items: list[str] | None) -> dict[str, str]:
    """``["lr=1e-3", "preset=paper"]`` -> ``{"lr": "1e-3", "preset": "paper"}``.

    Raises:
        NnsslError: for an item without ``=`` or an option given twice.
    """
    out: dict[str, str] = {}
    problems = []
    for item in items or []:
        key, sep, value = item.partition("=")
        if not sep or not key:
            problems.append(f"'{item}' is not of the form key=value")
        elif key in out and out[key] != value:
            problems.append(f"'{key}' is given twice, as {out[key]} and {value}")
        out[key] = value
    raise_problems(problems, "option -o")
    return out


def split_options(given: Mapping[str, Any], configs: list[type]) -> list[dict[str, Any]]:
    """Sort options by the dataclass that has them.

    Raises:
        NnsslError: for unknown names, each with the nearest known one.
    """
    for config in configs:
        given = _current_names(config, given)
    known = [{f.name for f in fields(c)} for c in configs]
    out: list[dict[str, Any]] = [{} for _ in configs]
    problems = []
    for key, value in given.items():
        homes = [i for i, names in enumerate(known) if key in names]
        if homes:
            out[homes[0]][key] = value
        else:
            problems += unknown_keys([key], set().union(*known), what="option")
    raise_problems(problems, "option -o")
    return out


def _current_names(cls: type, given: Mapping[str, Any]) -> dict[str, Any]:
    """Options under their names of now."""
    now = {f.metadata["was"]: f.name for f in fields(cls) if f.metadata.get("was")}
    twice = [(old, new) for old, new in now.items() if old in given and new in given and given[old] != given[new]]
    problems = [
        f"'{new}' is given twice, as {given[new]} and, by its old name {old}, {given[old]}" for old, new in twice
    ]
    raise_problems(problems, "option -o")
    return {now.get(key, key): value for key, value in given.items()}


def unknown_keys(given: Iterable[str], known: Iterable[str], where: str = "", what: str = "key") -> list[str]:
    """One sentence for each key that is not known, with the nearest one that is."""
    names = sorted(known)
    listed = f" There are: {', '.join(names)}" if what == "key" else ""
    unknown = [k for k in map(str, given) if k not in names]
    cut = [k for k in unknown if k.isdecimal()] if what == "key" else []
    problems = [f"{where}unknown {what} '{k}'.{did_you_mean(k, names)}{listed}" for k in unknown if k not in cut]
    if cut:  # {features: 8,16,32} is the number 8 and two more keys in YAML
        problems.append(
            f"{where}{', '.join(cut)}: between braces a list has brackets, such as {{features: [8, 16, 32]}}"
        )
    return problems


def _wanted(cls: type) -> dict[str, tuple[Any, Wanted]]:
    """Annotation and what is legal, by field."""
    hints = typing.get_type_hints(cls)
    return {f.name: (hints[f.name], _legal(hints[f.name], f.metadata)) for f in fields(cls)}


def _optional(hint: Any) -> Any:
    """``X`` of ``X | None``, else None."""
    if typing.get_origin(hint) not in (typing.Union, types.UnionType):
        return None
    return next(a for a in typing.get_args(hint) if a is not type(None))


def _legal(hint: Any, about: Mapping[str, Any]) -> Wanted:
    """What a field with this annotation and these limits takes."""
    inner, origin = _optional(hint), typing.get_origin(hint)
    if inner is not None:
        legal = _legal(inner, about)
        return Wanted(f"{legal.words}, or auto", lambda value: value is None or legal.fits(value), False, legal.choices)
    if origin is tuple:
        return listing(_legal(typing.get_args(hint)[0], about))
    if about.get("choices"):
        return choice(about["choices"])
    limits = {key: about.get(key) for key in ("low", "high")}
    if hint is int:
        return whole(**limits)
    if hint is float:
        return number(about.get("above"), about.get("below"), **limits)
    if hint is str:
        return Wanted("text", lambda value: isinstance(value, str))
    return flag if hint is bool else mapping() if dict in (hint, origin) else anything


def _read(hint: Any, value: Any, text: bool) -> Any:
    """The value in the annotated type, as far as it can be read as that; what cannot is returned as it is."""
    inner, origin = _optional(hint), typing.get_origin(hint)
    if inner is not None:
        nothing = text and isinstance(value, str) and value.lower() in NOTHING
        return None if value is None or nothing else _read(inner, value, text)
    if origin is tuple:
        if text and isinstance(value, str):
            value = [] if value.lower() in NOTHING else [part.strip() for part in value.strip("[]() ").split(",")]
        parts = value if isinstance(value, (list, tuple)) else [value]
        return tuple(_read(typing.get_args(hint)[0], part, text) for part in parts)
    if hint is bool:
        return FLAGS.get(str(value).lower(), value) if text else value
    if hint in (int, float):
        value = _number(value) if text else value
        return hint(value) if _real(value) and (hint is float or value == int(value)) else value
    if hint is str and not isinstance(value, (Mapping, list, tuple, bool, type(None))):
        return str(value)  # a number or a date in YAML
    if dict in (hint, origin) and isinstance(value, Mapping):
        return {str(k): _number(v) for k, v in value.items()}
    return value


def _real(value: Any) -> bool:
    """Whether it is a number, numpy's too, of a size that can be counted with."""
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    return real and abs(value) <= LARGEST


def _number(value: Any) -> Any:
    """A number where the text is one (YAML reads ``1e-3`` as text), everything else as it is."""
    if isinstance(value, str):
        for kind in (int, float):
            try:
                return kind(value)
            except ValueError:
                continue
    return value


def problems_of(
    cls: type, given: Mapping[str, Any], where: str = "", *, text: bool = True
) -> tuple[dict[str, Any], list[str]]:
    """Read values for the fields of a dataclass: those values, and one sentence for each that is not legal.

    Args:
        cls: a dataclass.
        given: values by field; a field that is a dataclass itself takes one or a mapping.
        where: what a field's name begins with in a message.
        text: whether numbers and flags may be written as text, as on a command line and in YAML.
    """
    out, problems = {}, []
    for name, (hint, wanted) in _wanted(cls).items():
        if name not in given:
            continue
        value = given[name]
        if isinstance(hint, type) and is_dataclass(hint) and not isinstance(value, hint):
            try:
                out[name] = build(hint, value, f"{where}{name}: ")
            except ProblemsError as error:
                problems += error.problems
            continue
        out[name] = _read(hint, value, text)
        if not wanted.fits(out[name]):
            problems.append(f"{where}{misfit(name, wanted, value)}")
    return out, problems


def build(cls: type[C], given: Any, where: str = "", what: str = "the file") -> C:
    """Make a dataclass of a mapping, as YAML holds it.

    Args:
        cls: a frozen dataclass whose fields are the keys.
        given: values that are already of the right type are taken as they are.
        where: what the messages begin with, for example ``"training: "``.
        what: what they belong to.

    Raises:
        NnsslError: lists every unknown key and every value of a wrong type or out of range.
    """
    if not isinstance(given, Mapping):
        example = f"keys such as '{next(iter(_wanted(cls)))}: ...' are wanted, not {shown(given)}"
        raise_problems([f"{where.rstrip(': ') or what}: {example}"], what)
    out, problems = problems_of(cls, given, where)
    raise_problems([*unknown_keys(given, _wanted(cls), where), *problems], what)
    return cls(**out)


def make_config(cls: type[C], values: Mapping[str, Any], preset: Mapping[str, Any] | None = None) -> C:
    """Build a config dataclass from text or typed values, over a preset, over the defaults.

    Raises:
        NnsslError: lists every value of a wrong type or outside of its range.
    """
    merged = {**_current_names(cls, preset or {}), **_current_names(cls, values)}
    out, problems = problems_of(cls, merged)
    raise_problems([*unknown_keys(merged, _wanted(cls), what="option"), *problems], "option -o")
    return cls(**out)


def _range(field: Field) -> str:
    about = field.metadata
    if about.get("choices"):
        return " | ".join(map(str, about["choices"]))
    return interval(*(about.get(key) for key in ("low", "high", "above", "below")))


def describe_options(cls: type) -> list[tuple[str, str, str, str]]:
    """Rows ``(name, default, range, meaning)`` of a config dataclass."""
    rows = []
    for f in fields(cls):
        default = f.default_factory() if f.default_factory is not MISSING else f.default
        text = ",".join(map(str, default)) if isinstance(default, tuple) else str(default)
        if isinstance(default, float) and len(text) > 8:
            text = f"{default:.4g}"
        rows.append((f.name, "auto" if default is None else text, _range(f), f.metadata.get("help", "")))
    return rows


def config_dict(config: Any) -> dict[str, Any]:
    """A config as JSON-ready values (tuples become lists)."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(config).items()}
