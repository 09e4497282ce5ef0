"""Names of methods. Each file or folder beside this one is an objective, which registers itself when it is imported."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import TypeVar

from nnssl.errors import NnsslError, nearest
from nnssl.pretrain.methods.base import Method

__all__ = ["get_method", "list_methods", "register"]

_METHODS: dict[str, type[Method]] = {}
M = TypeVar("M", bound=type[Method])


def register(name: str, *, config: type) -> Callable[[M], M]:
    """Class decorator: make a method known under ``-m name`` with the options of the dataclass ``config``."""

    def add(cls: M) -> M:
        if name in _METHODS and _METHODS[name].__qualname__ != cls.__qualname__:
            raise ValueError(f"method '{name}' is registered twice")
        cls.name = name
        cls.Config = config
        _METHODS[name] = cls
        return cls

    return add


@cache
def discover() -> None:
    """Import the objectives of this folder, once: whoever only needs :class:`Method` loads none of them."""
    for module in iter_modules([str(Path(__file__).parent)]):
        if module.name not in ("base", "registry"):
            import_module(f"{__package__}.{module.name}")


def list_methods() -> dict[str, type[Method]]:
    """All registered methods by name, sorted."""
    discover()
    return dict(sorted(_METHODS.items()))


def get_method(name: str) -> type[Method]:
    """The method registered as ``name``.

    Raises:
        NnsslError: for an unknown name, with the nearest known one.
    """
    discover()
    if name not in _METHODS:
        raise NnsslError(f"unknown method '{name}'.{nearest(name, _METHODS)} Known: {', '.join(sorted(_METHODS))}.")
    return _METHODS[name]
