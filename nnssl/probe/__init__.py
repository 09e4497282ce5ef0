"""Linear probes: what a linear layer makes of frozen features on a few labelled cases, checkpoints beside random weights."""

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
