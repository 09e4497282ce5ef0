"""The pretraining subsystem: objectives, data, views and the one training loop."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nnssl.pretrain.api import RunResult, run
    from nnssl.pretrain.prepare.preparation import preprocess

__all__ = ["RunResult", "preprocess", "run"]


def __getattr__(name: str) -> Any:
    if name == "preprocess":
        from nnssl.pretrain.prepare.preparation import preprocess

        return preprocess
    if name in __all__:
        from nnssl.pretrain import api

        return getattr(api, name)
    raise AttributeError(name)
