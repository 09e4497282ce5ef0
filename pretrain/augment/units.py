"""Which normalised intensities become 0 and 1 for corruptions and restoration errors that think in [0, 1]."""

from __future__ import annotations

from torch import Tensor

from nnssl.plans import Plan


def unit_range(plan: Plan, intensity: Tensor) -> Tensor:
    """nnU-Net's clipping limits for CT, else each case's own percentiles, ``(B, C, 2)`` in normalised units.

    Preprocessed CT lies within the limits, so that nothing is lost by clipping to [0, 1]; other modalities lose what
    lies outside of the percentiles, which ``intensity`` holds.
    """
    out = intensity.clone()
    statistics = plan.plans.get("foreground_intensity_properties_per_channel", {})
    for channel, scheme in enumerate(plan.normalization_schemes):
        if scheme == "CTNormalization" and str(channel) in statistics:
            s = statistics[str(channel)]
            for i, key in enumerate(("percentile_00_5", "percentile_99_5")):
                out[:, channel, i] = (s[key] - s["mean"]) / max(s["std"], 1e-8)
    return out
