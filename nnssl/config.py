"""From ``-o key=value`` to the frozen dataclasses of the method and the engine, and back to text for ``--list``."""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, Field, asdict, field, fields
from typing import Any, TypeVar

from nnssl.errors import nearest, raise_problems

__all__ = ["config_dict", "describe_options", "make_config", "option", "parse_assignments", "split_options"]

C = TypeVar("C")


def option(default: Any, help: str, *, low: float | None = None, high: float | None = None, choices: tuple = ()) -> Any:
    """A field of a config dataclass that ``--list`` can explain and ``-o`` can check.

    Args:
        default: the value without ``-o``; its type (or the annotation) decides how text is parsed.
        help: one line on meaning and unit.
        low, high: inclusive range of a number.
        choices: the legal values of a string.
    """
    return field(default=default, metadata={"help": help, "low": low, "high": high, "choices": choices})


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
    known = [{f.name for f in fields(c)} for c in configs]
    out: list[dict[str, Any]] = [{} for _ in configs]
    problems = []
    for key, value in given.items():
        homes = [i for i, names in enumerate(known) if key in names]
        if homes:
            out[homes[0]][key] = value
        else:
            problems.append(f"unknown option '{key}'.{nearest(key, set().union(*known))}")
    raise_problems(problems, "option -o")
    return out


def _hint(cls: type, f: Field) -> Any:
    return typing.get_type_hints(cls)[f.name]


def _convert(hint: Any, value: Any) -> Any:
    """Convert text (or an already typed value) to the annotated type; raises ValueError or TypeError."""
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        inner = [a for a in typing.get_args(hint) if a is not type(None)]
        if value is None or (isinstance(value, str) and value.lower() in ("none", "auto", "")):
            return None
        return _convert(inner[0], value)
    if origin is tuple:
        item = typing.get_args(hint)[0]
        parts = value.split(",") if isinstance(value, str) else list(value)
        return tuple(_convert(item, p) for p in parts)
    if hint is bool:
        if isinstance(value, bool):
            return value
        text = str(value).lower()
        if text in ("1", "true", "yes", "on"):
            return True
        if text in ("0", "false", "no", "off"):
            return False
        raise ValueError("true or false is wanted")
    if hint is int:
        if isinstance(value, float) and not value.is_integer():
            raise ValueError("a whole number is wanted")
        return int(value)
    return hint(value)


def _check(field: Field, value: Any) -> str | None:
    meta = field.metadata
    values = value if isinstance(value, tuple) else (value,)
    for v in values:
        if v is None:
            continue
        if meta.get("choices") and v not in meta["choices"]:
            legal = [str(c) for c in meta["choices"]]
            return f"{field.name}={v} is not one of {', '.join(legal)}.{nearest(str(v), legal)}"
        if isinstance(v, float) and v != v:
            return f"{field.name} is not a number"
        low, high = meta.get("low"), meta.get("high")
        if (low is not None and v < low) or (high is not None and v > high):
            return f"{field.name}={v} is outside of {_range(field)}"
    return None


def _range(field: Field) -> str:
    low, high = field.metadata.get("low"), field.metadata.get("high")
    if field.metadata.get("choices"):
        return " | ".join(map(str, field.metadata["choices"]))
    if low is None and high is None:
        return ""
    if high is None:
        return f">= {low}"
    if low is None:
        return f"<= {high}"
    return f"[{low}, {high}]"


def make_config(cls: type[C], values: Mapping[str, Any], preset: Mapping[str, Any] | None = None) -> C:
    """Build a config dataclass from text or typed values, over a preset, over the defaults.

    Raises:
        NnsslError: lists every value of a wrong type or outside of its range.
    """
    merged = {**(preset or {}), **values}
    by_name = {f.name: f for f in fields(cls)}  # type: ignore[arg-type]
    out, problems = {}, []
    for key, value in merged.items():
        field = by_name.get(key)
        if field is None:
            problems.append(f"unknown option '{key}'.{nearest(key, by_name)}")
            continue
        try:
            out[key] = _convert(_hint(cls, field), value)
        except (ValueError, TypeError):
            wanted = field.type if isinstance(field.type, str) else getattr(field.type, "__name__", str(field.type))
            problems.append(f"{key}={value}: {wanted} is wanted")
            continue
        problem = _check(field, out[key])
        if problem:
            problems.append(problem)
    raise_problems(problems, "option -o")
    return cls(**out)


def describe_options(cls: type) -> list[tuple[str, str, str, str]]:
    """Rows ``(name, default, range, meaning)`` of a config dataclass."""
    rows = []
    for f in fields(cls):
        default = f.default if f.default is not MISSING else f.default_factory()  # type: ignore[misc, operator]
        text = ",".join(map(str, default)) if isinstance(default, tuple) else str(default)
        rows.append((f.name, "auto" if default is None else text, _range(f), f.metadata.get("help", "")))
    return rows


def config_dict(config: Any) -> dict[str, Any]:
    """A config as JSON-ready values (tuples become lists)."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(config).items()}
