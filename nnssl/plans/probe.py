"""Plans whose network is a linear probe of the plan's own, and the way back."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

from nnssl.plans.plan import Plan
from nnssl.plans.variants import free_children

CLASS = "nnssl.networks.probe.LinearProbe"


def to_probe(plan: Plan, levels: str) -> dict[str, Any]:
    """The plan's file with its U-Net replaced by the :class:`nnssl.networks.probe.LinearProbe`; the other configurations stay."""
    plans = deepcopy(plan.plans)
    free_children(plans, plan)
    config = deepcopy(plan.config.configuration)
    config.pop("inherits_from", None)
    architecture = config["architecture"]
    architecture["arch_kwargs"] |= {"backbone": architecture["network_class_name"], "levels": levels}
    architecture["network_class_name"] = CLASS
    plans["configurations"][plan.configuration] = config
    return plans


def from_probe(plans: dict[str, Any], configuration: str) -> dict[str, Any]:
    """The plans file as it was before :func:`to_probe`; plans of another network are given back as they are."""
    config = plans["configurations"].get(configuration, {})
    if config.get("architecture", {}).get("network_class_name") != CLASS:
        return plans
    restored = deepcopy(plans)
    architecture = restored["configurations"][configuration]["architecture"]
    architecture["network_class_name"] = architecture["arch_kwargs"].pop("backbone")
    architecture["arch_kwargs"].pop("levels")
    return restored
