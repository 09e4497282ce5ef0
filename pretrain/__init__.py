"""The pretraining subsystem: objectives, data, views and the one training loop."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nnssl.pretrain.api import RunResult, run
    from nnssl.pretrain.prepare.preparation import preprocess

__all__ = ["RunResult", "preprocess", "run"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(name)
    return getattr(import_module("nnssl.pretrain." + ("prepare.preparation" if name == "preprocess" else "api")), name)
