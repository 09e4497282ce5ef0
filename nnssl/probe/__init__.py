"""Linear probes: what a linear layer makes of frozen features on a few labelled cases, checkpoints beside random weights."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nnssl.probe.cases import Case, Classes, Fold, choose_folds, read_case
    from nnssl.probe.features import Extractor, Stages
    from nnssl.probe.linear import Linear, Samples, fit
    from nnssl.probe.result import Probe
    from nnssl.probe.run import probe
    from nnssl.probe.scores import Scores, Setup, measure
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
    "cases": ("Case", "Classes", "Fold", "choose_folds", "read_case"),
    "features": ("Extractor", "Stages"),
    "linear": ("Linear", "Samples", "fit"),
    "result": ("Probe",),
    "run": ("probe",),
    "scores": ("Scores", "Setup", "measure"),
    "verdict": ("Difference", "Row"),
}


def __getattr__(name: str) -> Any:
    # nnU-Net reads its variables while it is imported: the command checks them before
    for module, names in _MODULES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
