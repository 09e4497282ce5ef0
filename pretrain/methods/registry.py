"""Names of methods: each file or folder beside this one, each entry point of the group ``nnssl.methods``, and files by path."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from pkgutil import iter_modules
from typing import TypeVar

from nnssl.errors import NnsslError, did_you_mean
from nnssl.files import sha256_of
from nnssl.pretrain.methods.base import Method

log = logging.getLogger("nnssl")

GROUP = "nnssl.methods"
_METHODS: dict[str, type[Method]] = {}
M = TypeVar("M", bound=type[Method])


def register(name: str, *, config: type) -> Callable[[M], M]:
    """Class decorator: make a method known under ``-m name`` with the options of the dataclass ``config``.

    Raises:
        NnsslError: the name is taken by another class, or cannot be part of a folder's name.
    """

    def add(cls: M) -> M:
        known = _METHODS.get(name)
        if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise NnsslError(
                f"two methods are named '{name}': {known.__module__}.{known.__qualname__} and {cls.__module__}."
                f"{cls.__qualname__}. Register one under another name."
            )
        if not name.isidentifier() or "__" in name:
            raise NnsslError(f"'{name}' cannot name a method: letters, digits and single underscores are wanted.")
        cls.name = name
        cls.Config = config
        _METHODS[name] = cls
        return cls

    return add


@cache
def discover() -> None:
    """Import the objectives of this folder and of installed packages, once: whoever only needs :class:`Method` loads none.

    A package that cannot be imported is named in a warning and left out, so that it does not take the other methods along.
    """
    for module in iter_modules([str(Path(__file__).parent)]):
        if module.name not in ("base", "registry"):
            import_module(f"{__package__}.{module.name}")
    for entry in entry_points(group=GROUP):
        try:
            entry.load()
        except Exception as error:
            package = entry.dist.name if entry.dist is not None else entry.value
            log.warning(
                "Method '%s' of package %s is left out: %s: %s", entry.name, package, type(error).__name__, error
            )


@cache
def _from_file(path: Path) -> type[Method]:
    before = set(_METHODS)
    name = f"nnssl_method_{path.stem}"
    spec = spec_from_file_location(name, path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise NnsslError(f"-m {path}: there is no such Python file.")
    module = module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their annotations up there
    try:
        spec.loader.exec_module(module)
    except NnsslError:
        raise
    except Exception as error:
        raise NnsslError(f"-m {path} cannot be imported: {type(error).__name__}: {error}") from error
    found = [_METHODS[n] for n in _METHODS if n not in before and _METHODS[n].__module__ == name]
    if len(found) != 1:
        raise NnsslError(
            f'-m {path}: one class with @register("name", config=...) is wanted, {len(found)} are in it. '
            "CONTRIBUTING.md shows an objective."
        )
    return found[0]


def origin(cls: type[Method]) -> dict[str, str] | None:
    """Where an objective of somebody else comes from, for the record of a run: module, file and its sha256; None for ours."""
    cls = _METHODS.get(cls.name, cls)  # with --labelled it is a layer over the registered one
    if cls.__module__.startswith("nnssl."):
        return None
    file = getattr(sys.modules.get(cls.__module__), "__file__", None)
    if file is None:
        return {"module": cls.__module__}
    return {"module": cls.__module__, "file": str(file), "sha256": sha256_of(file)}


def list_methods() -> dict[str, type[Method]]:
    """All registered methods by name, sorted."""
    discover()
    return dict(sorted(_METHODS.items()))


def get_method(name: str) -> type[Method]:
    """The method registered as ``name``, or the one that a file defines (``"./simclr.py"``).

    Raises:
        NnsslError: for an unknown name, with the nearest known one; for a file that cannot be imported or defines no method.
    """
    discover()
    if name.endswith(".py"):
        return _from_file(Path(name).expanduser().resolve())
    if name not in _METHODS:
        raise NnsslError(
            f"unknown method '{name}'.{did_you_mean(name, _METHODS)} Known: {', '.join(sorted(_METHODS))}, or a file such as "
            "./simclr.py."
        )
    return _METHODS[name]
