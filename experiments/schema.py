"""From YAML to frozen dataclasses: unknown keys are errors that name the nearest, wrong types say what is wanted."""

from __future__ import annotations

import json
import os
import reprlib
import types
import typing
from collections.abc import Hashable, Mapping
from dataclasses import Field, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml

from nnssl.errors import NnsslError, ProblemsError, nearest, raise_problems

__all__ = ["build", "check_keys", "key", "number", "read_names", "read_yaml", "resolve_path"]

T = TypeVar("T")
THE_FILE = "the experiment"
"""What problems belong to until the file's name is put in its place."""


class _Loader(yaml.SafeLoader):
    """YAML's safe loader that refuses a key given twice, of which it would silently take the last."""


def _mapping(loader: _Loader, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
    seen: set[Any] = set()
    for child, _ in node.value:
        if child.tag == "tag:yaml.org,2002:merge":
            continue  # what is merged in yields to what the mapping says itself
        name = loader.construct_object(child, deep=True)
        if not isinstance(name, Hashable):
            raise yaml.constructor.ConstructorError(None, None, "a key is a list or a mapping", child.start_mark)
        if name in seen:
            raise yaml.constructor.ConstructorError(None, None, f"'{name}' is given twice", child.start_mark)
        seen.add(name)
    return yaml.SafeLoader.construct_mapping(loader, node, deep)


def _construct(loader: Any, node: Any) -> dict[Any, Any]:
    return _mapping(loader, node, True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _construct)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping that a YAML file holds.

    Raises:
        NnsslError: the file is missing, is no YAML, names a key twice or holds no mapping.
    """
    try:
        content = yaml.load(path.read_text(encoding="utf-8-sig"), Loader=_Loader)  # noqa: S506  a safe loader
    except OSError as error:
        raise NnsslError(f"{path} cannot be read: {error.strerror or error}") from error
    except RecursionError:
        raise NnsslError(f"{path} is nested too deeply, or refers to itself.") from None
    except (yaml.YAMLError, ValueError, TypeError, ArithmeticError, AttributeError, LookupError) as error:
        # numbers of thousands of digits, dates that do not exist, tags in odd places: PyYAML lets what Python says through
        raise NnsslError(f"{path} is no YAML: {' '.join(str(error).split())}") from error
    if _circular(content):
        raise NnsslError(f"{path} refers to itself.")
    if not isinstance(content, dict):
        raise NnsslError(f"{path} holds no settings: lines such as 'dataset: 4' are expected.")
    return {str(k): v for k, v in content.items()}


def _circular(value: Any) -> bool:
    """Whether a mapping or list holds itself; each is looked at once, since anchors may share one a million times."""
    above: set[int] = set()
    seen: set[int] = set()

    def look(value: Any) -> bool:
        if not isinstance(value, (dict, list)) or id(value) in seen:
            return False
        if id(value) in above:
            return True
        above.add(id(value))
        found = any(look(v) for v in (value.values() if isinstance(value, dict) else value))
        above.discard(id(value))
        seen.add(id(value))
        return found

    return look(value)


def _shown(value: Any) -> str:
    """A value in a message: short, however large it is."""
    return reprlib.repr(value)


def key(default: Any, help: str, *, low: float | None = None) -> Any:
    """A field of a dataclass with its meaning and, for numbers, the least legal value."""
    from dataclasses import field

    meta = {"help": help, "low": low}
    if isinstance(default, (dict, list)):
        return field(default_factory=lambda: type(default)(default), metadata=meta)
    return field(default=default, metadata=meta)


def check_keys(given: Mapping[str, Any], known: typing.Iterable[str], where: str) -> list[str]:
    """One sentence for each key that is not known, with the nearest one that is."""
    names = sorted(known)
    return [
        f"{where}unknown key '{k}'.{nearest(k, names)} There are: {', '.join(names)}" for k in given if k not in names
    ]


def build(cls: type[T], given: Mapping[str, Any], where: str = "") -> T:
    """Make a dataclass of a mapping.

    Args:
        cls: a frozen dataclass whose fields are the keys.
        given: from the file; values that are already of the right type are taken as they are.
        where: what the messages begin with, for example ``"training: "``.

    Raises:
        NnsslError: lists every unknown key and every value of a wrong type or out of range.
    """
    if not isinstance(given, Mapping):
        title = where.rstrip(": ") or "the file"
        wanted = f"keys such as '{fields(cls)[0].name}: ...' are wanted, not {_shown(given)}"  # type: ignore[arg-type]
        raise_problems([f"{title}: {wanted}"], THE_FILE)
    out, problems = {}, check_keys(given, (f.name for f in fields(cls)), where)  # type: ignore[arg-type]
    hints = typing.get_type_hints(cls)
    for f in fields(cls):  # type: ignore[arg-type]
        if f.name not in given:
            continue
        try:
            out[f.name] = _convert(hints[f.name], given[f.name], f"{where}{f.name}: ")
            problems += _range(f, out[f.name], where)
        except ProblemsError as error:
            problems += error.problems
        except NnsslError as error:
            problems.append(str(error))
        except (ValueError, TypeError, ArithmeticError) as error:
            problems.append(f"{where}{f.name}: {error}")
    raise_problems(problems, THE_FILE)
    return cls(**out)


def _range(f: Field, value: Any, where: str) -> list[str]:
    low = f.metadata.get("low")
    values = value if isinstance(value, tuple) else (value,)
    if low is None or all(v is None or v >= low for v in values):
        return []
    return [f"{where}{f.name}: at least {low} is needed, not {value}"]


def number(value: Any) -> Any:
    """A number where the text is one (YAML reads ``1e-3`` as text), everything else as it is."""
    if not isinstance(value, str):
        return value
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            continue
    return value


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        inner = [a for a in typing.get_args(hint) if a is not type(None)]
        return None if value is None else _convert(inner[0], value, where)
    if is_dataclass(hint):
        if isinstance(value, hint):  # type: ignore[arg-type]
            return value
        if not isinstance(value, Mapping):
            raise TypeError(f"keys such as '{fields(hint)[0].name}: ...' are wanted, not {_shown(value)}")
        return build(hint, {str(k): v for k, v in value.items()}, where)  # type: ignore[arg-type]
    if origin is tuple:
        item = typing.get_args(hint)[0]
        if isinstance(value, str) and item in (int, float) and "," in value:
            value = [part.strip() for part in value.strip("[]() ").split(",")]  # as the commands take it: 8,16,32
        parts = value if isinstance(value, (list, tuple)) else [value]
        return tuple(_convert(item, part, where) for part in parts)
    if hint is bool:
        if not isinstance(value, bool):
            raise TypeError(f"true or false is wanted, not {_shown(value)}")
        return value
    if hint in (int, float):
        return _number(hint, value)
    if hint is str:
        if isinstance(value, (Mapping, list)) or value is None:
            raise TypeError(f"text is wanted, not {_shown(value)}")
        return str(value)
    if hint is dict or origin is dict:
        if not isinstance(value, Mapping):
            raise TypeError(f"keys and values are wanted, not {_shown(value)}")
        return {str(k): number(v) for k, v in value.items()}
    return value


def _number(hint: type, value: Any) -> Any:
    read = number(value)
    if isinstance(read, bool) or not isinstance(read, (int, float)) or not abs(read) < 2**63:
        raise TypeError(f"a {'whole ' if hint is int else ''}number is wanted, not {_shown(value)}")
    if hint is int and read != int(read):
        raise TypeError(f"a {'whole ' if hint is int else ''}number is wanted, not {_shown(value)}")
    return hint(read)


def resolve_path(text: str, folder: Path) -> Path:
    """A path of the file: ``$VARIABLES`` and ``~`` are filled in; a relative one is relative to the file.

    Raises:
        NnsslError: a variable that is not set.
    """
    filled = os.path.expanduser(os.path.expandvars(text))
    if "$" in filled:
        raise NnsslError(f"'{text}' names a variable that is not set.")
    return Path(os.path.normpath(folder / filled))


def read_names(path: Path, what: str) -> list[str]:
    """Case names of a text file, one a line, or of a JSON list. Raises :class:`NnsslError` where there are none."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        names = json.loads(text) if text.lstrip().startswith("[") else text.splitlines()
    except (OSError, ValueError) as error:
        raise NnsslError(f"{what}: {path} cannot be read: {error}") from error
    found = list(dict.fromkeys(str(n).strip() for n in names if str(n).strip() and not str(n).startswith("#")))
    if not found:
        raise NnsslError(f"{what}: {path} names no case.")
    return found
