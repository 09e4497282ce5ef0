"""From dataset names to a pool: nnU-Net's own folder as it is, everything else preprocessed once."""

from __future__ import annotations

import json
import logging
import os
import pickle
import shutil

import blosc2
import numpy as np
import pytest
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
from preparing import RAW, own_folder, prepare

from nnssl.errors import NnsslError
from nnssl.plans import Plan, load_plan

# ---- nnU-Net's folder as it is -------------------------------------------------------------------------------------------


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


# ---- preprocessing -------------------------------------------------------------------------------------------------------


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


def test_full_disk_tells_and_a_second_start_continues(target, tiny_raw_dataset, nnunet_env, monkeypatch):
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
