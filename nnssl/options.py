"""Options of a command stated once, as the fields of a dataclass: parser, docs, record and a Python function come from these.

Imports nothing heavy, so that ``--help`` is there at once.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, Field, field, fields
from typing import Any, ParamSpec, TypeVar

from nnssl.errors import NnsslError, did_you_mean
from nnssl.grammar import SHARED, CommandParser

P = ParamSpec("P")
R = TypeVar("R")
O = TypeVar("O")  # noqa: E741


def given(
    value: Any,
    group: str | None,
    *names: str,
    help: str | None = None,
    read: Callable[[Any], Any] | None = None,
    **keywords: Any,
) -> Any:
    """A field that is an option of the command.

    Args:
        value: default, ``...`` for none; the command's may be another, in ``keywords`` or :data:`nnssl.grammar.SHARED`.
        group: title in the help; None for an argument without a dash.
        names: spellings; of :data:`nnssl.grammar.SHARED` where they are missing.
        help: meaning, for both; that of :data:`nnssl.grammar.SHARED` where it is missing.
        read: makes of the command's text what Python's users give.
        keywords: of ``add_argument``; ``dest`` where the command knows the field under another name.
    """
    meta = {"group": group, "names": names, "help": help, "read": read, "keywords": keywords}
    return field(metadata=meta) if value is ... else field(default=value, metadata=meta)


def command_fields(cls: Any) -> list[Field]:
    """The fields that are options of the command."""
    return [f for f in fields(cls) if "group" in f.metadata]


def _dest(f: Field) -> str:
    return f.metadata["keywords"].get("dest", f.name)


def _meaning(f: Field) -> str:
    said = f.metadata.get("help")
    return SHARED[_dest(f)].keywords["help"] if said is None and "group" in f.metadata else said or ""


def meanings(cls: Any) -> dict[str, str]:
    """What each field of a dataclass means."""
    return {f.name: _meaning(f) for f in fields(cls)}


def add_options(parser: CommandParser, cls: Any, titles: Sequence[str] = ()) -> dict[str | None, Any]:
    """Add all options of a dataclass to a parser; returns the groups by title, these first, others as the fields name them."""
    groups: dict[str | None, Any] = {title: parser.group(title) for title in titles}
    for f in command_fields(cls):
        meta = f.metadata
        title, names, keywords = meta["group"], meta["names"], {"help": _meaning(f), **meta["keywords"]}
        if title not in groups:
            groups[title] = parser if title is None else parser.group(title)
        if title is not None and not names:
            parser.share(groups[title], _dest(f), **{k: v for k, v in keywords.items() if k != "dest"})
            continue
        if f.default is not MISSING:
            keywords.setdefault("default", f.default)
        keywords["help"] = keywords["help"].replace("%", "%%")
        if title is None:
            parser.add_argument(f.name, **keywords)
        else:
            groups[title].add_argument(*names, **{**keywords, "dest": _dest(f)})
    return groups


def from_args(cls: Callable[..., O], args: Any, **others: Any) -> O:
    """The options of a parsed command line; others are of Python only, or go before what was typed.

    Raises:
        NnsslError: a text that cannot be read.
    """
    values: dict[str, Any] = {}
    for f in command_fields(cls):
        value, read = getattr(args, _dest(f)), f.metadata["read"]
        values[f.name] = value if value is None or read is None else read(value)
    return cls(**{**values, **others})


def asked(options: Any, without: tuple[str, ...] = ()) -> dict[str, Any]:
    """What differs from the defaults, as JSON-ready values: for a record."""
    found = {f.name: (getattr(options, f.name), f.default) for f in fields(options) if f.name not in without}
    return {name: _plain(value) for name, (value, default) in found.items() if value != default}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


def check_names(given: Iterable[str], known: Iterable[str]) -> None:
    """Refuse a keyword argument that there is not.

    Raises:
        TypeError: says which one may be meant.
    """
    known = list(known)
    for argument in given:
        if argument not in known:
            raise TypeError(f"there is no argument '{argument}'.{did_you_mean(argument, known)}")


def check_seed(seed: int) -> None:
    """Refuse a seed that numpy or torch does not take.

    Raises:
        NnsslError: below 0, or from 2^63 on.
    """
    if not 0 <= seed < 2**63:
        raise NnsslError(f"--seed {seed}: {'0 or more' if seed < 0 else 'less than 2^63'} is needed.")


def as_function(name: str, cls: Callable[P, Any], body: Callable[[Any], R]) -> Callable[P, R]:
    """A function with the fields of a dataclass as arguments; type checkers and ``help`` see each of them.

    Args:
        name: of the function.
        cls: the dataclass; its fields' own texts are those of the arguments.
        body: what is done with its instance; its docstring is the function's, with the arguments put in before "Returns:".
    """
    about = meanings(cls)
    signature = inspect.signature(cls).replace(return_annotation=inspect.signature(body).return_annotation)

    def function(*args: P.args, **kwargs: P.kwargs) -> R:
        check_names(kwargs, about)
        try:
            signature.bind(*args, **kwargs)
        except TypeError as error:  # the dataclass's own would name it, and count self
            raise TypeError(f"{name}(): {error}") from None
        return body(cls(*args, **kwargs))

    made: Any = function
    made.__signature__ = signature
    made.__module__, made.__name__, made.__qualname__ = body.__module__, name, name
    head, returns, rest = (inspect.getdoc(body) or "").partition("Returns:")
    lines = [f"    {argument}: {text}." for argument, text in about.items()]
    made.__doc__ = head + "\n".join(["Args:", *lines, "", returns]) + rest
    return function
