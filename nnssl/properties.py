"""Reads the ``.pkl`` beside a preprocessed case without running anything of the file's choice."""

from __future__ import annotations

import io
import os
import pickle
from pathlib import Path
from typing import Any

_PLAIN = {
    "builtins": {"bytes", "complex", "set", "frozenset", "bytearray", "range", "slice"},
    "collections": {"OrderedDict", "defaultdict"},
    "_codecs": {"encode"},
    "numpy": {"ndarray", "dtype"},
}
_NUMPY = {"_reconstruct", "scalar", "_frombuffer"}
"""Functions that rebuild arrays and numbers; their module is another in numpy 1 and 2."""


class UnsafePickleError(pickle.UnpicklingError):
    """The file names something that is neither a plain type nor numpy's."""


class _Plain(pickle.Unpickler):
    """Knows plain types, numpy's arrays and numbers, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        module = "builtins" if module == "__builtin__" else module  # as Python 2 called it; protocol 2 still does
        package, _, rest = module.partition(".")
        numpy = package == "numpy" and rest.rpartition(".")[2] in ("multiarray", "numeric") and name in _NUMPY
        kind = module == "numpy.dtypes" and name.endswith("DType")
        if not (numpy or kind or name in _PLAIN.get(module, ())):
            raise UnsafePickleError(f"it asks to run {module}.{name}, and is not read")
        return super().find_class(module, name)


def read_properties(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What nnU-Net's preprocessing, or ours, wrote down of a case in its ``.pkl``: plain values and numpy arrays.

    Raises:
        UnsafePickleError: it names another class or function; nothing of it has run.
        Exception: whatever a damaged file makes pickle raise.
    """
    content = _Plain(io.BytesIO(Path(path).read_bytes())).load()
    if not isinstance(content, dict):
        raise ValueError(f"it holds a {type(content).__name__}, not the properties of a case")
    return content
