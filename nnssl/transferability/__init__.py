"""Robustness of representations, an online stopper, and TIS: within-run indicators of transferability without labels.

After Hidy, Bakos, Lukács 2024, arXiv:2410.18677. What the measure can and cannot tell is in docs/transferability.md.
"""

from importlib import import_module
from typing import Any

from nnssl.transferability.checkpoints import Run
from nnssl.transferability.compare import Comparison, compare, make_evaluator
from nnssl.transferability.distances import DISTANCES, degenerate, distance_matrix
from nnssl.transferability.downstream import read_dice
from nnssl.transferability.evaluator import RobustnessConfig, RobustnessEvaluator, RobustnessResult
from nnssl.transferability.indicator import (
    baselines,
    rank_correlation,
    select_best,
    select_online,
    select_robust,
    summarise,
    tis,
)
from nnssl.transferability.monitor import RobustnessMonitor, random_baseline
from nnssl.transferability.pooling import POOLINGS, pool
from nnssl.transferability.robustness import NEGATIVES, Separation, hinge, robustness_loss, robustness_score, separate
from nnssl.transferability.schedule import Schedule, plan_schedule
from nnssl.transferability.stopper import Stopper
from nnssl.transferability.verdict import Baseline, Verdict, judge
from nnssl.transferability.views import choose_families, photometric_view

__all__ = [
    "Baseline",
    "Comparison",
    "DISTANCES",
    "NEGATIVES",
    "POOLINGS",
    "RobustnessConfig",
    "RobustnessEvaluator",
    "RobustnessMonitor",
    "RobustnessResult",
    "Run",
    "Schedule",
    "Separation",
    "Stopper",
    "Verdict",
    "baselines",
    "choose_families",
    "compare",
    "degenerate",
    "distance_matrix",
    "hinge",
    "judge",
    "make_evaluator",
    "photometric_view",
    "plan_schedule",
    "pool",
    "random_baseline",
    "rank_correlation",
    "read_dice",
    "robustness_loss",
    "robustness_score",
    "select_best",
    "select_online",
    "select_robust",
    "separate",
    "summarise",
    "tis",
]


# Pieces that were public here, and still are found.
_MOVED = {
    "checkpoints": ("Measured", "group_runs", "measure_checkpoints"),
    "crops": ("CropSet", "choose_cases", "crop_size", "read_crops"),
    "downstream": ("TISRow", "tis_rows"),
    "indicator": ("OnlineChoice", "TISSummary"),
    "robustness": ("mirror_index",),
}


def __getattr__(name: str) -> Any:
    for module, names in _MOVED.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    if name == "list_cases":
        raise ImportError("nnssl.transferability.list_cases is: from nnssl.preprocessed import list_cases")
    if name == "paired_distance":
        raise ImportError("nnssl.transferability.paired_distance is now the diagonal of distance_matrix(x, y)")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
