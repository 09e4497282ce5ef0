import json
import pickle
from copy import deepcopy

import pytest

from nnssl.errors import NnsslError
from nnssl.networks import build_network
from nnssl.plans import Plan, dataset_id, list_datasets, load_plan, resolve_dataset


@pytest.fixture
def planned(nnunet_env, tiny_plans, tiny_dataset_json):
    """Writes a planned dataset without any case and returns its folder."""

    def make(name="Dataset901_Tiny", plans=None, dataset_json=None):
        folder = nnunet_env.preprocessed / name
        folder.mkdir(exist_ok=True)
        plans = plans or tiny_plans(dataset_name=name, both=True)
        (folder / f"{plans['plans_name']}.json").write_text(json.dumps(plans))
        (folder / "dataset.json").write_text(json.dumps(dataset_json or tiny_dataset_json()))
        return folder

    return make


ANISOTROPIC = {
    "strides": ((1, 1, 1), (1, 2, 2), (2, 2, 1)),
    "kernels": ((1, 3, 3), (3, 3, 3), (3, 3, 1)),
    "patch": (8, 24, 12),
    "spacing": (3.0, 1.0, 0.5),
    "median_shape": (10, 40, 30),
    "transpose_forward": (1, 0, 2),
}


def test_attributes_of_an_anisotropic_plan(tiny_plans, tiny_dataset_json):
    plan = Plan.from_dicts(tiny_plans(3, "resenc", 2, **ANISOTROPIC), "3d_fullres", tiny_dataset_json(2))
    assert (plan.dim, plan.n_stages, plan.n_channels, plan.n_classes, plan.batch_size) == (3, 3, 2, 3, 2)
    assert plan.patch_size == (8, 24, 12)
    assert plan.strides == ((1, 1, 1), (1, 2, 2), (2, 2, 1))
    assert plan.cumulative_strides == ((1, 1, 1), (1, 2, 2), (2, 4, 2))
    assert plan.total_stride == (2, 4, 2)
    assert plan.kernel_sizes[0] == (1, 3, 3)
    assert plan.features == (4, 8, 16)
    assert plan.channel_names == {0: "MR", 1: "MR1"}
    assert plan.spacing == (3.0, 1.0, 0.5)
    assert plan.median_shape == (10, 40, 30)
    assert plan.transpose_forward == (1, 0, 2)
    assert plan.network_class == "ResidualEncoderUNet"
    assert plan.normalization_schemes == ("ZScoreNormalization", "ZScoreNormalization")
    assert (plan.base_plans, plan.plans_name, plan.nnssl) == ("nnUNetPlans", "nnUNetPlans", {})


def test_2d_plan_has_two_axes_but_three_of_the_median_shape(tiny_plans, tiny_dataset_json):
    plan = Plan.from_dicts(tiny_plans(2, **ANISOTROPIC), "2d", tiny_dataset_json())
    assert plan.dim == 2
    assert plan.patch_size == (24, 12)
    assert plan.total_stride == (4, 2)
    assert plan.spacing == (1.0, 0.5)
    assert plan.median_shape == (10, 40, 30)


def test_numbers_for_all_stages_and_old_modality_key(tiny_plans, tiny_dataset_json):
    plans = tiny_plans(2)
    kwargs = plans["configurations"]["2d"]["architecture"]["arch_kwargs"]
    kwargs.update(kernel_sizes=3, strides=[1, 2, [2, 2]], n_conv_per_stage=2, n_conv_per_stage_decoder=2)
    info = tiny_dataset_json()
    info["modality"] = info.pop("channel_names")
    plan = Plan.from_dicts(plans, "2d", info)
    assert plan.strides == ((1, 1), (2, 2), (2, 2))
    assert plan.kernel_sizes == ((3, 3),) * 3
    assert plan.channel_names == {0: "MR"}
    assert plan.architecture_hash == Plan.from_dicts(tiny_plans(2), "2d", tiny_dataset_json()).architecture_hash


def test_labels_missing_gives_two_classes_and_regions_are_counted(tiny_plans, tiny_dataset_json):
    info = tiny_dataset_json()
    del info["labels"]
    assert Plan.from_dicts(tiny_plans(), "3d_fullres", info).n_classes == 2
    info["labels"] = {"background": 0, "whole": [1, 2], "core": 2}
    info["regions_class_order"] = [1, 2]
    assert Plan.from_dicts(tiny_plans(), "3d_fullres", info).n_classes == 2
    info["labels"] = {"background": 0, "a": 1, "b": 2, "c": 3}
    assert Plan.from_dicts(tiny_plans(), "3d_fullres", info).n_classes == 4


def test_inherited_configuration(tiny_plans, tiny_dataset_json):
    plans = tiny_plans()
    plans["configurations"]["3d_bs9"] = {"inherits_from": "3d_fullres", "batch_size": 9}
    plan = Plan.from_dicts(plans, "3d_bs9", tiny_dataset_json())
    assert plan.batch_size == 9
    assert plan.patch_size == (16, 24, 16)
    assert plans["configurations"]["3d_bs9"] == {"inherits_from": "3d_fullres", "batch_size": 9}


def test_circular_inheritance_is_an_error_not_a_crash(tiny_plans, tiny_dataset_json):
    plans = tiny_plans()
    plans["configurations"]["a"] = {"inherits_from": "b"}
    plans["configurations"]["b"] = {"inherits_from": "a"}
    with pytest.raises(NnsslError, match="'a' of plans 'nnUNetPlans' cannot be read"):
        Plan.from_dicts(plans, "a", tiny_dataset_json())


def _old_format(plans):
    config = plans["configurations"]["3d_fullres"]
    kwargs = config.pop("architecture")["arch_kwargs"]
    config.update(
        UNet_class_name="PlainConvUNet",
        UNet_base_num_features=kwargs["features_per_stage"][0],
        unet_max_num_features=320,
        n_conv_per_stage_encoder=kwargs["n_conv_per_stage"],
        n_conv_per_stage_decoder=kwargs["n_conv_per_stage_decoder"],
        num_pool_per_axis=[2, 2, 2],
        pool_op_kernel_sizes=kwargs["strides"],
        conv_kernel_sizes=kwargs["kernel_sizes"],
    )
    return plans


@pytest.mark.filterwarnings("ignore:Detected old nnU-Net plans format")
def test_old_plans_are_the_same_network(tiny_plans, tiny_dataset_json):
    new = Plan.from_dicts(tiny_plans(), "3d_fullres", tiny_dataset_json())
    old = Plan.from_dicts(_old_format(tiny_plans()), "3d_fullres", tiny_dataset_json())
    assert old.features == new.features
    assert old.architecture_hash == new.architecture_hash
    assert old.data_hash == new.data_hash
    assert build_network(old).state_dict().keys() == build_network(new).state_dict().keys()


def test_architecture_hash_ignores_what_does_not_change_the_network(tiny_plans, tiny_dataset_json):
    plans = tiny_plans()
    plan = Plan.from_dicts(plans, "3d_fullres", tiny_dataset_json())
    other = deepcopy(plans)
    config = other["configurations"]["3d_fullres"]
    config.update(patch_size=[32, 16, 8], batch_size=7, spacing=[2.0, 1.0, 1.0])
    other.update(plans_name="nnUNetOther", nnssl={"base_plans": "nnUNetPlans"})
    architecture = config["architecture"]
    architecture["network_class_name"] = "dynamic_network_architectures.architectures.residual_unet.PlainConvUNet"
    kwargs = architecture["arch_kwargs"]
    kwargs.update(conv_op="torch.nn.Conv3d", norm_op="torch.nn.InstanceNorm3d", deep_supervision=True)
    kwargs["features_per_stage"] = [float(f) for f in kwargs["features_per_stage"]]
    del kwargs["dropout_op"], kwargs["dropout_op_kwargs"]
    architecture["arch_kwargs"] = dict(reversed(kwargs.items()))
    same = Plan.from_dicts(other, "3d_fullres", tiny_dataset_json(labels=("a", "b", "c", "d")))
    assert same.architecture_hash == plan.architecture_hash
    assert len(plan.architecture_hash) == 64
    assert same.base_plans == "nnUNetPlans"


@pytest.mark.parametrize(
    "change",
    [
        {"features": (4, 8, 12)},
        {"strides": ((1, 1, 1), (1, 2, 2), (2, 2, 2))},
        {"kernels": ((1, 3, 3), (3, 3, 3), (3, 3, 3))},
        {"arch": "resenc"},
        {"dim": 2},
        {"channels": 2},
    ],
)
def test_architecture_hash_sees_every_change_of_the_network(change, tiny_plans, tiny_dataset_json):
    base = Plan.from_dicts(tiny_plans(), "3d_fullres", tiny_dataset_json())
    configuration = "2d" if change.get("dim") == 2 else "3d_fullres"
    changed = Plan.from_dicts(tiny_plans(**change), configuration, tiny_dataset_json(change.get("channels", 1)))
    assert changed.architecture_hash != base.architecture_hash


def test_data_hash_follows_preprocessed_voxels_only(tiny_plans, tiny_dataset_json):
    def data_hash(change=None, **options):
        plans = tiny_plans(**options)
        if change:
            change(plans, plans["configurations"]["3d_fullres"])
        return Plan.from_dicts(plans, "3d_fullres", tiny_dataset_json()).data_hash

    base = data_hash()
    assert len(base) == 8
    assert data_hash(patch=(8, 8, 8), features=(2, 4, 8), arch="resenc") == base
    assert data_hash(spacing=(1.0, 1.0, 2.0)) != base
    assert data_hash(transpose_forward=(1, 0, 2)) != base
    assert data_hash(modality="CT") != base
    assert data_hash(lambda p, c: c["resampling_fn_data_kwargs"].update(order=1)) != base
    assert data_hash(lambda p, c: c.update(use_mask_for_norm=[True])) != base

    def statistics(plans, config):
        plans["foreground_intensity_properties_per_channel"]["0"]["mean"] = -7.0

    assert data_hash(statistics) == base, "z-scoring does not use the dataset's statistics"
    assert data_hash(statistics, modality="CT") != data_hash(modality="CT"), "CT normalisation does"


def test_plans_can_be_pickled_for_workers(tiny_plans, tiny_dataset_json):
    plan = Plan.from_dicts(tiny_plans(), "3d_fullres", tiny_dataset_json())
    copy = pickle.loads(pickle.dumps((plan, plan.config, plan.architecture_hash)[0]))
    assert copy.architecture_hash == plan.architecture_hash


@pytest.mark.parametrize("asked", [901, "901", "0901", "Dataset901_Tiny"])
def test_load_plan_by_number_and_name(asked, planned):
    planned()
    assert load_plan(asked).dataset_name == "Dataset901_Tiny"
    assert load_plan(asked, "2d").dim == 2


def test_unknown_dataset_lists_the_nearest(nnunet_env, planned):
    planned("Dataset901_Tiny")
    (nnunet_env.raw / "Dataset004_Hippocampus").mkdir()
    (nnunet_env.raw / "not_a_dataset").mkdir()
    with pytest.raises(NnsslError, match=r"Dataset '903' was not found\. Nearest: Dataset901_Tiny, Dataset004_Hippo"):
        load_plan(903)
    with pytest.raises(NnsslError, match=r"Nearest: Dataset004_Hippocampus, Dataset901_Tiny"):
        resolve_dataset("Dataset004_Hipocampus")
    assert list_datasets() == {
        "Dataset004_Hippocampus": ["nnUNet_raw"],
        "Dataset901_Tiny": ["nnUNet_preprocessed"],
    }


def test_ambiguous_number_unset_folders_and_odd_names(nnunet_env, monkeypatch):
    (nnunet_env.raw / "Dataset007_A").mkdir()
    (nnunet_env.results / "Dataset007_B").mkdir()
    with pytest.raises(NnsslError, match="Dataset007_A, Dataset007_B"):
        resolve_dataset(7)
    assert resolve_dataset("Dataset007_B") == "Dataset007_B"
    assert dataset_id("Dataset1234_Long_Name") == 1234
    with pytest.raises(NnsslError, match="not a dataset name"):
        dataset_id("Task007_A")
    for variable in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        monkeypatch.delenv(variable)
    with pytest.raises(NnsslError, match="None of nnUNet_raw"):
        resolve_dataset(7)


def test_unplanned_dataset_says_what_to_type(nnunet_env):
    (nnunet_env.raw / "Dataset004_Hippocampus").mkdir()
    with pytest.raises(NnsslError, match="nnUNetv2_plan_and_preprocess -d 4$"):
        load_plan(4)


def test_other_plans_exist(planned):
    planned()
    with pytest.raises(NnsslError, match=r"Did you mean 'nnUNetPlans'\? It has: nnUNetPlans\. Choose one with -p"):
        load_plan(901, plans_name="nnUNetPlan")


def test_missing_configuration_lists_those_that_exist(planned):
    planned()
    with pytest.raises(NnsslError, match=r"no configuration '3d_lowres'.*They have: 2d, 3d_fullres"):
        load_plan(901, "3d_lowres")


def test_broken_files_are_named(planned):
    folder = planned()
    (folder / "nnUNetPlans.json").write_text('{"dataset_name": ')
    with pytest.raises(NnsslError, match="nnUNetPlans.json has not|nnUNetPlans.json cannot be read"):
        load_plan(901)
    (folder / "nnUNetPlans.json").write_text('{"configurations": {}}')
    with pytest.raises(NnsslError, match="dataset_name, plans_name, transpose_forward is missing"):
        load_plan(901)


def test_dataset_json_is_taken_from_raw_where_preprocessed_has_none(planned, nnunet_env, tiny_dataset_json):
    (planned() / "dataset.json").unlink()
    with pytest.raises(NnsslError, match="dataset.json does not exist"):
        load_plan(901)
    raw = nnunet_env.raw / "Dataset901_Tiny"
    raw.mkdir()
    (raw / "dataset.json").write_text(json.dumps(tiny_dataset_json(labels=("one",))))
    assert load_plan(901).n_classes == 2


def test_cascade_and_other_networks_are_refused(tiny_plans, tiny_dataset_json):
    plans = tiny_plans()
    plans["configurations"]["3d_cascade_fullres"] = {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"}
    with pytest.raises(NnsslError, match="second stage of a cascade.*'3d_lowres'"):
        Plan.from_dicts(plans, "3d_cascade_fullres", tiny_dataset_json())
    plans["configurations"]["3d_fullres"]["architecture"]["network_class_name"] = "x.y.UMamba"
    with pytest.raises(NnsslError, match="network UMamba; supported are PlainConvUNet, ResidualEncoderUNet, Primus"):
        Plan.from_dicts(plans, "3d_fullres", tiny_dataset_json())
