"""Unpicklers for files that hold more than tensors and plain values."""

from __future__ import annotations

import pickle
from types import SimpleNamespace
from typing import Any

_HARMLESS = {
    ("collections", "OrderedDict"),
    ("collections", "defaultdict"),
    ("torch._utils", "_rebuild_tensor_v2"),
    ("torch._utils", "_rebuild_tensor"),
    ("torch._utils", "_rebuild_parameter"),
    ("torch", "Size"),
    ("torch", "device"),
    ("torch.serialization", "_get_layout"),
    *(
        ("torch", f"{kind}Storage")
        for kind in ("Float", "Double", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool")
    ),
}


class Placeholder:
    """Stands for an object of a class that is not imported: it takes whatever it is given and does nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __call__(self, *args: Any, **kwargs: Any) -> Placeholder:
        """Another one."""
        return Placeholder()

    def _drop(self, *args: Any, **kwargs: Any) -> None: ...

    __setstate__ = __setitem__ = append = extend = update = _drop


class _TensorsOnly(pickle.Unpickler):
    """Rebuilds tensors; everything else that a pickle names becomes a placeholder, so that nothing of the file's choice runs."""

    def find_class(self, module: str, name: str) -> Any:
        return super().find_class(module, name) if (module, name) in _HARMLESS else Placeholder


class _Lenient(pickle.Unpickler):
    """An ordinary unpickler, but that classes of packages that are not installed become placeholders."""

    def find_class(self, module: str, name: str) -> Any:
        try:
            return super().find_class(module, name)
        except (ImportError, AttributeError):
            return Placeholder


def _as_module(unpickler: type[pickle.Unpickler]) -> Any:
    """What ``torch.load(pickle_module=...)`` asks of a module."""
    return SimpleNamespace(
        Unpickler=unpickler,
        load=lambda file, **options: unpickler(file, **options).load(),
        UnpicklingError=pickle.UnpicklingError,
        __name__=unpickler.__name__,
    )


TENSORS_ONLY = _as_module(_TensorsOnly)
"""For a look at what an unsafe file holds."""
LENIENT = _as_module(_Lenient)
"""For files whose origin the user vouches for."""
