"""Which cases are trained, pretrained and tested on; above all that no test case is ever among the others."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from nnssl.errors import NnsslError
from nnssl.experiments.cases import forbidden_cases, resolve_setting
from nnssl.experiments.experiment import Setting, load_experiment
from nnssl.experiments.graph import build_graph

LINES = {"dataset": "901", "methods": "[scratch, mae]", "labels": "[1, 2]", "seeds": "2", "training": "{epochs: 2}"}


@pytest.fixture
def dataset(tiny_preprocessed):
    return tiny_preprocessed(901, "Tiny", 6, n_test=2)


def experiment(folder, **changes):
    file = folder / "exp.yaml"
    file.write_text("".join(f"{k}: {v}\n" for k, v in {**LINES, **changes}.items()))
    return load_experiment(file)


def setting(folder, **changes) -> Setting:
    return experiment(folder, **changes).settings[0]


def splits(folder, **content):
    file = folder / "splits.json"
    pool = [f"case_{i:03d}" for i in range(4)]
    base = {"test": ["case_006", "case_007"], "pool": pool}
    base["few_label"] = {"0": {"1": pool[:1], "2": pool[:2]}, "1": {"1": pool[3:], "2": pool[2:]}}
    file.write_text(json.dumps({"Dataset901_Tiny": {**base, **content}}))
    return file


def test_test_images_with_labels_are_the_default(dataset, tmp_path):
    found = resolve_setting(setting(tmp_path), "x")
    assert [t.name for t in found.test] == ["case_006", "case_007"] and found.name == "Tiny" and not found.by_folds
    assert len(found.pool) == 6 and [(d.count, d.seed, d.fold) for d in found.subsets] == [
        (1, 0, "all"), (1, 1, "all"), (2, 0, "all"), (2, 1, "all")]  # fmt: skip
    one, two = (next(d for d in found.subsets if (d.count, d.seed) == (n, 0)) for n in (1, 2))
    assert set(one.cases) < set(two.cases), "nested"
    assert all(set(d.cases).isdisjoint(d.validating) and d.validating for d in found.subsets)


def test_a_splits_file_decides_pool_labels_and_test(dataset, tmp_path):
    found = resolve_setting(setting(tmp_path, splits=splits(tmp_path), labels="[25%, 2, all]", seeds="[1]"), "x")
    assert {d.text: d.cases for d in found.subsets} == {
        "25%": ("case_003",),
        "2": ("case_002", "case_003"),
        "all": ("case_000", "case_001", "case_002", "case_003"),
    }
    assert found.pool == ("case_000", "case_001", "case_002", "case_003")
    assert {c for d in found.subsets for c in d.validating} <= set(found.pool)


def test_pretraining_keeps_to_the_pool(dataset, tmp_path):
    found = resolve_setting(setting(tmp_path, splits=splits(tmp_path)), "x")
    barred = forbidden_cases(found, "all", ["Dataset901_Tiny"])
    assert barred == ["Dataset901_Tiny/case_004", "Dataset901_Tiny/case_005"], "neither pool nor test"
    assert forbidden_cases(found, "all", ["Dataset905_Other"]) == []


def test_tested_cases_may_lie_among_the_training_images(dataset, tmp_path):
    found = resolve_setting(setting(tmp_path, test="[case_000, case_006]"), "x")
    assert [t.name for t in found.test] == ["case_000", "case_006"]
    assert "case_000" not in found.pool
    assert all("case_000" not in (*d.cases, *d.validating) for d in found.subsets)
    barred = forbidden_cases(found, "all", ["Dataset901_Tiny"])
    assert barred == ["Dataset901_Tiny/case_000"]


def test_folds_validate_where_asked_or_where_there_is_no_test_set(dataset, tmp_path, nnunet_env):
    found = resolve_setting(setting(tmp_path, folds="[0, 1]"), "x")
    assert found.by_folds and {d.fold for d in found.subsets} == {"0", "1"}
    folds = json.loads((dataset / "splits_final.json").read_text())
    for subset in found.subsets:
        assert set(subset.cases) <= set(folds[int(subset.fold)]["train"])
        assert list(subset.validating) == folds[int(subset.fold)]["val"]
    barred = forbidden_cases(found, "1", ["Dataset901_Tiny"])
    assert barred == [f"Dataset901_Tiny/{c}" for c in sorted(folds[1]["val"])]
    shutil.rmtree(nnunet_env.raw / "Dataset901_Tiny" / "labelsTs")
    assert {d.fold for d in resolve_setting(setting(tmp_path), "x").subsets} == {"0"}
    for _ in range(2):  # with images that have no labels, and with an empty folder, as many datasets have it
        with pytest.raises(NnsslError, match="no imagesTs with segmentations"):
            resolve_setting(setting(tmp_path, test="imagesTs"), "x")
        for file in (nnunet_env.raw / "Dataset901_Tiny" / "imagesTs").iterdir():
            file.unlink()
        assert {d.fold for d in resolve_setting(setting(tmp_path), "x").subsets} == {"0"}
    with pytest.raises(NnsslError, match="fold 7: dataset 901 has the folds 0, 1"):
        resolve_setting(setting(tmp_path, folds="[7]"), "x")
    with pytest.raises(NnsslError, match="max_test_cases needs test cases"):
        resolve_setting(setting(tmp_path, folds="[0]", max_test_cases=1), "x")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"few_label": {"0": {"1": ["case_006"]}}}, "'case_006' is a test case and in the pool or among the labelled"),
        ({"pool": ["case_000", "case_007"]}, "'case_007' is a test case and in the pool"),
        ({"pool": ["case_001", "case_002"]}, "'case_000' is among the labelled cases and not in the pool"),
        ({"pool": ["case_000", "case_0011"]}, r"'case_0011' is not among the preprocessed cases. Did you mean"),
        ({"test": ["case_066"]}, "'case_066' is in neither imagesTs nor imagesTr"),
        ({"test": None}, "holds no 'test' list"),
        ({"few_label": {"1": {"1": ["case_000"]}}}, "no few_label for seed 0; it has 1"),
        ({"few_label": {"0": {"1": ["case_000"]}, "1": {"1": ["case_000"]}}}, "no 2 labelled cases for seed 0"),
    ],
)
def test_wrong_splits_are_refused(dataset, tmp_path, change, message):
    with pytest.raises(NnsslError, match=message):
        resolve_setting(setting(tmp_path, splits=splits(tmp_path, **change)), "x")


def test_copies_of_test_images_are_found(dataset, tmp_path, nnunet_env, tiny_raw_dataset):
    raw = nnunet_env.raw / "Dataset901_Tiny"
    other = tiny_raw_dataset(905, "Other", 3, labelled=False, seed=5)
    shutil.copy(raw / "imagesTs" / "case_006_0000.nii.gz", other / "imagesTr" / "case_001_0000.nii.gz")
    found = resolve_setting(setting(tmp_path), "x")
    assert forbidden_cases(found, "all", ["Dataset901_Tiny", "Dataset905_Other"]) == ["Dataset905_Other/case_001"]
    shutil.copy(raw / "imagesTs" / "case_007_0000.nii.gz", raw / "imagesTr" / "case_002_0000.nii.gz")
    with pytest.raises(NnsslError, match="'case_002' is a copy of a test image"):
        resolve_setting(setting(tmp_path), "x")


@pytest.mark.parametrize("kind", ["test set", "splits", "test in training images", "folds"])
def test_no_list_of_any_job_holds_a_tested_case(dataset, tmp_path, kind):
    changes = {
        "test set": {},
        "splits": {"splits": splits(tmp_path)},
        "test in training images": {"test": "[case_001, case_004]"},
        "folds": {"folds": "[0, 1]"},
    }[kind]
    graph = build_graph(experiment(tmp_path, **changes), tmp_path / "out", "cpu")
    plans = {j.id: j for j in graph.jobs.values() if j.phase == "plan"}
    assert len(plans) == len(graph.runs) == (16 if kind == "folds" else 8)
    for run in graph.runs:
        tested = set(run.subset.validating) if kind == "folds" else {t.name for t in run.resolved.test}
        command = plans[f"plan-{run.name}"].command
        labels = graph.texts[path_after(command, "--labels")].split()
        assert labels and tested.isdisjoint(labels) and tuple(labels) == run.subset.cases
        if kind != "folds":
            assert tested.isdisjoint(graph.texts[path_after(command, "--validate")].split())
        for job in (graph.jobs[i] for i in run.jobs if i.startswith("pretrain")):
            seen = {f"case_{i:03d}" for i in range(6)}
            if "--exclude" in job.command:
                seen -= {c.split("/")[1] for c in graph.texts[path_after(job.command, "--exclude")].split()}
            assert tested.isdisjoint(seen)
    pretrainings = [j for j in graph.jobs.values() if j.phase == "pretrain"]
    assert len(pretrainings) == (2 if kind == "folds" else 1), "shared by seeds and labels, not by folds"


@pytest.mark.parametrize(
    ("changes", "barred"),
    [
        ({}, set()),
        ({"splits": True}, {"case_004", "case_005"}),
        ({"test": "[case_001, case_004]"}, {"case_001", "case_004"}),
        ({"folds": "[0, 1]"}, set()),
    ],
)
def test_a_mean_teacher_does_not_learn_from_what_is_tested(dataset, tmp_path, changes, barred):
    """It learns from the training cases without labels: not from those that are test cases of the experiment, or in no pool."""
    changes = {**changes, "methods": "[scratch, mean-teacher]"}
    if changes.pop("splits", None):
        changes["splits"] = splits(tmp_path)
    graph = build_graph(experiment(tmp_path, **changes), tmp_path / "out", "cpu")
    for job in (j for j in graph.jobs.values() if j.phase == "plan"):
        left = set()
        if "--exclude" in job.command:
            left = {
                c.removeprefix("Dataset901_Tiny/") for c in graph.texts[path_after(job.command, "--exclude")].split()
            }
        assert left == (barred if "mean-teacher" in job.id else set())


def path_after(command, option):
    return Path(command[command.index(option) + 1])


def test_max_test_cases_and_equal_numbers(dataset, tmp_path):
    few = resolve_setting(setting(tmp_path, max_test_cases=1), "x")
    assert len(few.test) == 1 and len(few.pool) == 6
    with pytest.raises(NnsslError, match="labels '1' and '10%' are both 1 cases"):
        resolve_setting(setting(tmp_path, labels="[1, 10%]"), "x")


def test_what_cannot_run_is_said_before(dataset, tmp_path):
    with pytest.raises(NnsslError, match="--labels 7"):
        resolve_setting(setting(tmp_path, labels="[7]"), "x")
    with pytest.raises(NnsslError, match="the checkpoint .*nowhere.pth does not exist"):
        build_graph(experiment(tmp_path, methods="[{name: a, checkpoint: nowhere.pth}]"), tmp_path / "out")
    with pytest.raises(NnsslError, match="--features names 9 stages"):
        build_graph(experiment(tmp_path, network="{features: [1, 2, 3, 4, 5, 6, 7, 8, 9]}"), tmp_path / "out")
    with pytest.raises(NnsslError, match="was not found"):
        resolve_setting(replace(setting(tmp_path), dataset="999"), "x")
