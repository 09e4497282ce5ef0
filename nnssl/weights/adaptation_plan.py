"""The ``nnssl_adaptation_plan`` and ``citations`` entries, which other fine-tuning code reads.

The format is that of MIC-DKFZ's nnssl (``AdaptationPlan.serialize``), as nnU-Net after 2.8.1 reads it
(``nnUNetv2_preprocess_like_nnssl``, ``nnUNetv2_train_pretrained``). Beyond it: ``architecture_kwargs`` and
``pretrain_patch_size``, which that branch looks for and its own format does not write. That format knows residual encoders
only; a PlainConvUNet is written with its own ``n_conv_per_stage``, which nnU-Net's reader takes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from copy import deepcopy
from typing import Any

from nnssl.plans import Plan

_STEM = {
    "PlainConvUNet": (
        "encoder.stages.0",
        ["encoder.stages.0.0.convs.0.all_modules.0", "encoder.stages.0.0.convs.0.conv"],
    ),
    "ResidualEncoderUNet": ("encoder.stem", ["encoder.stem.convs.0.conv", "encoder.stem.convs.0.all_modules.0"]),
}
_PRIMUS_STEM = {
    "Primus": ["down_projection.proj"],
    "PrimusV2": ["down_projection.stem.blocks.0.conv1.conv", "down_projection.stem.blocks.0.conv1.all_modules.0"],
}
_TOP = (
    "dataset_name",
    "plans_name",
    "original_median_spacing_after_transp",
    "image_reader_writer",
    "transpose_forward",
    "transpose_backward",
    "experiment_planner_used",
)


def adaptation_plan(plan: Plan, crop_size: Sequence[int]) -> dict[str, Any]:
    """What upstream's fine-tuning needs to rebuild the network and to plan for it.

    Args:
        plan: the plan whose network was trained.
        crop_size: voxels per axis that the network saw in pretraining; the plan's patch is what is recommended downstream.
    """
    config = plan.config.configuration
    kwargs = deepcopy(config["architecture"]["arch_kwargs"])
    kwargs.pop("deep_supervision", None)
    name, encoder, positions = plan.network_class, "encoder.stages", None
    if plan.is_primus:
        encoder, key_to_stem, positions = "eva", "down_projection", "eva.pos_embed"
        in_proj = _PRIMUS_STEM["Primus" if name == "Primus" else "PrimusV2"]
        stock = re.fullmatch(r"nnUNet_(Primus\w+)_Trainer", plan.stock_trainer or "")
        name = stock.group(1).replace("_", "") if stock else name  # PrimusM: that package's name of the size
    else:
        key_to_stem, in_proj = _STEM[name]
    pretrain = {key: deepcopy(plan.plans.get(key)) for key in _TOP}
    pretrain["configurations"] = {
        plan.configuration: {
            "data_identifier": plan.data_identifier,
            "preprocessor_name": config["preprocessor_name"],
            "spacing_style": "median",
            "normalization_schemes": list(plan.normalization_schemes),
            "use_mask_for_norm": list(config["use_mask_for_norm"]),
            "resampling_fn_data": config["resampling_fn_data"],
            "resampling_fn_data_kwargs": dict(config["resampling_fn_data_kwargs"]),
            "resampling_fn_mask": config["resampling_fn_seg"],
            "resampling_fn_mask_kwargs": dict(config["resampling_fn_seg_kwargs"]),
            "spacing": list(plan.spacing),
            "patch_size": [int(i) for i in crop_size],
        }
    }
    return {
        "architecture_plans": {
            "arch_class_name": name,
            "arch_kwargs": kwargs,
            "arch_kwargs_requiring_import": list(config["architecture"]["_kw_requires_import"]),
        },
        "pretrain_plan": pretrain,
        "pretrain_num_input_channels": plan.n_channels,
        "recommended_downstream_patchsize": list(plan.patch_size),
        "key_to_encoder": encoder,
        "key_to_stem": key_to_stem,
        "keys_to_in_proj": list(in_proj),
        "key_to_lpe": positions,
        "architecture_kwargs": deepcopy(kwargs),
        "pretrain_patch_size": [int(i) for i in crop_size],
    }


def citation_entries(method: str, citations: Sequence[str]) -> list[dict[str, Any]]:
    """The papers to cite, in the form that nnU-Net after 2.8.1 prints."""
    return [
        {"type": "Pretraining Method", "name": method, "apa_citations": [str(c) for c in citations]},
        {
            "type": "Architecture",
            "name": "nnU-Net",
            "apa_citations": [
                "Isensee, F., Jaeger, P. F., Kohl, S. A., Petersen, J., & Maier-Hein, K. H. (2021). nnU-Net: a "
                "self-configuring method for deep learning-based biomedical image segmentation. Nature Methods, 18(2), 203-211."
            ],
        },
    ]
