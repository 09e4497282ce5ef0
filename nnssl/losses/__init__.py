"""Small pure losses, one idea a file."""

from nnssl.losses.diagnostics import (
    channel_std,
    middle_slice,
    off_diagonal_cosine,
    pair_similarity,
    place_share,
    principal_colours,
)
from nnssl.losses.equivariance import equivariance_loss, shrink
from nnssl.losses.supcon import collapse_value, dense_supcon, position_positives, safe_normalise, site_contrast, supcon

__all__ = [
    "channel_std",
    "collapse_value",
    "dense_supcon",
    "equivariance_loss",
    "middle_slice",
    "off_diagonal_cosine",
    "pair_similarity",
    "place_share",
    "position_positives",
    "principal_colours",
    "safe_normalise",
    "shrink",
    "site_contrast",
    "supcon",
]
