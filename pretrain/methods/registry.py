"""Names of methods. Importing :mod:`nnssl.pretrain.methods` imports each file of the folder, which registers itself."""

from __future__ import annotations

from collections.abc import Callable
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


def list_methods() -> dict[str, type[Method]]:
    """All registered methods by name, sorted."""
    return dict(sorted(_METHODS.items()))


def get_method(name: str) -> type[Method]:
    """The method registered as ``name``.

    Raises:
        NnsslError: for an unknown name, with the nearest known one.
    """
    if name not in _METHODS:
        raise NnsslError(f"unknown method '{name}'.{nearest(name, _METHODS)} Known: {', '.join(sorted(_METHODS))}.")
    return _METHODS[name]
