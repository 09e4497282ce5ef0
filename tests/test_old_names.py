"""Public names of before still lead to what they meant."""

import dataclasses
import importlib

import pytest

from nnssl.pretrain.methods import CropRequest


@pytest.mark.parametrize(
    ("module", "old", "new"),
    [
        ("nnssl.errors", "nearest", "did_you_mean"),
        ("nnssl.intensity", "to_unit", "rescale_intensity"),
        ("nnssl.intensity", "from_unit", "restore_intensity"),
        ("nnssl.networks", "Pyramid", "FeaturePyramid"),
        ("nnssl.networks", "walk", "forward_features"),
        ("nnssl.plans.figures", "Figures", "FineTuningConfig"),
        ("nnssl.pretrain.augment", "Draws", "StepRNG"),
        ("nnssl.pretrain.data", "Pool", "CaseSet"),
        ("nnssl.pretrain.geometry", "window_for", "read_size_for"),
        ("nnssl.transfer", "prove_loadable", "check_loadable"),
    ],
)
def test_a_renamed_thing_has_both_names(module, old, new):
    found = importlib.import_module(module)
    assert getattr(found, old) is getattr(found, new)
    assert getattr(found, new).__name__ == new


def test_a_request_takes_and_gives_its_old_fields():
    """What an objective outside of this repository may have written."""
    old = CropRequest((8, 8), window=(12, 12), place="volume", align=True)
    assert old == CropRequest((8, 8), (12, 12), sampling="whole", reorient=True)
    assert (old.window, old.place, old.align) == ((12, 12), "whole", True)
    assert CropRequest((8, 8), (8, 8), place="roam").sampling == "jitter"
    assert dataclasses.replace(old, window=(20, 16)).read_size == (20, 16)
    with pytest.raises(TypeError, match="windows"):
        CropRequest((8, 8), windows=(8, 8))


def test_attributes_have_both_names(tmp_path):
    from nnssl.weights import Adaptation, Checkpoint

    assert Adaptation.from_told({"adapt": {"depth": "match"}}) == Adaptation.from_metadata(
        {"adapt": {"depth": "match"}}
    )
    assert Checkpoint(tmp_path, {}, ["read"]).told == ["read"]


def test_a_moved_function_tells_where_it_is():
    with pytest.raises(ImportError, match="from nnssl.weights import write_variant"):
        from nnssl.plans import write_variant  # noqa: F401
    with pytest.raises(ImportError, match="from nnssl.preprocessed import list_cases"):
        from nnssl.transferability import list_cases  # noqa: F401
    with pytest.raises(ImportError, match="diagonal of distance_matrix"):
        from nnssl.transferability import paired_distance  # noqa: F401


def test_pieces_of_transferability_are_found_where_they_were():
    import nnssl.transferability as found
    from nnssl.transferability import crops

    assert found.read_crops is crops.read_crops
    for names in found._MOVED.values():
        assert all(getattr(found, name).__name__ == name for name in names)
    assert not hasattr(found, "read_crop")


def test_options_are_taken_under_both_names_and_found_in_folders_of_before():
    from nnssl.config import make_config, split_options
    from nnssl.pretrain.engine.folder import differences
    from nnssl.pretrain.methods import get_method
    from nnssl.pretrain.omni.config import resolve_omni

    voco = get_method("voco").Config
    (given,) = split_options({"align": "false", "grid": "1,3,3"}, [voco])
    assert given == {"reorient": "false", "grid": "1,3,3"}
    assert not make_config(voco, given).reorient and not make_config(voco, {}, {"align": False}).reorient
    assert make_config(voco, {"reorient": True}, {"align": False}).reorient, "what the user gave comes before a preset"
    assert resolve_omni({"agreement": "5"}).compared == 5
    assert not differences({"options": {"align": True, "lr": 1}}, {"options": {"reorient": True, "lr": 1}})
    changed = differences({"options": {"align": True}}, {"options": {"reorient": False}})
    assert changed == ["options.reorient: True in the folder, False now"]
