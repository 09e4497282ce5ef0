"""Plans without labels: the fingerprint, nnU-Net's planners on it, and what a run does with a dataset that has nothing."""

from __future__ import annotations

import json
import logging
import os
import shutil

import numpy as np
import pytest
import SimpleITK as sitk
from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import DatasetFingerprintExtractor
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

from nnssl.errors import NnsslError
from nnssl.plans import load_plan
from nnssl.pretrain import run
from nnssl.pretrain.prepare import fingerprint, prepare_sources
from nnssl.pretrain.prepare.body import body_of_raw
from nnssl.pretrain.prepare.fingerprint import FigureWorker, combine, measure, sample_cases
from nnssl.pretrain.prepare.planner import PLANNERS, plans_name, run_planner
from nnssl.pretrain.prepare.planning import is_unlabelled, planned
from nnssl.pretrain.prepare.raw import list_unplanned
from nnssl.pretrain.prepare.request import PrepareOptions

SMALL = {"shape": (16, 24, 20), "spacing": (2.0, 1.0, 1.25)}
NAME = "Dataset902_Free"


@pytest.fixture(autouse=True)
def _quick(request, monkeypatch):
    """The planner builds each network that it thinks of to count its voxels; here only where that matters."""
    if "memory" not in request.node.name and "default" not in request.node.name:
        from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner

        monkeypatch.setattr(ExperimentPlanner, "static_estimate_VRAM_usage", staticmethod(lambda *args: 2e7))


@pytest.fixture
def free(tiny_raw_dataset, nnunet_env):
    """``nnUNet_raw/Dataset902_Free``: four images, no labels, no plans."""
    return tiny_raw_dataset(902, "Free", 4, labelled=False, **SMALL)


def make(names=(NAME,), target=None, **options):
    return planned(list(names), PrepareOptions(list(names), target=target, **options))


def snapshot(folder):
    return {
        str(p.relative_to(folder)): (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.rglob("*") if p.is_file()
    }


def test_fingerprint_equals_nnunets_where_the_label_is_the_body(free, tmp_path):
    """The reference is nnU-Net's own extractor, given the body as a label."""
    raw = list_unplanned(NAME)
    found = measure(raw.cases, FigureWorker("SimpleITKIO", (False,)), n_processes=0, notes=None)
    ours = combine(found)
    theirs = []
    for case, figures in zip(raw.cases.values(), found):
        image = sitk.ReadImage(case.files[0])
        label = sitk.GetImageFromArray(body_of_raw(sitk.GetArrayFromImage(image)[None], [False], 0).astype(np.uint8))
        label.CopyInformation(image)
        sitk.WriteImage(label, str(tmp_path / "label.nii.gz"))
        shape, spacing, values, _, kept = DatasetFingerprintExtractor.analyze_case(
            list(case.files), str(tmp_path / "label.nii.gz"), SimpleITKIO, 20000
        )
        assert figures.shape == tuple(shape) and figures.spacing == tuple(spacing)
        assert figures.kept == pytest.approx(kept)
        theirs.append(values[0])
    values = np.concatenate(theirs)
    told = ours["foreground_intensity_properties_per_channel"]["0"]
    assert told["mean"] == pytest.approx(values.mean(), rel=0.01)
    assert told["std"] == pytest.approx(values.std(), rel=0.03)
    for key, share in (("percentile_00_5", 0.5), ("median", 50), ("percentile_99_5", 99.5)):
        assert told[key] == pytest.approx(np.percentile(values, share), rel=0.02), key
    assert told["min"] == pytest.approx(values.min(), rel=0.05) and told["max"] == pytest.approx(values.max(), rel=0.05)


@pytest.mark.parametrize("planner", PLANNERS)
def test_each_planner_runs_and_plans_as_nnunet_does(planner, free, nnunet_env, caplog):
    caplog.set_level(logging.INFO, "nnssl")
    plan = make(planner=planner)
    _, cls, name = PLANNERS[planner]
    folder = nnunet_env.preprocessed / NAME
    assert plan.plans_name == name and plan.plans["experiment_planner_used"] == cls
    assert {p.name for p in folder.iterdir()} == {"dataset.json", "dataset_fingerprint.json", f"{name}.json"}
    assert plan.spacing == (2.0, 1.0, 1.25) and plan.normalization_schemes == ("ZScoreNormalization",)
    assert plan.network_class == ("PlainConvUNet" if planner == "default" else "ResidualEncoderUNet")
    assert load_plan(902, "3d_fullres", name).plans == plan.plans
    assert load_plan(902, "2d", name).dim == 2
    text = "\n".join(caplog.messages)
    for part in (
        cls,
        "spacing 2x1x1.25 mm",
        f"batch {plan.batch_size}",
        f"{plan.n_stages} stages",
        "ZScoreNormalization",
    ):
        assert part in text
    assert "x".join(map(str, plan.patch_size)) in text


def test_memory_target_is_handed_on(free):
    description = json.loads((free / "dataset.json").read_text()) | {"numTraining": 50000}
    statistics = dict.fromkeys(("mean", "median", "std", "min", "max", "percentile_99_5", "percentile_00_5"), 1.0)
    figures = {
        "spacings": [[1.0] * 3] * 2,
        "shapes_after_crop": [[32, 32, 32]] * 2,
        "foreground_intensity_properties_per_channel": {"0": statistics},
        "median_relative_size_after_cropping": 1.0,
    }
    files = {"owner": NAME, "dataset_json": description, "fingerprint": figures, "reader": "SimpleITKIO"}
    plans = [run_planner("default", "P", gb, **files) for gb in (None, 8, 12)]
    batch = [p["configurations"]["3d_fullres"]["batch_size"] for p in plans]
    assert batch[0] == batch[1] < batch[2]


def test_what_is_planned_is_used_and_nothing_is_overwritten(free, nnunet_env):
    before = snapshot(nnunet_env.raw)
    plan = make()
    assert snapshot(nnunet_env.raw) == before
    written = snapshot(nnunet_env.preprocessed)
    assert make().plans == plan.plans
    other = make(plans="nnUNetResEncUNetMPlans")  # the name tells the planner
    assert other.network_class == "ResidualEncoderUNet"
    after = snapshot(nnunet_env.preprocessed)
    assert {n for n in after if after[n] != written.get(n)} == {f"{NAME}/nnUNetResEncUNetMPlans.json"}
    pool = prepare_sources(plan, [NAME], n_processes=0)
    assert len(pool.cases) == 4 and pool.cases[0].folder.name.startswith(f"nnssl_{NAME}_nnUNetPlans_3d_fullres")


def test_without_dataset_json_a_legal_one_is_written(free, nnunet_env, caplog):
    (free / "dataset.json").unlink()
    plan = make()
    for folder in (nnunet_env.raw, nnunet_env.preprocessed):
        assert json.loads((folder / NAME / "dataset.json").read_text()) == {
            "channel_names": {"0": "MR"},
            "labels": {"background": 0},
            "numTraining": 4,
            "file_ending": ".nii.gz",
        }
    assert "taken for MR" in caplog.text and plan.n_channels == 1


def test_nameless_images_in_hounsfield_units_are_ct(tiny_raw_dataset, nnunet_env):
    folder = tiny_raw_dataset(902, "Free", 2, labelled=False, modality="CT", **SMALL)
    (folder / "dataset.json").unlink()
    plan = make()
    assert plan.normalization_schemes == ("CTNormalization",)
    told = plan.plans["foreground_intensity_properties_per_channel"]["0"]
    assert told["percentile_00_5"] > -500  # air around the body does not enter


def test_what_the_user_wrote_in_dataset_json_stays(free, nnunet_env):
    mine = {"channel_names": {"0": "CT"}, "file_ending": ".nii.gz", "licence": "mine"}
    (free / "dataset.json").write_text(json.dumps(mine))
    plan = make()
    assert json.loads((free / "dataset.json").read_text()) == mine
    told = json.loads((nnunet_env.preprocessed / NAME / "dataset.json").read_text())
    assert told == {**mine, "labels": {"background": 0}, "numTraining": 4}
    assert plan.normalization_schemes == ("CTNormalization",)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root writes everywhere")
def test_read_only_raw_folder(free, nnunet_env):
    (free / "dataset.json").unlink()
    free.chmod(0o555)
    try:
        make()
    finally:
        free.chmod(0o755)
    assert (nnunet_env.preprocessed / NAME / "dataset.json").is_file()


def test_several_channels(tiny_raw_dataset):
    tiny_raw_dataset(902, "Free", 2, labelled=False, channels=2, **SMALL)
    plan = make()
    assert plan.n_channels == 2 and len(plan.plans["foreground_intensity_properties_per_channel"]) == 2


def test_bad_images_are_named_and_left_out(free, caplog, nnunet_env):
    (free / "imagesTr" / "case_000_0000.nii.gz").write_bytes(b"no image")
    sitk.WriteImage(
        sitk.GetImageFromArray(np.ones((8, 9, 10), np.float32)), str(free / "imagesTr" / "case_002_0000.nii.gz")
    )
    make()
    assert "since they cannot be used: 2 images: " in caplog.text and "case_002: the image is constant" in caplog.text
    told = json.loads((nnunet_env.preprocessed / NAME / "dataset_fingerprint.json").read_text())
    assert len(told["spacings"]) == 2 and told["nnssl"] == {"foreground": "body", "sources": [NAME], "images": 2}


def test_no_usable_image(free):
    for file in (free / "imagesTr").iterdir():
        file.write_bytes(b"")
    with pytest.raises(NnsslError, match="readers reads .*case_000_0000.nii.gz"):
        make()


def test_an_interrupted_fingerprint_is_continued(free, monkeypatch, nnunet_env):
    seen = []
    real = FigureWorker._figures

    def stop(self, name, *rest):
        if len(seen) == 2:
            raise KeyboardInterrupt
        seen.append(name)
        return real(self, name, *rest)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(FigureWorker, "_figures", stop)
        make()
    notes = nnunet_env.preprocessed / NAME / "nnssl_fingerprint_notes.jsonl"
    with open(notes, "a") as file:
        file.write('{"name": "half a li')
    again = []
    with monkeypatch.context() as patch:
        patch.setattr(FigureWorker, "_figures", lambda self, name, *r: again.append(name) or real(self, name, *r))
        make()
    assert sorted(seen + again) == [f"{NAME}/case_{i:03d}" for i in range(4)]
    assert not notes.exists()


def test_sampled_images_are_the_same_everywhere(free, monkeypatch, nnunet_env):
    cases = list_unplanned(NAME).cases
    few = sample_cases(cases, 2)
    assert list(few) == sorted(few) and len(few) == 2 and list(sample_cases(cases, 9)) == sorted(cases)
    fewer = {n: c for n, c in cases.items() if n not in list(few)[:1]}
    assert list(few)[1] in sample_cases(fewer, 2)
    monkeypatch.setattr("nnssl.pretrain.prepare.planning.MOST_IMAGES", 3)
    plan = make()
    told = json.loads((nnunet_env.preprocessed / NAME / "dataset_fingerprint.json").read_text())
    assert len(told["spacings"]) == 3 and plan.dataset_json["numTraining"] == 4


def test_labelled_datasets_are_left_to_nnunet(tiny_raw_dataset, nnunet_env):
    folder = tiny_raw_dataset(901, "Tiny", 2, **SMALL)
    assert not is_unlabelled("Dataset901_Tiny")
    with pytest.raises(NnsslError, match="nnUNetv2_plan_and_preprocess -d 901"):
        make(["Dataset901_Tiny"])
    shutil.rmtree(folder / "labelsTr")
    (folder / "labelsTr").mkdir()
    assert is_unlabelled("Dataset901_Tiny")


def test_a_target_without_labels_is_planned_and_a_planned_one_is_not(free, tiny_preprocessed):
    tiny_preprocessed(901, "Tiny", 3, shape=(16, 16, 16), plan_options={"patch": (8, 8, 8)})
    assert make([NAME], 901).dataset_name == "Dataset901_Tiny"
    assert make(["Dataset901_Tiny"], 902).dataset_name == NAME


def test_several_unlabelled_datasets_are_planned_together(free, tiny_raw_dataset, nnunet_env):
    tiny_raw_dataset(903, "More", 3, labelled=False, shape=(16, 24, 20), spacing=(4.0, 1.0, 1.0))
    names = [NAME, "Dataset903_More"]
    plan = make(names)
    told = json.loads((nnunet_env.preprocessed / NAME / "dataset_fingerprint.json").read_text())
    assert plan.dataset_name == NAME and len(told["spacings"]) == 7 and told["nnssl"]["sources"] == names
    assert not (nnunet_env.preprocessed / "Dataset903_More").exists()
    assert make(names).plans == plan.plans  # the same command again
    with pytest.raises(NnsslError, match="say it with -t"):
        make([NAME, "Dataset903_More", "Dataset904_X"])


def test_several_datasets_need_a_target_where_one_is_labelled_or_planned(free, tiny_raw_dataset, nnunet_env):
    tiny_raw_dataset(903, "More", 2, **SMALL)
    with pytest.raises(NnsslError, match="say it with -t"):
        make([NAME, "Dataset903_More"])
    make()
    shutil.rmtree(nnunet_env.raw / "Dataset903_More" / "labelsTr")
    with pytest.raises(NnsslError, match="say it with -t"):
        make([NAME, "Dataset903_More"])
    (nnunet_env.preprocessed / NAME / "dataset_fingerprint.json").unlink()  # plans that came from elsewhere
    with pytest.raises(NnsslError, match="say it with -t"):
        make([NAME, "Dataset903_More"])


def test_other_channels_are_not_planned_together(free, tiny_raw_dataset):
    tiny_raw_dataset(903, "More", 2, labelled=False, modality="CT", **SMALL)
    with pytest.raises(NnsslError, match="differ in their channels"):
        make([NAME, "Dataset903_More"])


def test_options_that_contradict_existing_plans(free, caplog, nnunet_env):
    folder = nnunet_env.preprocessed / NAME
    make()
    shutil.copy(folder / "nnUNetPlans.json", folder / "copy.json")
    with pytest.raises(NnsslError, match="made by ExperimentPlanner, not by --planner resenc_m"):
        make(planner="resenc_m", plans="copy")
    make(gpu_memory_target=24)
    assert "-gpu_memory_target is not looked at" in caplog.text
    with pytest.raises(NnsslError, match="--planner resnec_m is not known. Did you mean 'resenc_m'"):
        make(planner="resnec_m")
    assert plans_name("resenc_l", "mine") == "mine" and plans_name(None, "mine") == "mine"
    with pytest.raises(NnsslError, match="has no plans 'mine'"):
        make(plans="mine")


def test_other_ranks_wait_for_the_first(free, monkeypatch, nnunet_env):
    monkeypatch.setenv("RANK", "1")
    waits = []

    def sleep(seconds):
        waits.append(seconds)
        monkeypatch.delenv("RANK", raising=False)
        make()
        monkeypatch.setenv("RANK", "1")

    monkeypatch.setattr("nnssl.pretrain.prepare.planning.time.sleep", sleep)
    assert make().plans_name == "nnUNetPlans"
    assert len(waits) == 1


def test_planning_works_where_the_planner_would_refuse_the_environment(free, monkeypatch):
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    assert make().n_stages >= 2


def test_a_run_plans_and_a_dry_run_writes_nothing(free, nnunet_env, monkeypatch, caplog):
    caplog.set_level(logging.INFO, "nnssl")
    monkeypatch.setattr("nnssl.pretrain.api.estimate", lambda spec: "")
    monkeypatch.setattr(fingerprint, "QUANTILES", 101)
    done = []
    monkeypatch.setattr("nnssl.pretrain.api._execute", lambda spec, *rest: done.append(spec))
    options = {"method": "mae", "device": "cpu", "epochs": 1, "iterations": 20, "processes": 1}
    run(902, dry_run=True, **options)
    assert list(nnunet_env.preprocessed.iterdir()) == [] and "nothing was written" in caplog.text
    run(902, **options)
    assert done[0].plan.dataset_name == NAME and len(done[0].case_set.cases) == 4
    assert "nnUNetv2_preprocess -d 902" in caplog.text
