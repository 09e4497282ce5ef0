"""The plan's own network, as nnU-Net's trainer builds it."""

from __future__ import annotations

import torch
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager
from torch import nn

from nnssl.errors import NnsslError
from nnssl.plans.plan import Plan


def build_network(plan: Plan, n_classes: int | None = None, deep_supervision: bool = False) -> nn.Module:
    """Build and initialise the stock network of a plan: a U-Net, or a Primus for the plan's patch.

    Args:
        plan: the plan.
        n_classes: channels of the segmentation heads; the dataset's own number by default.
        deep_supervision: whether the forward returns all resolutions; the weights are the same either way. Not for Primus.

    Raises:
        NnsslError: the plans' arguments make no network.
    """
    config, classes = plan.config, plan.n_classes if n_classes is None else n_classes
    try:
        if plan.is_primus:
            return build_primus(config, plan.n_channels, classes)
        return get_network_from_plans(
            config.network_arch_class_name,
            config.network_arch_init_kwargs,
            config.network_arch_init_kwargs_req_import,
            plan.n_channels,
            classes,
            allow_init=True,
            deep_supervision=deep_supervision,
        )
    except (torch.cuda.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # whatever a network makes of arguments that it cannot use
        raise NnsslError(
            f"The network of plans '{plan.plans_name}' of {plan.dataset_name}, configuration {plan.configuration}, cannot be "
            f"built ({type(error).__name__}: {' '.join(str(error).split())[:200]}). Look at 'architecture' in the plans."
        ) from error


def build_primus(config: ConfigurationManager, n_channels: int, n_classes: int) -> nn.Module:
    """The Primus that ``architecture`` of a configuration describes (:func:`nnssl.plans.primus.architecture`), for its patch."""
    kwargs = {**config.network_arch_init_kwargs, "input_shape": tuple(int(n) for n in config.patch_size)}
    kwargs["patch_embed_size"] = tuple(kwargs["patch_embed_size"])
    return get_network_from_plans(
        config.network_arch_class_name, kwargs, [], n_channels, n_classes, allow_init=True, deep_supervision=None
    )


def encoder_channels(plan: Plan) -> tuple[int, ...]:
    """Channels of the skips, highest resolution first, the bottleneck last."""
    return plan.features


def decoder_channels(plan: Plan) -> tuple[int, ...]:
    """Channels after each decoder stage, stage 0 (lowest resolution, just above the bottleneck) first."""
    return tuple(reversed(plan.features[:-1]))
