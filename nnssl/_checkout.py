"""Lets a checkout be imported from its own folder: there two subpackages lie beside ``nnssl``, not below it (setup.py).

An installed package has them below it and an editable install maps them, so this matters where the checkout's folder
comes first on ``sys.path``, as with ``python -m`` or ``python -c`` in it.
"""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path

__all__ = ["find_siblings"]

_ROOT = Path(__file__).resolve().parent.parent


class _Siblings:
    """A finder for ``nnssl.pretrain`` and ``nnssl.trainers``; everything below them is found through their paths."""

    @staticmethod
    def find_spec(fullname: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if fullname not in ("nnssl.pretrain", "nnssl.trainers"):
            return None
        folder = _ROOT / fullname.rpartition(".")[2]
        return spec_from_file_location(fullname, folder / "__init__.py", submodule_search_locations=[str(folder)])


def find_siblings() -> None:
    """Install the finder where this is a checkout; it is asked last."""
    if (_ROOT / "setup.py").is_file() and (_ROOT / "pretrain" / "__init__.py").is_file():
        sys.meta_path.append(_Siblings)  # type: ignore[arg-type]
