"""Body masks: what is body in a raw image, and how it gets to the crops."""

from __future__ import annotations

import errno
import logging
import os
import pickle
from dataclasses import replace
from pathlib import Path

import blosc2
import numpy as np
import pytest
import SimpleITK as sitk
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor

from nnssl.errors import NnsslError
from nnssl.plans import load_plan
from nnssl.preprocessed import open_array
from nnssl.pretrain import run
from nnssl.pretrain.data import CaseFormat, CaseReader, SampleStream, make_loader
from nnssl.pretrain.data.folders import body_folder
from nnssl.pretrain.prepare import prepare_bodies, prepare_sources
from nnssl.pretrain.prepare.bodies import BodyWorker, write_mask
from nnssl.pretrain.prepare.body import body_of_raw, resize_mask, tissue_threshold
from nnssl.pretrain.types import CropRequest

REQUEST = CropRequest(size=(8, 8, 8), read_size=(10, 12, 8), body=True)


def thorax():
    """CT ``(10, 30, 26)``: air, a torso with a lung whose windpipe is cut by the first slice, and a table. And the torso."""
    image = np.full((10, 30, 26), -1000, np.float32)
    torso = np.zeros(image.shape, bool)
    torso[:, 5:22, 3:23] = True
    image[torso] = 40
    image[2:8, 8:18, 6:20] = -850  # lung
    image[:3, 9, 7] = -1000  # windpipe, up to the first slice
    image[:, 26:28, :] = -200  # table, 2 x 26 voxels per slice where the torso has 17 x 20
    return image, torso


def test_lungs_are_body_and_the_air_and_the_table_are_not():
    image, torso = thorax()
    found = body_of_raw(image[None], [True], 0)
    assert found.dtype == bool
    np.testing.assert_array_equal(found, torso)


@pytest.mark.parametrize("order", [(1, 0, 2), (2, 1, 0), (1, 2, 0)])
def test_air_comes_in_from_the_sides_whichever_axis_runs_from_feet_to_head(order):
    image, torso = thorax()
    found = body_of_raw(image.transpose(order)[None], [True], order.index(0))
    np.testing.assert_array_equal(found, torso.transpose(order))


def test_air_would_come_in_through_the_windpipe_if_another_axis_were_cut():
    image, torso = thorax()
    assert not body_of_raw(image[None], [True], 2)[3, 10, 10]
    assert torso[3, 10, 10]


def test_two_legs_are_both_body():
    image = np.full((4, 20, 30), -1000, np.float32)
    image[:, 5:15, 2:12] = image[:, 6:14, 18:27] = 30
    assert body_of_raw(image[None], [True], 0).sum() == 4 * (100 + 72)


def test_noise_in_air_is_not_body():
    image, torso = thorax()
    image[:, 1, 1] = image[4, 24, 20] = 100
    assert body_of_raw(image[None], [True], 0).sum() == torso.sum()


def magnitude(rng, shape=(12, 30, 26), sigma=12.0):
    """MRI: Rayleigh noise in air, tissue of 150 (dark) and 600 under a bias field. And where tissue is."""
    tissue = np.zeros(shape, bool)
    tissue[:, 5:25, 4:22] = True
    image = np.where(tissue, 600.0, 0.0)
    image[:, 8:14, 6:20] = 150
    image *= np.linspace(0.7, 1.3, shape[2])
    return np.hypot(image + rng.normal(0, sigma, shape), rng.normal(0, sigma, shape)).astype(np.float32), tissue


def test_without_units_the_noise_of_air_sets_the_threshold():
    image, tissue = magnitude(np.random.default_rng(0))
    assert 30 < tissue_threshold(image) < 110  # Otsu alone would take the dark tissue for air: it lies above 250
    found = body_of_raw(image[None], [False], 0)
    np.testing.assert_array_equal(found[:, 5:25, 4:22], True)
    assert (found & ~tissue).sum() < 0.02 * tissue.sum()


def test_an_image_from_inside_the_body_is_all_body():
    rng = np.random.default_rng(1)
    image = np.where(rng.random((10, 12, 14)) < 0.3, 300.0, 700.0) + rng.normal(0, 30, (10, 12, 14))
    assert tissue_threshold(image) is None
    assert body_of_raw(image[None].astype(np.float32), [False], 0).all()
    assert body_of_raw(np.full((1, 4, 5, 6), 50, np.float32), [True], 0).all()
    assert tissue_threshold(np.ones((3, 4, 5))) is None


def test_air_of_exactly_zero_and_ct_without_negative_values():
    image = np.zeros((6, 20, 18), np.float32)
    image[:, 4:16, 3:15] = 500 + np.arange(12, dtype=np.float32)
    for ct in (False, True):
        found = body_of_raw(image[None], [ct], 0)
        assert found.sum() == 6 * 12 * 12 and found[:, 4:16, 3:15].all()


def test_body_is_where_any_channel_shows_it():
    a = np.full((4, 20, 18), -1000, np.float32)
    a[:, 4:12, 3:15] = 40
    b = np.zeros_like(a)
    b[:, 8:16, 3:15] = 500
    assert body_of_raw(np.stack([a, b]), [True, False], 0).sum() == 4 * 12 * 12


def test_masks_are_resized_edge_to_edge():
    mask = np.zeros((4, 2, 3), bool)
    mask[1, 0, 2] = mask[3, 1, 1] = True
    half = resize_mask(mask, (2, 4, 3))
    expected = np.zeros((2, 4, 3), bool)
    expected[0, :2, 2] = expected[1, 2:, 1] = True  # voxels 1 and 3 of four lie at the middle of two
    np.testing.assert_array_equal(half, expected)
    np.testing.assert_array_equal(resize_mask(mask, mask.shape), mask)
    assert resize_mask(np.arange(7)[:, None, None] > 2, (70, 1, 1)).sum() == 40


def test_masks_are_stored_small_and_read_in_parts(tmp_path):
    mask = np.zeros((150, 90, 70), bool)
    mask[20:130, 10:80, 9:60] = True
    write_mask(tmp_path / "m.b2nd", mask)
    assert (tmp_path / "m.b2nd").stat().st_size < mask.size / 50
    array = blosc2.open(str(tmp_path / "m.b2nd"), mode="r")
    assert array.shape == (1, 150, 90, 70) and array.dtype == np.uint8 and max(array.blocks) <= 32
    np.testing.assert_array_equal(array[0, 100:140, 5:70, 50:70], mask[100:140, 5:70, 50:70])


@pytest.fixture
def target(tiny_preprocessed):
    """Dataset901_Tiny, transposed and resampled by nnU-Net itself, and its plan and pool."""
    options = {"spacing": (1.0, 2.0, 1.2), "transpose_forward": (1, 2, 0), "patch": (8, 8, 8)}
    tiny_preprocessed(901, "Tiny", 5, shape=(16, 14, 20), spacing=(1.0, 1.5, 1.25), plan_options=options)
    plan = load_plan(901)
    return plan, prepare_sources(plan, [plan.dataset_name], n_processes=0)


def stamps(folder):
    return {p.name: p.stat().st_mtime_ns for p in sorted(folder.iterdir())}


def test_masks_go_where_nnunet_put_the_voxels(target, nnunet_env, tmp_path):
    """The reference is nnU-Net's own way of a label through transpose, crop and resampling."""
    plan, pool = target
    assert prepare_bodies(plan, pool, n_processes=0) == 5
    raw = nnunet_env.raw / plan.dataset_name / "imagesTr" / "case_002_0000.nii.gz"
    image = sitk.ReadImage(str(raw))
    label = sitk.GetImageFromArray(body_of_raw(sitk.GetArrayFromImage(image)[None], [False], 0).astype(np.uint8))
    label.CopyInformation(image)
    sitk.WriteImage(label, str(tmp_path / "label.nii.gz"))
    data, seg, _ = DefaultPreprocessor(verbose=False).run_case(
        [str(raw)], str(tmp_path / "label.nii.gz"), plan.manager, plan.config, plan.dataset_json
    )
    mask = blosc2.open(str(body_folder(plan, plan.dataset_name) / "case_002.b2nd"), mode="r")[0].astype(bool)
    assert mask.shape == data.shape[1:] and 0.3 < mask.mean() < 0.9
    assert (mask != (seg[0] > 0)).mean() < 0.04  # nearest voxel here, linear there
    assert not any(
        "body" in p.name for p in (nnunet_env.preprocessed / plan.dataset_name / plan.data_identifier).iterdir()
    )


def test_feet_and_head_are_found_after_the_transpose(target, nnunet_env):
    plan, pool = target
    raw = nnunet_env.raw / plan.dataset_name / "imagesTr" / "case_002_0000.nii.gz"
    old = sitk.ReadImage(str(raw))
    image = np.zeros(sitk.GetArrayFromImage(old).shape, np.float32)
    image[:, 2:12, 2:18] = 500
    body = image > 0
    image[3:10, 5:9, 5:14] = image[:4, 6, 7] = 0  # lung and windpipe
    new = sitk.GetImageFromArray(image)
    new.CopyInformation(old)
    sitk.WriteImage(new, str(raw))
    prepare_bodies(plan, pool, n_processes=0)
    mask = blosc2.open(str(body_folder(plan, plan.dataset_name) / "case_002.b2nd"), mode="r")[0].astype(bool)
    properties = pickle.loads((pool.cases[2].folder / "case_002.pkl").read_bytes())
    box = tuple(slice(*b) for b in properties["bbox_used_for_cropping"])
    np.testing.assert_array_equal(mask, resize_mask(body.transpose(1, 2, 0)[box], mask.shape))


def test_crops_show_the_mask_only_to_who_asks(target):
    plan, pool = target
    prepare_bodies(plan, pool, n_processes=0)
    folder = body_folder(plan, plan.dataset_name)
    for path in folder.glob("*.b2nd"):  # a pattern that no threshold gives
        shape = blosc2.open(str(path), mode="r").shape[1:]
        write_mask(path, np.indices(shape).sum(0) % 2 == 0)

    def crops(body):
        request = CropRequest(REQUEST.size, REQUEST.read_size, body=body)
        return next(iter(make_loader(pool, plan, request, SampleStream(3, 6), range(1))))

    asked, plain = crops(True), crops(False)
    start = asked.start.numpy()
    shapes = {r.name: blosc2.open(str(folder / f"{r.name}.b2nd"), mode="r").shape[1:] for r in pool.cases}
    for i, case in enumerate(asked.case):
        at = np.indices(REQUEST.read_size) + start[i].reshape(3, 1, 1, 1)
        inside = np.all([(a >= 0) & (a < n) for a, n in zip(at, shapes[case])], axis=0)
        np.testing.assert_array_equal(asked.body[i, 0].numpy(), inside & (at.sum(0) % 2 == 0))
    assert not np.array_equal(asked.body.numpy(), plain.body.numpy())
    assert plain.body.float().mean() > 0.55


def test_a_second_start_makes_nothing_and_a_changed_image_is_noticed(target, nnunet_env):
    plan, pool = target
    prepare_bodies(plan, pool, n_processes=0)
    folder = body_folder(plan, plan.dataset_name)
    first = stamps(folder)
    prepare_bodies(plan, pool, n_processes=0)
    assert stamps(folder) == first
    (folder / "case_001.b2nd").unlink()
    os.utime(nnunet_env.raw / plan.dataset_name / "imagesTr" / "case_003_0000.nii.gz", (1, 1))
    assert prepare_bodies(plan, pool, n_processes=0) == 5
    again = stamps(folder)
    assert {n for n in again if again[n] != first[n]} == {"case_001.b2nd", "case_003.b2nd"}
    assert not folder.with_name(folder.name + "_tmp").exists()
    os.utime(nnunet_env.raw / plan.dataset_name / "imagesTr" / "case_000_0000.nii.gz", (1, 1))
    prepare_bodies(plan, pool, n_processes=0)  # all masks are there: 100,000 raw images are not looked at
    assert stamps(folder) == again
    prepare_bodies(plan, pool, n_processes=0, thorough=True)
    assert {n for n, t in stamps(folder).items() if t != again[n]} == {"case_000.b2nd"}


def test_an_interrupted_start_is_continued(target, monkeypatch):
    plan, pool = target
    done = []

    def stop(path, mask):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(path.name)
        write_mask(path, mask)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("nnssl.pretrain.prepare.bodies.write_mask", stop)
        prepare_bodies(plan, pool, n_processes=0)
    folder = body_folder(plan, plan.dataset_name)
    first = stamps(folder)
    assert set(first) == set(done)
    assert prepare_bodies(plan, pool, n_processes=0) == 5
    assert {n: t for n, t in stamps(folder).items() if n in first} == first


def test_a_full_disk_says_so(target, monkeypatch):
    plan, pool = target

    def full(path, mask):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("nnssl.pretrain.prepare.bodies.write_mask", full)
    monkeypatch.setattr("shutil.disk_usage", lambda p: type("Usage", (), {"free": 0}))
    with pytest.raises(NnsslError, match="No space left"):
        prepare_bodies(plan, pool, n_processes=0)
    assert not list(body_folder(plan, plan.dataset_name).iterdir())


def test_without_raw_images_intensities_are_used_and_the_log_says_it(target, nnunet_env, caplog, monkeypatch):
    plan, pool = target
    caplog.set_level(logging.INFO, "nnssl")
    monkeypatch.delenv("nnUNet_raw")
    assert prepare_bodies(plan, pool, n_processes=0) == 0
    assert "from preprocessed intensities" in caplog.messages[-1]
    assert not body_folder(plan, plan.dataset_name).exists()
    batches = [
        next(iter(make_loader(pool, plan, r, SampleStream(3, 4), range(1))))
        for r in (REQUEST, CropRequest(REQUEST.size, REQUEST.read_size))
    ]
    np.testing.assert_array_equal(batches[0].body.numpy(), batches[1].body.numpy())


def test_raw_images_that_were_exchanged_or_broken_are_named_once(target, nnunet_env, caplog):
    plan, pool = target
    images = nnunet_env.raw / plan.dataset_name / "imagesTr"
    sitk.WriteImage(sitk.GetImageFromArray(np.ones((4, 5, 6), np.float32)), str(images / "case_000_0000.nii.gz"))
    (images / "case_001_0000.nii.gz").write_bytes(b"")
    (images / "case_004_0000.nii.gz").unlink()
    caplog.set_level(logging.INFO, "nnssl")
    assert prepare_bodies(plan, pool, n_processes=0) == 2
    assert "No body mask could be made from 2 raw images" in caplog.messages[-2] and "case_000" in caplog.messages[-2]
    assert "of 2 cases, preprocessed intensities for the other 3" in caplog.messages[-1]
    index = body_folder(plan, plan.dataset_name).with_name(body_folder(plan, plan.dataset_name).name + "_index.jsonl")
    lines = index.read_text().splitlines()
    prepare_bodies(plan, pool, n_processes=0)
    assert index.read_text().splitlines() == lines


def test_a_damaged_mask_is_named(target, monkeypatch):
    plan, pool = target
    prepare_bodies(plan, pool, n_processes=0)
    folder = body_folder(plan, plan.dataset_name)
    reader = CaseReader(CaseFormat.from_plan(plan), bodies={plan.dataset_name: folder})
    ref = pool.cases[0]
    assert reader.open(ref).mask is not None
    with monkeypatch.context() as patch:  # the system's fault is not the file's

        def no_handle(file):
            if Path(file).parent == folder:
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
            return open_array(file)

        patch.setattr("nnssl.pretrain.data.case.open_array", no_handle)
        with pytest.raises(NnsslError, match=f"{ref.name}.b2nd: Too many open files. Lower -o workers"):
            reader.open(ref)
    write_mask(folder / f"{ref.name}.b2nd", np.ones((3, 4, 5), bool))
    with pytest.raises(NnsslError, match=f"{ref.name}.b2nd is damaged.*Delete the file"):
        reader.open(ref)
    (folder / f"{ref.name}.b2nd").write_bytes(b"nothing")
    with pytest.raises(NnsslError, match="Start again, and it is made anew"):
        reader.open(ref)


def test_unlabelled_sources_of_another_dataset_get_masks_too(target, tiny_raw_dataset, tmp_path):
    plan, _ = target
    tiny_raw_dataset(902, "Free", 2, labelled=False, shape=(12, 16, 14), seed=4)
    pool = prepare_sources(plan, ["Dataset902_Free"], n_processes=0)
    assert prepare_bodies(plan, pool, n_processes=0) == 2
    folder = body_folder(plan, "Dataset902_Free")
    assert folder.parent.name == "Dataset902_Free" and folder != pool.cases[0].folder
    worker = BodyWorker(plan, folder, tmp_path, (False,), pool.cases[0].folder)
    again = pickle.loads(pickle.dumps(worker))
    assert replace(again, plan=plan) == worker and again.plan.plans == plan.plans


@pytest.mark.parametrize("method, asks", [("mae", False), ("hdense", True), ("vox2vec", True)])
def test_only_methods_that_look_at_the_body_make_masks(target, method, asks, monkeypatch):
    plan, _ = target
    folder = body_folder(plan, plan.dataset_name)
    common = {"method": method, "device": "cpu", "epochs": 1, "iterations": 20, "processes": 1, "crop": (8, 8, 8)}
    monkeypatch.setattr("nnssl.pretrain.api.estimate", lambda spec: "")
    run(901, dry_run=True, **common)
    assert not folder.exists()
    monkeypatch.setattr("nnssl.pretrain.api._execute", lambda *args: None)
    run(901, **common)
    assert folder.exists() == asks and len(list(folder.glob("*.b2nd"))) == (5 if asks else 0)
