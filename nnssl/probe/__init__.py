"""Linear probes: what a linear layer makes of frozen features on a few labelled cases, checkpoints beside random weights."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nnssl.probe.cases import Case, Classes, Fold, choose_folds, read_case
    from nnssl.probe.features import Extractor, Stages
    from nnssl.probe.linear import Linear, Samples, fit
    from nnssl.probe.measure import Scores, Setup, measure
    from nnssl.probe.result import Probe
    from nnssl.probe.run import probe
    from nnssl.probe.verdict import Difference, Row

__all__ = [
    "Case",
    "Classes",
    "Difference",
    "Extractor",
    "Fold",
    "Linear",
    "Probe",
    "Row",
    "Samples",
    "Scores",
    "Setup",
    "Stages",
    "choose_folds",
    "fit",
    "measure",
    "probe",
    "read_case",
]

_MODULES = {
    "Case": "cases",
    "Classes": "cases",
    "Difference": "verdict",
    "Extractor": "features",
    "Fold": "cases",
    "Linear": "linear",
    "Probe": "result",
    "Row": "verdict",
    "Samples": "linear",
    "Scores": "measure",
    "Setup": "measure",
    "Stages": "features",
    "choose_folds": "cases",
    "fit": "linear",
    "measure": "measure",
    "probe": "run",
    "read_case": "cases",
}
"""Name -> the module that defines it."""


def __getattr__(name: str) -> Any:
    # nnU-Net reads its variables while it is imported: the command checks them before
    if name in _MODULES:
        return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
