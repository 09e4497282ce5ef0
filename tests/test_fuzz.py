"""Files that others have written or spoilt: each is used, or refused in words that name the file; never a traceback."""

import json
from copy import deepcopy
from datetime import timedelta

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nnssl.errors import NnsslError
from nnssl.experiments.experiment import load_experiment
from nnssl.networks import build_network
from nnssl.plans import Plan, load_plan
from nnssl.pretrain.engine.folder import RunFolder
from nnssl.results import list_pretrainings, output_folder

BOUNDED = settings(
    max_examples=150,
    deadline=timedelta(seconds=20),
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

leaves = (
    st.none()
    | st.booleans()
    | st.integers(-3, 70)
    | st.integers()
    | st.floats()
    | st.sampled_from(
        ["", "x", "1", "../../../evil", "/tmp", "a/b", "a\\b", "nan", "1e999", "torch.nn.Conv3d", "os.system"]
    )
    | st.text(max_size=8)
)
values = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


def paths(content, above=()):
    """All places of nested JSON, as keys from the top."""
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    found = []
    for key, value in items:
        found += [(*above, key), *paths(value, (*above, key))]
    return found


def mutated(content, place, value, how):
    """A copy in which the value at a place is another, is gone, or has a neighbour."""
    content = deepcopy(content)
    at = content
    for key in place[:-1]:
        at = at[key]
    if how == "gone":
        del at[place[-1]]
    elif how == "beside" and isinstance(at, list):
        at.append(value)
    elif how == "beside":
        at["new"] = value
    else:
        at[place[-1]] = value
    return content


def one_line_per_problem(error):
    text = str(error)
    assert text and "Traceback" not in text and len(text) < 4000
    return text


@pytest.fixture
def planned(nnunet_env, tiny_plans, tiny_dataset_json):
    folder = nnunet_env.preprocessed / "Dataset901_Tiny"
    folder.mkdir()
    plans = {arch: tiny_plans(3, arch, both=True, dataset_name="Dataset901_Tiny") for arch in ("plain", "resenc")}
    (folder / "dataset.json").write_text(json.dumps(tiny_dataset_json()))
    return folder, plans, tiny_dataset_json()


def use(folder, plans, dataset_json):
    """All that looks at plans before a run begins."""
    (folder / "nnUNetPlans.json").write_text(json.dumps(plans))
    (folder / "dataset.json").write_text(json.dumps(dataset_json))
    plan = load_plan(901)
    for what in (
        "architecture_hash",
        "data_hash",
        "total_stride",
        "median_shape",
        "n_classes",
        "network_text",
        "nnssl",
    ):
        assert getattr(plan, what) is not None
    where = output_folder(plan, "Mae", [901])
    assert where.parent.parent == folder.parent.parent / "nnUNet_results"
    assert (folder.parent / plan.dataset_name / plan.data_identifier).resolve().parent.parent == folder.parent.resolve()
    with torch.device("meta"):
        build_network(plan)


@BOUNDED
@given(data=st.data())
def test_plans(planned, data):
    folder, plans, dataset_json = planned
    content = plans[data.draw(st.sampled_from(["plain", "resenc"]))]
    places = [p for p in paths(content) if p[:2] != ("configurations", "2d")]
    place = data.draw(st.sampled_from(places))
    spoilt = mutated(
        content, place, data.draw(values), data.draw(st.sampled_from(["other", "other", "gone", "beside"]))
    )
    try:
        use(folder, spoilt, dataset_json)
    except NnsslError as error:
        one_line_per_problem(error)


@BOUNDED
@given(data=st.data())
def test_dataset_json(planned, data):
    folder, plans, dataset_json = planned
    place = data.draw(st.sampled_from(paths(dataset_json)))
    spoilt = mutated(dataset_json, place, data.draw(values), data.draw(st.sampled_from(["other", "gone", "beside"])))
    try:
        use(folder, plans["plain"], spoilt)
    except NnsslError as error:
        one_line_per_problem(error)


@BOUNDED
@given(content=values | st.text())
def test_plans_that_are_none(planned, content):
    folder = planned[0]
    (folder / "nnUNetPlans.json").write_text(
        content if isinstance(content, str) else json.dumps(content), "utf-8", "replace"
    )
    with pytest.raises(NnsslError):
        load_plan(901)


# ---- config.json -----------------------------------------------------------------------------------------------------------

RECORD = {
    "schema": 1,
    "method": "mae",
    "sources": ["Dataset901_Tiny"],
    "dataset": "Dataset901_Tiny",
    "plans_name": "nnUNetPlans",
    "configuration": "3d_fullres",
    "architecture_hash": "abc",
    "base_plans": "nnUNetPlans",
    "identity": {
        "method": "mae",
        "options": {"mask_ratio": 0.75, "lr": 0.001},
        "engine": {"amp": True, "batch_size": None},
        "epochs": 3,
        "iterations": 2,
        "batch_size": 4,
        "seed": 0,
        "crop": {"size": [8, 8, 8], "window": [8, 8, 8]},
        "sources": ["Dataset901_Tiny"],
        "weights": None,
        "cases": {"number": 5, "fingerprint": "abc"},
        "omni": None,
    },
    "accepted": {"allow_mismatch": False, "skip_bad": True, "cases": None, "exclude": None},
}


@BOUNDED
@given(data=st.data())
def test_config_json(nnunet_env, data):
    from nnssl.pretrain.methods import get_method
    from nnssl.pretrain.resolve import resolve

    place = data.draw(st.sampled_from(paths(RECORD)))
    spoilt = mutated(RECORD, place, data.draw(values), data.draw(st.sampled_from(["other", "gone", "beside"])))
    folder = nnunet_env.results / "Dataset901_Tiny" / "nnsslMae__nnUNetPlans__3d_fullres"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(spoilt))
    list_pretrainings("Dataset901_Tiny")  # warns
    try:
        saved = RunFolder(folder, lock=False).saved_config(whole=True)
        none = dict.fromkeys(("epochs", "iterations", "seed", "options", "crop"))
        resolve(get_method("mae"), saved, **none)
    except NnsslError as error:
        one_line_per_problem(error)
    try:
        with RunFolder(folder) as opened:
            opened.check_resume(RECORD["identity"], continue_run=True)
    except NnsslError as error:
        one_line_per_problem(error)


# ---- experiments -----------------------------------------------------------------------------------------------------------

EXPERIMENT = {
    "name": "few",
    "dataset": 4,
    "methods": ["scratch", "mae", {"method": "macl", "options": {"lr": 0.1}}, {"name": "old", "checkpoint": "old.pth"}],
    "labels": [4, "10%", "all"],
    "seeds": 3,
    "test": "imagesTs",
    "training": {"epochs": 20, "figures": {"peak_lr": 0.001}},
    "pretraining": {"epochs": 2, "options": {"workers": 0}, "crop": [16, 16, 16]},
    "network": {"features": [8, 16, 32]},
    "environment": {"OMP_NUM_THREADS": 1},
}


def read(tmp_path, text):
    file = tmp_path / "experiment.yaml"
    file.write_text(text, encoding="utf-8", errors="replace")
    return load_experiment(file)


@BOUNDED
@given(data=st.data())
def test_experiment_files(tmp_path, data):
    place = data.draw(st.sampled_from(paths(EXPERIMENT)))
    yaml_values = values | st.dates() | st.datetimes() | st.binary(max_size=5)
    spoilt = mutated(EXPERIMENT, place, data.draw(yaml_values), data.draw(st.sampled_from(["other", "gone", "beside"])))
    try:
        read(tmp_path, yaml.safe_dump(spoilt))
    except NnsslError as error:
        one_line_per_problem(error)


@BOUNDED
@given(text=st.text(alphabet="ab:-[]{}&*!<>|'\"#,?1.\n %@\t", max_size=40))
def test_yaml_of_any_kind(tmp_path, text):
    try:
        read(tmp_path, text)
    except NnsslError as error:
        assert "experiment.yaml" in one_line_per_problem(error)


HEAD = "dataset: 4\nmethods: [scratch, mae]\nlabels: [4]\n"


@pytest.mark.parametrize(
    "text",
    [
        "? [a, b]\n: 1\n",
        "seeds: .inf\n",
        "seeds: .nan\n",
        "seeds: [.inf]\n",
        "training: {epochs: 1e400}\n",
        f"training: {{epochs: {'9' * 5000}}}\n",
        "name: 2024-02-31\n",
        "seeds: 2024-01-01\n",
        "a: " + "[" * 3000 + "]" * 3000 + "\n",
        "training: &a {figures: *a}\n",
        "methods: !!python/object/apply:os.system [true]\n",
        "name: !!binary '%%%'\n",
        "dataset: 5\n",
        "<<: 3\n",
        "\x00",
    ],
)
def test_odd_yaml_is_refused_in_one_line(tmp_path, text):
    with pytest.raises(NnsslError, match=r"experiment\.yaml") as told:
        read(tmp_path, HEAD + text)
    assert "\n" not in str(told.value)


def test_merge_keys_work(tmp_path):
    text = (
        HEAD
        + "training: &short {epochs: 3}\nsettings:\n  - name: a\n    training:\n      <<: *short\n      iterations: 5\n"
    )
    (setting,) = read(tmp_path, text).settings
    (arm, _) = setting.arms
    assert arm.training.lengths == {"epochs": 3, "iterations": 5}
    overridden = text.replace("iterations: 5", "epochs: 7")
    assert read(tmp_path, overridden).settings[0].arms[0].training.epochs == 7


def test_a_million_references_take_no_time(tmp_path):
    lines = ["a0: &a0 [x, x]"] + [f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 40)]
    with pytest.raises(NnsslError, match="unknown key"):
        read(tmp_path, HEAD + "\n".join(lines))
    with pytest.raises(NnsslError, match="labels"):
        read(tmp_path, HEAD.replace("[4]", "*a30").join(["\n".join(lines) + "\n", ""]))


# ---- places ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("evil", ["../../../evil", "/elsewhere/evil", "a/b", "..", ".", "a\\b", "", "\x00"])
def test_nothing_leaves_the_folders(planned, evil):
    folder, plans, dataset_json = planned
    content = plans["plain"]
    for place in (("plans_name",), ("dataset_name",), ("configurations", "3d_fullres", "data_identifier")):
        with pytest.raises(NnsslError, match=place[-1]):
            Plan.from_dicts(mutated(content, place, evil, "other"), "3d_fullres", dataset_json)
    plan = Plan.from_dicts(content, "3d_fullres", dataset_json)
    with pytest.raises(NnsslError, match="--name"):
        output_folder(plan, "Mae", [901], evil)
    with pytest.raises(NnsslError, match="-p"):
        load_plan(901, plans_name=evil)
