"""The only reader and writer of plans JSON: patch, strides and network of a plan; plan variants."""

from nnssl.plans.datasets import dataset_id, list_datasets, resolve_dataset
from nnssl.plans.plan import Plan, load_plan
from nnssl.plans.variants import Changes, check_name, derive, list_variants

__all__ = [
    "Changes",
    "Plan",
    "check_name",
    "dataset_id",
    "derive",
    "list_datasets",
    "list_variants",
    "load_plan",
    "resolve_dataset",
]


def __getattr__(name: str) -> None:
    if name == "write_variant":
        raise ImportError("nnssl.plans.write_variant has moved: from nnssl.weights import write_variant")
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
