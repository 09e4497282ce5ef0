"""The plan's own network, as nnU-Net's trainer builds it."""

from __future__ import annotations

from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from torch import nn

from nnssl.plans.plan import Plan

__all__ = ["build_network", "decoder_channels", "encoder_channels"]


def build_network(plan: Plan, n_classes: int | None = None, deep_supervision: bool = False) -> nn.Module:
    """Build and initialise the stock network of a plan (PlainConvUNet or ResidualEncoderUNet).

    Args:
        plan: the plan.
        n_classes: channels of the segmentation heads; the dataset's own number by default.
        deep_supervision: whether the forward returns all resolutions; the weights are the same either way.
    """
    config = plan.config
    return get_network_from_plans(
        config.network_arch_class_name,
        config.network_arch_init_kwargs,
        config.network_arch_init_kwargs_req_import,
        plan.n_channels,
        plan.n_classes if n_classes is None else n_classes,
        allow_init=True,
        deep_supervision=deep_supervision,
    )


def encoder_channels(plan: Plan) -> tuple[int, ...]:
    """Channels of the skips, highest resolution first, the bottleneck last."""
    return plan.features


def decoder_channels(plan: Plan) -> tuple[int, ...]:
    """Channels after each decoder stage, stage 0 (lowest resolution, just above the bottleneck) first."""
    return tuple(reversed(plan.features[:-1]))
