"""Public names of before still lead to what they meant."""

import importlib

import pytest


@pytest.mark.parametrize(
    ("module", "old", "new"),
    [
        ("nnssl.errors", "nearest", "did_you_mean"),
        ("nnssl.networks", "Pyramid", "FeaturePyramid"),
        ("nnssl.networks", "walk", "forward_features"),
        ("nnssl.plans.figures", "Figures", "FineTuningConfig"),
        ("nnssl.pretrain.augment", "Draws", "StepRNG"),
        ("nnssl.transfer", "prove_loadable", "check_loadable"),
    ],
)
def test_a_renamed_thing_has_both_names(module, old, new):
    found = importlib.import_module(module)
    assert getattr(found, old) is getattr(found, new)
    assert getattr(found, new).__name__ == new


def test_a_moved_function_tells_where_it_is():
    with pytest.raises(ImportError, match="from nnssl.weights import write_variant"):
        from nnssl.plans import write_variant  # noqa: F401
