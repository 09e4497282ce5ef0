"""The commands that messages tell a user to type with a plan."""

from __future__ import annotations

from collections.abc import Iterable

from nnssl.plans.datasets import dataset_id
from nnssl.plans.labels import fold_to_type
from nnssl.plans.plan import Plan


def _with(plan: Plan) -> str:
    return f"-c {plan.configuration} -p {plan.plans_name}"


def plan_command(plan: Plan, *options: str) -> str:
    """``nnssl_plan``: derive a variant of the plan with these options."""
    return f"nnssl_plan -d {dataset_id(plan.dataset_name)} {_with(plan)} {' '.join(options)} --name NAME"


def pretrain_command(plan: Plan, sources: Iterable[str] = ()) -> str:
    """``nnssl_pretrain`` for the plan: on its own dataset's images, or on those of others."""
    number = dataset_id(plan.dataset_name)
    numbers = [str(dataset_id(source)) if source.startswith("Dataset") else source for source in sources]
    images = f"{' '.join(numbers)} -t {number}" if numbers else number
    return f"nnssl_pretrain -d {images} {_with(plan)} -m mae"


def preprocess_command(plan: Plan, sources: Iterable[str]) -> str:
    """``nnssl_pretrain``: preprocess the images of datasets for the plan."""
    return f"{pretrain_command(plan, sources)} --preprocess-only"


def train_command(plan: Plan, pretrained: bool = True) -> str:
    """``nnUNetv2_train`` with the trainer of the plan's schedule, from pretrained weights or from random ones."""
    number, fold = dataset_id(plan.dataset_name), fold_to_type(plan)
    return f"nnUNetv2_train {number} {plan.configuration} {fold} -p {plan.plans_name} -tr {plan.trainer(pretrained)}"
