"""Robustness of representations, an online stopper, and TIS: within-run indicators of transferability without labels.

After Hidy, Bakos, Lukács 2024, arXiv:2410.18677. What the measure can and cannot tell is in docs/transferability.md.
"""

from nnssl.preprocessed import list_cases
from nnssl.transferability.checkpoints import Measured, Run, group_runs, measure_checkpoints
from nnssl.transferability.compare import Comparison, compare, make_evaluator
from nnssl.transferability.crops import CropSet, choose_cases, crop_size, read_crops
from nnssl.transferability.distances import DISTANCES, degenerate, distance_matrix, paired_distance
from nnssl.transferability.downstream import TISRow, read_dice, tis_rows
from nnssl.transferability.evaluator import RobustnessConfig, RobustnessEvaluator, RobustnessResult
from nnssl.transferability.indicator import (
    OnlineChoice,
    TISSummary,
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
from nnssl.transferability.robustness import (
    NEGATIVES,
    Separation,
    hinge,
    mirror_index,
    robustness_loss,
    robustness_score,
    separate,
)
from nnssl.transferability.schedule import Schedule, plan_schedule
from nnssl.transferability.stopper import Stopper
from nnssl.transferability.verdict import Baseline, Verdict, judge
from nnssl.transferability.views import choose_families, photometric_view

__all__ = [
    "Baseline",
    "Comparison",
    "CropSet",
    "DISTANCES",
    "Measured",
    "NEGATIVES",
    "OnlineChoice",
    "POOLINGS",
    "RobustnessConfig",
    "RobustnessEvaluator",
    "RobustnessMonitor",
    "RobustnessResult",
    "Run",
    "Schedule",
    "Separation",
    "Stopper",
    "TISRow",
    "TISSummary",
    "Verdict",
    "baselines",
    "choose_cases",
    "choose_families",
    "compare",
    "crop_size",
    "degenerate",
    "distance_matrix",
    "group_runs",
    "hinge",
    "judge",
    "list_cases",
    "make_evaluator",
    "measure_checkpoints",
    "mirror_index",
    "paired_distance",
    "photometric_view",
    "plan_schedule",
    "pool",
    "random_baseline",
    "rank_correlation",
    "read_crops",
    "read_dice",
    "robustness_loss",
    "robustness_score",
    "select_best",
    "select_online",
    "select_robust",
    "separate",
    "summarise",
    "tis",
    "tis_rows",
]
