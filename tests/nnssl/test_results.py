import json
import logging

import pytest

from nnssl.errors import NnsslError
from nnssl.plans import Plan
from nnssl.results import find_pretrainings, find_pretrainings_elsewhere, list_pretrainings, output_folder


@pytest.fixture
def plan(tiny_plans, tiny_dataset_json):
    return Plan.from_dicts(tiny_plans(dataset_name="Dataset501_Target"), "3d_fullres", tiny_dataset_json())


def _run(folder, plan, *, final=True, latest=False, **changes):
    config = {
        "method": "macl",
        "sources": ["Dataset500_Source"],
        "base_plans": plan.base_plans,
        "plans_name": plan.plans_name,
        "configuration": plan.configuration,
        "architecture_hash": plan.architecture_hash,
        **changes,
    }
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    # not a checkpoint: reading it would fail
    for name, there in (("checkpoint_final.pth", final), ("checkpoint_latest.pth", latest)):
        if there:
            (folder / name).write_text("not a pickle")
    return folder


@pytest.mark.parametrize(
    ("sources", "name", "expected"),
    [
        ([501], None, "nnsslMACL__nnUNetPlans__3d_fullres"),
        (["Dataset501_Target"], "a-b", "nnsslMACL_a-b__nnUNetPlans__3d_fullres"),
        ([500], None, "nnsslMACL_d500__nnUNetPlans__3d_fullres"),
        (["Dataset502_B", "Dataset500_A", 500], "x", "nnsslMACL_d500_d502_x__nnUNetPlans__3d_fullres"),
        ([501, "4"], None, "nnsslMACL_d004_d501__nnUNetPlans__3d_fullres"),
    ],
)
def test_output_folder(sources, name, expected, plan, nnunet_env):
    folder = output_folder(plan, "MACL", sources, name)
    assert folder == nnunet_env.results / "Dataset501_Target" / expected
    assert not folder.exists()
    assert len(folder.name.split("__")) == 3


@pytest.mark.parametrize("name", ["a__b", "_a", "a_", "a/b", "../a", "", "a b", "ä"])
def test_names_that_nnunet_would_split_or_misplace_are_refused(name, plan, nnunet_env):
    with pytest.raises(NnsslError, match="--name"):
        output_folder(plan, "MACL", [500], name)


def test_finished_and_unfinished_runs_of_this_plan(plan, nnunet_env):
    done = _run(output_folder(plan, "MACL", [500]), plan, latest=True)
    going = _run(output_folder(plan, "MACL", [500], "b"), plan, final=False, latest=True, method="glmae")
    started = _run(output_folder(plan, "MACL", [500], "c"), plan, final=False)
    runs = find_pretrainings(plan)
    assert [r.folder for r in runs] == [done, going, started]
    assert [r.finished for r in runs] == [True, False, False]
    assert [r.checkpoint and r.checkpoint.name for r in runs] == ["checkpoint_final.pth", "checkpoint_latest.pth", None]
    assert [r.method for r in runs] == ["macl", "glmae", "macl"]
    assert runs[0].sources == ("Dataset500_Source",)
    assert runs[0].dataset_name == "Dataset501_Target"


def test_made_for_this_plan(plan, nnunet_env):
    def add(name, **changes):
        return _run(output_folder(plan, "MACL", [500], name), plan, **changes)

    add("config", configuration="2d")
    add("network", architecture_hash="0" * 64)
    add("plans", base_plans="nnUNetResEncUNetMPlans", plans_name="nnUNetResEncUNetMPlans")
    same_base = add("samebase", plans_name="nnUNetPlans_cpu")
    assert [r.folder for r in find_pretrainings(plan)] == [same_base]
    assert len(list_pretrainings("Dataset501_Target")) == 4


def test_a_variant_finds_the_pretraining_of_its_base_and_the_reverse(plan, nnunet_env):
    plans = {**plan.plans, "plans_name": "nnUNetPlans_ft", "nnssl": {"base_plans": "nnUNetPlans"}}
    variant = Plan.from_dicts(plans, "3d_fullres", plan.dataset_json)
    of_base = _run(output_folder(plan, "MACL", [500]), plan)
    assert [r.folder for r in find_pretrainings(variant)] == [of_base]
    of_variant = _run(output_folder(variant, "MACL", [500]), variant)
    assert {r.folder for r in find_pretrainings(plan)} == {of_base, of_variant}


def test_other_folders_are_no_runs_and_broken_ones_are_named(plan, nnunet_env, caplog):
    results = nnunet_env.results / "Dataset501_Target"
    for name in ("nnUNetTrainer__nnUNetPlans__3d_fullres", "nnssl_imported", "nnsslX__nnUNetPlans__3d_fullres"):
        (results / name).mkdir(parents=True)
    broken = _run(output_folder(plan, "MACL", [500], "broken"), plan)
    (broken / "config.json").write_text("{")
    incomplete = _run(output_folder(plan, "MACL", [500], "incomplete"), plan, method=None)
    good = _run(output_folder(plan, "MACL", [500]), plan)
    with caplog.at_level(logging.WARNING, "nnssl"):
        assert [r.folder for r in find_pretrainings(plan)] == [good]
    assert str(broken) in caplog.text
    assert f"{incomplete} is left out: its config.json has no 'method'" in caplog.text


def test_elsewhere(plan, nnunet_env, tiny_plans, tiny_dataset_json):
    other = Plan.from_dicts(
        tiny_plans(3, "resenc", dataset_name="Dataset500_Source"), "3d_fullres", tiny_dataset_json()
    )
    there = _run(output_folder(other, "MACL", [500]), other, sources=["Dataset500_Source"])
    _run(output_folder(plan, "MACL", [500]), plan)
    runs = find_pretrainings_elsewhere(plan)
    assert [r.folder for r in runs] == [there]
    assert (runs[0].dataset_name, runs[0].made_for(plan)) == ("Dataset500_Source", False)


def test_no_results_yet(plan, nnunet_env):
    assert find_pretrainings(plan) == []
    assert find_pretrainings_elsewhere(plan) == []
