"""From dataset names to a pool: nnU-Net's own folder as it is, everything else preprocessed once, checks and reports."""

from __future__ import annotations

import json
import logging
import os
import pickle
import shutil
import signal
import sys
import time

import blosc2
import numpy as np
import pytest
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
from nnunetv2.utilities.utils import create_lists_from_splitted_dataset_folder

from nnssl.errors import NnsslError
from nnssl.plans import Plan, load_plan
from nnssl.pretrain.data import CaseSet
from nnssl.pretrain.prepare import prepare_sources
from nnssl.pretrain.prepare.raw import list_raw

SMALL = {"shape": (12, 16, 12), "plan_options": {"patch": (8, 8, 8)}}
RAW = {"shape": (12, 16, 12)}


@pytest.fixture
def target(tiny_preprocessed):
    """Dataset901_Tiny, preprocessed by nnU-Net, and its plan."""

    def make(n=5, **options) -> Plan:
        tiny_preprocessed(901, "Tiny", n, **{**SMALL, **options})
        return load_plan(901, options.pop("configuration", "3d_fullres"))

    return make


@pytest.fixture
def opened():
    """Names of the files that are opened while ``opened.on``."""
    names: list[str] = []
    watched.append(names)
    yield names
    watched.clear()


watched: list[list[str]] = []
_hooked: list[bool] = []


def _hook(event, arguments):
    if watched and event == "open" and isinstance(arguments[0], (str, bytes)):
        watched[0].append(os.fsdecode(arguments[0]))


@pytest.fixture(autouse=True)
def _install_hook():
    if not _hooked:
        sys.addaudithook(_hook)  # cannot be removed; it does nothing unless a test watches
        _hooked.append(True)


def prepare(plan, *sources, **options) -> CaseSet:
    return prepare_sources(plan, list(sources), n_processes=0, **options)


def own_folder(env, source="Dataset902_Free"):
    (folder,) = [p for p in (env.preprocessed / source).iterdir() if p.is_dir() and not p.name.endswith("_tmp")]
    return folder


# ---- nnU-Net's folder as it is ---------------------------------------------------------------------------------------------


def test_own_dataset_is_used_as_it_is(target, nnunet_env, opened):
    plan = target(6)
    opened.clear()
    pool = prepare(plan, "Dataset901_Tiny")
    folder = nnunet_env.preprocessed / "Dataset901_Tiny" / "nnUNetPlans_3d_fullres"
    assert [c.name for c in pool.cases] == [f"case_{i:03d}" for i in range(6)]
    assert {c.folder for c in pool.cases} == {folder} and {c.source for c in pool.cases} == {"Dataset901_Tiny"}
    assert not [f for f in opened if f.endswith((".b2nd", ".pkl", ".nii.gz"))]
    assert sorted(p.name for p in folder.iterdir()) == sorted(
        f"case_{i:03d}{e}" for i in range(6) for e in (".b2nd", "_seg.b2nd", ".pkl")
    )
    assert pickle.loads(pickle.dumps(pool)) == pool
    shapes = [blosc2.open(str(folder / f"{c.name}.b2nd")).shape[1:] for c in pool.cases]
    assert pool.median_shape == tuple(round(m) for m in np.median(shapes, axis=0))
    assert pool.stats().n_cases == len(pool.train) == 5 and len(pool.held_out) == 1


def test_twenty_thousand_linked_cases_open_few_files(target, nnunet_env, opened):
    plan = target(2)
    folder = nnunet_env.preprocessed / "Dataset901_Tiny" / "nnUNetPlans_3d_fullres"
    raw = nnunet_env.raw / "Dataset901_Tiny"
    (raw / "imagesTs").mkdir()
    (raw / "imagesTs" / "test_000_0000.nii.gz").write_bytes(b"another size")
    for i in range(2, 20_000):
        for ending in (".b2nd", ".pkl"):
            os.link(folder / f"case_000{ending}", folder / f"case_{i:05d}{ending}")
        os.link(raw / "imagesTr" / "case_000_0000.nii.gz", raw / "imagesTr" / f"case_{i:05d}_0000.nii.gz")
    opened.clear()
    pool = prepare(plan, "Dataset901_Tiny")
    assert len(pool.cases) == 20_000 and len(pool.held_out) == 1000
    assert len(opened) < 20, opened[:30]


def test_interrupted_preprocessing_of_nnunet_is_told(target, nnunet_env):
    plan = target()
    (nnunet_env.preprocessed / "Dataset901_Tiny" / "nnUNetPlans_3d_fullres" / "case_002.pkl").unlink()
    with pytest.raises(NnsslError, match=r"1 of 5 images cannot be used(.|\n)*case_002.*interrupted(.|\n)*--skip-bad"):
        prepare(plan, "Dataset901_Tiny")
    pool = prepare(plan, "Dataset901_Tiny", skip_bad=True)
    assert [c.name for c in pool.cases] == ["case_000", "case_001", "case_003", "case_004"]
    assert [b.case for b in pool.bad] == ["case_002"]


def test_median_shape_of_2d_plans_keeps_the_slices(tiny_preprocessed):
    tiny_preprocessed(
        901, "Tiny", 4, dim=2, spacing=(3.0, 1.0, 1.0), shape=(10, 24, 20), plan_options={"spacing": (2.0, 2.0)}
    )
    plan = load_plan(901, "2d")
    pool = prepare(plan, "Dataset901_Tiny")
    folder = pool.cases[0].folder
    shapes = [blosc2.open(str(folder / f"{c.name}.b2nd")).shape[1:] for c in pool.cases]
    assert pool.median_shape == tuple(round(m) for m in np.median(shapes, axis=0))
    assert pool.median_shape[0] > 7 and pool.median_shape[1] <= 12


def test_median_shape_follows_transpose_and_spacing(tiny_preprocessed):
    options = {"spacing": (1.0, 2.0, 0.5), "transpose_forward": (2, 0, 1)}
    folder = tiny_preprocessed(901, "Tiny", 4, spacing=(2.0, 1.0, 1.0), shape=(10, 24, 20), plan_options=options)
    plan = load_plan(901)
    order = plan.manager.transpose_backward
    properties = [pickle.loads(p.read_bytes()) for p in sorted((folder / plan.data_identifier).glob("*.pkl"))]
    shapes = [[p["shape_after_cropping_and_before_resampling"][i] for i in order] for p in properties]
    fingerprint = {
        "spacings": [[2.0, 1.0, 1.0]] * 4,
        "shapes_after_crop": shapes,
    }  # before transpose, as nnU-Net has it
    (folder / "dataset_fingerprint.json").write_text(json.dumps(fingerprint))
    pool = prepare(plan, "Dataset901_Tiny")
    shapes = [blosc2.open(str(c.folder / f"{c.name}.b2nd")).shape[1:] for c in pool.cases]
    assert pool.median_shape == tuple(round(m) for m in np.median(shapes, axis=0))


# ---- preprocessing ---------------------------------------------------------------------------------------------------------


def test_voxels_equal_nnunets_own_preprocessing(target, tiny_raw_dataset, nnunet_env):
    plan = target(spacing=(1.0, 1.0, 1.0))
    source = nnunet_env.raw / "Dataset901_Tiny"
    shutil.copytree(source, nnunet_env.raw / "Dataset902_Free")
    shutil.rmtree(nnunet_env.raw / "Dataset902_Free" / "labelsTr")
    pool = prepare(plan, "Dataset902_Free")
    stock = nnunet_env.preprocessed / "Dataset901_Tiny" / "nnUNetPlans_3d_fullres"
    assert len(pool.cases) == 5
    for case in pool.cases:
        ours, theirs = (blosc2.open(str(f / f"{case.name}.b2nd")) for f in (case.folder, stock))
        assert np.array_equal(ours[:], theirs[:])
    assert own_folder(nnunet_env).name == f"nnssl_Dataset901_Tiny_nnUNetPlans_3d_fullres_{plan.data_hash}"
    assert not list((nnunet_env.preprocessed / "Dataset902_Free").glob("*_tmp"))
    from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class

    data, _, _, properties = infer_dataset_class(str(case.folder))(str(case.folder)).load_case(case.name)
    assert properties["class_locations"] == {} and data.shape[0] == 1


def test_second_start_opens_no_image(target, tiny_raw_dataset, opened):
    plan = target()
    tiny_raw_dataset(902, "Free", 4, labelled=False, seed=1, **RAW)
    first = prepare(plan, "Dataset902_Free")
    opened.clear()
    assert prepare(plan, "Dataset902_Free") == first
    assert not [f for f in opened if f.endswith((".b2nd", ".pkl", ".nii.gz"))]


def test_what_is_done_is_kept_and_damaged_lines_are_made_anew(target, tiny_raw_dataset, nnunet_env, monkeypatch):
    plan = target()
    tiny_raw_dataset(902, "Free", 4, labelled=False, **RAW)
    first = prepare(plan, "Dataset902_Free")
    folder = own_folder(nnunet_env)
    index = folder.with_name(folder.name + "_index.jsonl")
    times = {p.name: p.stat().st_mtime_ns for p in folder.glob("*.b2nd")}
    lines = index.read_text().splitlines()
    index.write_text("\n".join(lines[:-1]) + "\n" + lines[-1][:30])  # killed while it wrote the last line
    assert prepare(plan, "Dataset902_Free") == first
    assert times == {p.name: p.stat().st_mtime_ns for p in folder.glob("*.b2nd")}
    content = [json.loads(line) for line in index.read_text().splitlines() if line != lines[-1][:30]]
    assert sorted(c["name"] for c in content) == [f"case_{i:03d}" for i in range(4)]
    assert sorted(json.loads(line)["sha256"] for line in lines) == sorted(c["sha256"] for c in content)

    (folder / "case_001.b2nd").unlink()  # not done: its mark is gone
    prepare(plan, "Dataset902_Free")
    assert times["case_000.b2nd"] == (folder / "case_000.b2nd").stat().st_mtime_ns
    assert times["case_001.b2nd"] != (folder / "case_001.b2nd").stat().st_mtime_ns


def test_changed_images_are_made_anew_and_touched_ones_are_not(target, tiny_raw_dataset, nnunet_env):
    plan = target()
    raw = tiny_raw_dataset(902, "Free", 4, labelled=False, **RAW) / "imagesTr"
    prepare(plan, "Dataset902_Free")
    folder = own_folder(nnunet_env)
    before = {p.name: (p.stat().st_mtime_ns, p.stat().st_ino) for p in folder.glob("case_*[0-9].b2nd")}
    shutil.copy(raw / "case_003_0000.nii.gz", raw / "case_000_0000.nii.gz")
    os.utime(raw / "case_001_0000.nii.gz", ns=(1, 2 * 10**18))
    prepare(plan, "Dataset902_Free")
    after = {p.name: (p.stat().st_mtime_ns, p.stat().st_ino) for p in folder.glob("case_*[0-9].b2nd")}
    assert [n for n in before if before[n] != after[n]] == ["case_000.b2nd"]
    a, b = (blosc2.open(str(folder / f"case_{i:03d}.b2nd"))[:] for i in (0, 3))
    assert np.array_equal(a, b)


def test_left_behind_temporary_files_go(target, tiny_raw_dataset, nnunet_env):
    import socket

    plan = target()
    tiny_raw_dataset(902, "Free", 4, labelled=False, **RAW)
    parent = nnunet_env.preprocessed / "Dataset902_Free"
    name = f"nnssl_Dataset901_Tiny_nnUNetPlans_3d_fullres_{plan.data_hash}_tmp"
    dead = parent / name / f"{socket.gethostname()}-99999999"
    other = parent / name / "elsewhere-12"
    for folder in (dead, other):
        folder.mkdir(parents=True)
        (folder / "case_000.b2nd").write_bytes(b"half")
    prepare(plan, "Dataset902_Free")
    assert not dead.exists() and other.exists()


def test_raw_images_may_go_after_preprocessing(target, tiny_raw_dataset, nnunet_env, caplog):
    plan = target()
    raw = tiny_raw_dataset(902, "Free", 4, labelled=False, **RAW)
    first = prepare(plan, "Dataset902_Free")
    shutil.rmtree(raw)
    with caplog.at_level(logging.WARNING, logger="nnssl"):
        assert prepare(plan, "Dataset902_Free") == first
    assert "no raw images" in caplog.text


def test_unlabelled_target_is_preprocessed_from_its_images(tiny_raw_dataset, tiny_plans, nnunet_env):
    source = tiny_raw_dataset(904, "Own", 4, labelled=False, **RAW)
    plans = tiny_plans(dataset_name="Dataset904_Own", patch=(8, 8, 8))
    plan = Plan.from_dicts(plans, "3d_fullres", json.loads((source / "dataset.json").read_text()))
    pool = prepare(plan, "Dataset904_Own")
    assert pool.cases[0].folder.name.startswith("nnssl_Dataset904_Own_") and len(pool.cases) == 4
    shutil.rmtree(source / "imagesTr")
    shutil.rmtree(nnunet_env.preprocessed / "Dataset904_Own")
    with pytest.raises(NnsslError, match="nnUNetv2_preprocess -d 904 -c 3d_fullres"):
        prepare(plan, "Dataset904_Own")


def test_dry_run_writes_nothing_and_estimates(target, tiny_raw_dataset, nnunet_env):
    plan = target()
    tiny_raw_dataset(902, "Free", 4, labelled=False, shape=(12, 16, 12), spacing=(2.0, 1.0, 1.0))
    pool = prepare(plan, "Dataset902_Free", preprocess=False)
    assert pool.pending == 4 and len(pool.cases) == 4 and pool.median_shape == (24, 16, 12)
    assert not (nnunet_env.preprocessed / "Dataset902_Free").exists()
    done = prepare(plan, "Dataset902_Free")
    assert done.pending == 0 and prepare(plan, "Dataset902_Free", preprocess=False) == done
    assert done.fingerprint_hash == pool.fingerprint_hash


# ---- listing, selection, split ---------------------------------------------------------------------------------------------


def test_listing_agrees_with_nnunet(target, tiny_raw_dataset):
    plan = target()
    folder = tiny_raw_dataset(902, "Free", 4, labelled=False, channels=2, **RAW) / "imagesTr"
    (folder / "._case_000_0000.nii.gz").write_bytes(b"of a Mac")
    (folder / "notes.txt").write_text("x")
    theirs = create_lists_from_splitted_dataset_folder(str(folder), ".nii.gz", ["case_000", "case_003"], 1)
    ours = list_raw("Dataset902_Free", plan).cases
    assert [list(ours[n].files) for n in ("case_000", "case_003")] == theirs and len(ours) == 4


def test_source_without_dataset_json_or_labels(target, tiny_raw_dataset, caplog):
    plan = target()
    (tiny_raw_dataset(902, "Free", 4, labelled=False, **RAW) / "dataset.json").unlink()
    with caplog.at_level(logging.WARNING, logger="nnssl"):
        assert len(prepare(plan, "Dataset902_Free").cases) == 4
    assert "no dataset.json" in caplog.text


def test_images_that_dataset_json_names_one_by_one(target, tiny_raw_dataset, nnunet_env):
    plan = target()
    source = tiny_raw_dataset(902, "Free", 4, labelled=False, **RAW)
    info = json.loads((source / "dataset.json").read_text())
    info["dataset"] = {f"p{i}": {"images": [f"imagesTr/case_{i:03d}_0000.nii.gz"], "label": None} for i in (1, 3)}
    (source / "dataset.json").write_text(json.dumps(info))
    assert [c.name for c in prepare(plan, "Dataset902_Free").cases] == ["p1", "p3"]


def test_incomplete_and_misnamed_files_are_named(target, tiny_raw_dataset, nnunet_env):
    plan = target(channels=2)
    folder = tiny_raw_dataset(902, "Free", 5, labelled=False, channels=2, **RAW) / "imagesTr"
    (folder / "case_001_0001.nii.gz").unlink()
    shutil.copy(folder / "case_000_0000.nii.gz", folder / "lonely.nii.gz")
    shutil.copy(folder / "case_000_0000.nii.gz", folder / "case_002_0002.nii.gz")
    (folder / "case_003_0000.nii.gz").unlink()
    (folder / "case_003_0000.nii.gz").symlink_to(folder / "gone.nii.gz")
    with pytest.raises(NnsslError) as error:
        prepare(plan, "Dataset902_Free")
    for text in (
        "4 of 6",
        "case_001",
        "_0001 is missing",
        "lonely.nii.gz",
        "_0002 is not one",
        "case_003",
        "dead link",
    ):
        assert text in str(error.value), (text, str(error.value))


def test_cases_and_exclude(target, tiny_raw_dataset, tmp_path):
    plan = target()
    tiny_raw_dataset(902, "Free", 5, labelled=False, prefix="free", **RAW)
    both = ("Dataset901_Tiny", "Dataset902_Free")
    wanted, without = tmp_path / "cases.txt", tmp_path / "exclude.json"
    wanted.write_text("# the good ones\ncase_001\n\nfree_000\n free_002 \nDataset902_Free/free_003\n")
    without.write_text(json.dumps(["free_002"]))
    pool = prepare(plan, *both, cases=wanted, exclude=without)
    assert [c.key for c in pool.cases] == [
        "Dataset901_Tiny/case_001", "Dataset902_Free/free_000", "Dataset902_Free/free_003",
    ]  # fmt: skip
    assert sorted(p.stem for p in pool.cases[1].folder.glob("*.pkl")) == [
        "free_000",
        "free_003",
    ]  # no other was preprocessed
    wanted.write_text("case_001\nfre_001\ncase_001_0000.nii.gz\n")
    with pytest.raises(
        NnsslError, match=r"--cases .*2 name.*fre_001 Did you mean 'free_001'\?.*case_001_0000"
    ) as error:
        prepare(plan, *both, cases=wanted)
    assert "neither channel number" in str(error.value)
    without.write_text("{}")
    with pytest.raises(NnsslError, match=r"--exclude .*expected one case name per line"):
        prepare(plan, *both, exclude=without)
    with pytest.raises(NnsslError, match="--exclude .*cannot be read"):
        prepare(plan, *both, exclude=tmp_path / "none.txt")


def test_held_out_cases_depend_on_names_alone(target, tiny_raw_dataset, caplog):
    plan = target()
    tiny_raw_dataset(902, "Free", 30, labelled=False, shape=(6, 8, 7))
    pool = prepare(plan, "Dataset902_Free", held_out=0.2)
    assert len(pool.held_out) == 6 and not {c.key for c in pool.held_out} & {c.key for c in pool.train}
    assert prepare(plan, "Dataset902_Free", held_out=0.2) == pool
    assert len(prepare(plan, "Dataset902_Free").held_out) == 2  # 5 % of 30 is 1.5
    assert prepare(plan, "Dataset902_Free", held_out=0.0).held_out == []
    both = prepare(plan, "Dataset901_Tiny", "Dataset902_Free", held_out=0.2)
    stayed = {c.name for c in both.held_out if c.source == "Dataset902_Free"} & {c.name for c in pool.held_out}
    assert len(stayed) >= 4
    assert both.fingerprint_hash != pool.fingerprint_hash


def test_too_few_cases_hold_none_out(target, caplog):
    plan = target(3)
    with caplog.at_level(logging.WARNING, logger="nnssl"):
        pool = prepare(plan, "Dataset901_Tiny")
    assert pool.held_out == [] and len(pool.train) == 3 and "No case is held out" in caplog.text


# ---- bad images ------------------------------------------------------------------------------------------------------------


def spoil(folder):
    import SimpleITK as sitk

    whole = (folder / "case_000_0000.nii.gz").read_bytes()
    (folder / "case_000_0000.nii.gz").write_bytes(whole[: len(whole) // 2])
    (folder / "case_001_0000.nii.gz").write_bytes(b"")
    image = sitk.ReadImage(str(folder / "case_002_0000.nii.gz"))
    array = sitk.GetArrayFromImage(image)
    for name, value in (("case_002", np.nan), ("case_003", None)):
        bad = np.full_like(array, 7) if value is None else array.copy()
        if value is not None:
            bad[2, 3, 4:6] = value
        sitk.WriteImage(sitk.GetImageFromArray(bad), str(folder / f"{name}_0000.nii.gz"))
    (folder / "case_004_0000.nii.gz").write_bytes(b"no image at all")


REASONS = {
    "case_000": "truncated",
    "case_001": "empty",
    "case_002": "2 of 2304 voxels are NaN or infinite",
    "case_003": "constant",
    "case_004": "damaged",
}


def test_bad_images_are_counted_named_and_reported(target, tiny_raw_dataset, nnunet_env, capfd, caplog):
    plan = target()
    spoil(tiny_raw_dataset(902, "Free", 9, labelled=False, **RAW) / "imagesTr")
    with pytest.raises(NnsslError) as error:
        prepare(plan, "Dataset902_Free")
    text = str(error.value)
    assert "5 of 9 images cannot be used" in text and "--skip-bad" in text and "_report.csv" in text
    for case, reason in REASONS.items():
        assert any(case in line and reason in line and ".nii.gz" in line for line in text.splitlines()), (reason, text)
    with caplog.at_level(logging.WARNING, logger="nnssl"):
        pool = prepare(plan, "Dataset902_Free", skip_bad=True)
    assert [c.name for c in pool.cases] == [f"case_{i:03d}" for i in range(5, 9)]
    assert {b.case for b in pool.bad} == set(REASONS) and "--skip-bad" in caplog.text
    (report,) = pool.reports
    assert report.parent == nnunet_env.preprocessed / "Dataset902_Free" and len(report.read_text().splitlines()) == 6
    assert "ITK" not in capfd.readouterr().err

    shutil.copy(  # repaired images are taken, and the report shrinks
        nnunet_env.raw / "Dataset902_Free/imagesTr/case_005_0000.nii.gz",
        nnunet_env.raw / "Dataset902_Free/imagesTr/case_000_0000.nii.gz",
    )
    again = prepare(plan, "Dataset902_Free", skip_bad=True)
    assert len(again.cases) == 5 and len(report.read_text().splitlines()) == 5


def test_all_bad_is_an_error_even_with_skip_bad(target, tiny_raw_dataset):
    plan = target()
    spoil(tiny_raw_dataset(902, "Free", 5, labelled=False, **RAW) / "imagesTr")
    with pytest.raises(NnsslError, match="No image is left"):
        prepare(plan, "Dataset902_Free", skip_bad=True)


@pytest.mark.parametrize("ending", [".nii.gz", ".nii"])
def test_truncation_of_data_is_seen_however_packed(tmp_path, ending):
    import gzip

    import SimpleITK as sitk

    from nnssl.pretrain.prepare.integrity import check_whole

    path = tmp_path / "a.nii"
    sitk.WriteImage(sitk.GetImageFromArray(np.arange(1000, dtype=np.float32).reshape(10, 10, 10)), str(path))
    content = path.read_bytes()
    pack = gzip.compress if ending == ".nii.gz" else bytes
    good, short = tmp_path / f"good{ending}", tmp_path / f"short{ending}"
    good.write_bytes(pack(content))
    short.write_bytes(pack(content[:-8]))
    check_whole(str(good))
    with pytest.raises(ValueError, match="holds 4344 of 4352 bytes"):
        check_whole(str(short))


# ---- channels --------------------------------------------------------------------------------------------------------------


def test_modality_and_channel_names_must_agree(target, tiny_raw_dataset, caplog):
    plan = target()
    tiny_raw_dataset(902, "Free", 4, labelled=False, modality="CT", **RAW)
    with pytest.raises(NnsslError, match=r"channel 0 is 'CT'.*'MR'.*another modality(.|\n)*--allow-mismatch"):
        prepare(plan, "Dataset902_Free")
    with caplog.at_level(logging.WARNING, logger="nnssl"):
        assert len(prepare(plan, "Dataset902_Free", allow_mismatch=True).cases) == 4
    assert "--allow-mismatch" in caplog.text


def test_ct_target_refuses_mr(target, tiny_raw_dataset):
    plan = target(modality="CT")
    tiny_raw_dataset(902, "Free", 4, labelled=False, **RAW)
    with pytest.raises(NnsslError, match="CTNormalization of the target's plans is not meant for 'MR'"):
        prepare(plan, "Dataset902_Free")


def test_other_order_is_matched_by_name_when_allowed(target, tiny_raw_dataset, nnunet_env, caplog):
    plan = target(channels=2)
    source = tiny_raw_dataset(902, "Free", 4, labelled=False, channels=2, **RAW)
    prepare(plan, "Dataset902_Free")
    straight = blosc2.open(str(own_folder(nnunet_env) / "case_000.b2nd"))[:]
    info = json.loads((source / "dataset.json").read_text())
    info["channel_names"] = {"0": "mr1 ", "1": "MR"}
    (source / "dataset.json").write_text(json.dumps(info))
    with pytest.raises(NnsslError, match=r"found 2 problems(.|\n)*channel 0 is 'mr1 '(.|\n)*channel 1 is 'MR'"):
        prepare(plan, "Dataset902_Free")
    with caplog.at_level(logging.WARNING, logger="nnssl"):
        prepare(plan, "Dataset902_Free", allow_mismatch=True)
    assert "matched by name" in caplog.text
    assert np.array_equal(blosc2.open(str(own_folder(nnunet_env) / "case_000.b2nd"))[:], straight[::-1])


def test_another_number_of_channels(target, tiny_raw_dataset):
    plan = target()
    source = tiny_raw_dataset(902, "Free", 4, labelled=False, channels=2, **RAW)
    with pytest.raises(NnsslError, match=r"Dataset902_Free has 2 channels, Dataset901_Tiny has 1"):
        prepare(plan, "Dataset902_Free")
    assert len(prepare(plan, "Dataset902_Free", allow_mismatch=True).cases) == 4  # channel 0 has the target's name
    info = json.loads((source / "dataset.json").read_text())
    info["channel_names"] = {"0": "T1", "1": "T2"}
    (source / "dataset.json").write_text(json.dumps(info))
    with pytest.raises(NnsslError, match="cannot be matched by name"):
        prepare(plan, "Dataset902_Free", allow_mismatch=True)


def test_target_that_cannot_read_the_files(target, nnunet_env):
    plan = target()
    folder = nnunet_env.raw / "Dataset902_Free" / "imagesTr"
    folder.mkdir(parents=True)
    (folder / "a_0000.png").write_bytes(b"x")
    (folder.parent / "dataset.json").write_text(json.dumps({"channel_names": {"0": "MR"}, "file_ending": ".png"}))
    with pytest.raises(NnsslError, match=r"SimpleITKIO, which does not read .png"):
        prepare(plan, "Dataset902_Free")
    (folder / "a_0000.png").unlink()
    with pytest.raises(NnsslError, match="There are no images in"):
        prepare(plan, "Dataset902_Free")
    with pytest.raises(NnsslError, match="raw images .* are not there"):
        prepare(plan, "Dataset905_Nothing")


# ---- leaks -----------------------------------------------------------------------------------------------------------------


def test_test_images_are_found_by_content(target, tiny_raw_dataset, nnunet_env, caplog, opened):
    import SimpleITK as sitk

    plan = target(n_test=2)
    raw = tiny_raw_dataset(902, "Free", 4, labelled=False, seed=5, **RAW)
    image = sitk.ReadImage(str(nnunet_env.raw / "Dataset901_Tiny/imagesTs/case_006_0000.nii.gz"))
    sitk.WriteImage(image, str(raw / "imagesTr" / "leak_0000.nii.gz"), True, 9)  # packed otherwise, the same voxels
    with caplog.at_level(logging.WARNING, logger="nnssl"):
        pool = prepare(plan, "Dataset902_Free")
    assert pool.leaks == ["Dataset902_Free/leak"] and len(pool.cases) == 5
    (report,) = pool.reports
    assert "test images of Dataset901_Tiny" in caplog.text and f"--exclude {report}" in caplog.text
    assert (nnunet_env.preprocessed / "Dataset901_Tiny" / "nnssl_test_hashes.json").is_file()
    opened.clear()
    clean = prepare(plan, "Dataset902_Free", exclude=report)
    assert clean.leaks == [] and len(clean.cases) == 4
    assert not [f for f in opened if f.endswith(".nii.gz")]


def test_byte_equal_test_images_are_found_in_the_own_dataset(target, nnunet_env, opened):
    plan = target(n_test=1)
    raw = nnunet_env.raw / "Dataset901_Tiny"
    shutil.copy(raw / "imagesTr" / "case_002_0000.nii.gz", raw / "imagesTs" / "other_0000.nii.gz")
    opened.clear()
    assert prepare(plan, "Dataset901_Tiny").leaks == ["Dataset901_Tiny/case_002"]
    assert len([f for f in opened if "imagesTr" in f]) < 5


def test_images_that_are_there_twice_are_told(target, tiny_raw_dataset, caplog):
    plan = target()
    folder = tiny_raw_dataset(902, "Free", 4, labelled=False, **RAW) / "imagesTr"
    shutil.copy(folder / "case_001_0000.nii.gz", folder / "copy_0000.nii.gz")
    with caplog.at_level(logging.WARNING, logger="nnssl"):
        prepare(plan, "Dataset902_Free")
    assert "There twice: 1 image: Dataset902_Free/case_001 = Dataset902_Free/copy" in caplog.text


# ---- what machines do ------------------------------------------------------------------------------------------------------


def test_full_disk_tells_and_a_second_start_continues(target, tiny_raw_dataset, nnunet_env, monkeypatch):
    from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2

    plan = target()
    tiny_raw_dataset(902, "Free", 5, labelled=False, **RAW)
    save, calls = nnUNetDatasetBlosc2.save_case, []

    def full(*args, **kwargs):
        calls.append(1)
        if len(calls) > 2:
            raise RuntimeError("Error while creating the NDArray")  # what blosc2 says when nothing is left
        return save(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(nnUNetDatasetBlosc2, "save_case", staticmethod(full))
        patch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 0))
        with pytest.raises(
            NnsslError, match=r"No space left in .*: 3 images .* about .* GB, and 0 GB are free.*start again"
        ):
            prepare(plan, "Dataset902_Free")
    folder = own_folder(nnunet_env)
    assert len(list(folder.glob("*.pkl"))) == 2 and not list(folder.parent.glob("*_tmp"))
    assert len(prepare(plan, "Dataset902_Free").cases) == 5


def test_folder_that_cannot_be_written(target, tiny_raw_dataset, nnunet_env):
    plan = target()
    tiny_raw_dataset(902, "Free", 4, labelled=False, **RAW)
    (nnunet_env.preprocessed / "Dataset902_Free").write_text("a file where a folder should be")
    with pytest.raises(NnsslError, match="Cannot write into .*nnUNet_preprocessed must be writable"):
        prepare(plan, "Dataset902_Free")


@pytest.mark.slow
def test_processes_give_the_same(target, tiny_raw_dataset, nnunet_env):
    plan = target()
    tiny_raw_dataset(902, "Free", 3, labelled=False, **RAW)
    shutil.copytree(nnunet_env.raw / "Dataset902_Free", nnunet_env.raw / "Dataset903_Free")
    one = prepare(plan, "Dataset902_Free")
    two = prepare_sources(plan, ["Dataset903_Free"], n_processes=2)
    for a, b in zip(one.cases, two.cases):
        x, y = (blosc2.open(str(c.folder / f"{c.name}.b2nd"))[:] for c in (a, b))
        assert a.name == b.name and np.array_equal(x, y)


def processes_by(method, monkeypatch):
    """The library spawns its processes; ``method`` starts them sooner, since torch need not be imported by each."""
    from nnssl.pretrain.prepare import processes

    context = processes.multiprocessing.get_context(method)
    monkeypatch.setattr(processes.multiprocessing, "get_context", lambda _: context)
    return processes


@pytest.fixture
def forked(monkeypatch):
    """Of this process: for tasks without blosc2, which crashes in the fork of a process that has used its threads."""
    return processes_by("fork", monkeypatch)


@pytest.fixture
def served(monkeypatch):
    """Of a process that has imported what it takes, and done nothing with it."""
    processes = processes_by("forkserver", monkeypatch)
    processes.multiprocessing.get_context("forkserver").set_forkserver_preload(["nnssl.pretrain.prepare.worker"])
    return processes


@pytest.mark.parametrize("n", [0, 1, 3])
def test_each_job_is_done_once(forked, n):
    tasks = list(range(25))
    assert sorted(forked.run_tasks(str, tasks, n, "")) == sorted(map(str, tasks))
    assert list(forked.run_tasks(str, [], n, "")) == []


def test_stopping_early_ends_the_processes(forked):
    import multiprocessing

    tasks = forked.run_tasks(time.sleep, [0, 0, *[60] * 20], 2, "")
    next(tasks)
    processes = multiprocessing.active_children()
    assert len(processes) >= 2
    tasks.close()
    # The pool's own thread may be the one that reaps a process: its entry then goes a moment after the process.
    deadline = time.monotonic() + 30
    while multiprocessing.active_children() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not multiprocessing.active_children()
    for process in processes:
        with pytest.raises(ProcessLookupError):
            os.kill(process.pid, 0)


@pytest.mark.parametrize(
    ("number", "told"),
    [
        (
            signal.SIGKILL,
            "its process was killed, though it worked alone: most likely the image does not fit into this",
        ),
        (signal.SIGSEGV, r"its process crashed \(SIGSEGV\), though it worked alone: most likely the file is damaged"),
    ],
)
def test_an_image_whose_process_ends_is_named_and_can_be_skipped(
    target, tiny_raw_dataset, monkeypatch, served, caplog, number, told
):
    """As the kernel kills what takes too much memory, or a reader crashes: the others are done, and the one is bad."""
    plan = target()
    tiny_raw_dataset(902, "Free", 9, labelled=False, **RAW)
    submit = served.ProcessPoolExecutor.submit

    def end_one(self, do, task):
        return submit(self, signal.raise_signal, number) if task.case.name == "case_004" else submit(self, do, task)

    monkeypatch.setattr(served.ProcessPoolExecutor, "submit", end_one)
    with pytest.raises(NnsslError, match=rf"1 of 9 images.*\n.*case_004.*{told}"):
        prepare_sources(plan, ["Dataset902_Free"], n_processes=2)
    assert "one by one" in caplog.text and "-np" not in caplog.text
    assert ("memory ran out" in caplog.text) == (number == signal.SIGKILL)
    assert len(prepare_sources(plan, ["Dataset902_Free"], n_processes=2, skip_bad=True).cases) == 8
    monkeypatch.setattr(served.ProcessPoolExecutor, "submit", submit)
    assert len(prepare(plan, "Dataset902_Free").cases) == 9


def test_without_a_result_for_it_the_task_whose_process_ends_stops_all(served):
    with pytest.raises(NnsslError, match=r"^A process was killed though .* most likely memory ran out; make some free"):
        list(served.run_tasks(signal.raise_signal, [0, signal.SIGKILL, 0], 2, ""))
    with pytest.raises(
        NnsslError, match=r"^A process crashed \(SIGABRT\) though it was the only one\. What is done is kept\.$"
    ):
        list(served.run_tasks(signal.raise_signal, [0, signal.SIGABRT, 0], 2, ""))


def test_small_blocks_are_written(target, tiny_raw_dataset):
    """Own folders: a crop unpacks little beside what it shows; nnU-Net's readers take the files all the same."""
    plan = target(spacing=(1.0, 1.0, 1.0))
    tiny_raw_dataset(902, "Free", 1, labelled=False, shape=(90, 24, 9), spacing=(1.0, 1.0, 1.0))
    (case,) = prepare(plan, "Dataset902_Free").cases
    array = blosc2.open(str(case.folder / f"{case.name}.b2nd"), mode="r")
    assert max(array.shape) > 64
    assert array.chunks == (1, *(min(64, s) for s in array.shape[1:]))
    assert array.blocks == (1, *(min(16, s) for s in array.shape[1:]))
    data, seg, _, _ = nnUNetDatasetBlosc2(str(case.folder)).load_case(case.name)
    assert data.shape == seg.shape == array.shape
