"""Reading one case: windows, body, intensity range, and errors that name the file."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import blosc2
import numpy as np
import pytest

from nnssl import preprocessed
from nnssl.errors import NnsslError
from nnssl.plans import load_plan
from nnssl.pretrain.data import CaseFormat, CaseReader, CaseRef, intensity_range
from nnssl.pretrain.data.intensity import air_threshold, body_mask

PROPERTIES = {
    "spacing": (1.0, 1.0, 1.0),
    "sitk_stuff": {"direction": (1.0, 0, 0, 0, 1.0, 0, 0, 0, 1.0)},
}


def save(folder, name, data, blocks=None, **properties):
    folder.mkdir(exist_ok=True)
    blosc2.asarray(np.ascontiguousarray(data), urlpath=str(folder / f"{name}.b2nd"), blocks=blocks, chunks=blocks)
    shape = data.shape[1:]
    full = {
        "bbox_used_for_cropping": [[0, n] for n in shape],
        "shape_before_cropping": shape,
        "shape_after_cropping_and_before_resampling": shape,
        **PROPERTIES,
        **properties,
    }
    (folder / f"{name}.pkl").write_bytes(pickle.dumps(full))
    return CaseRef(name, folder, "Dataset001_X")


@pytest.fixture
def ramp(tmp_path):
    """Two channels whose voxels are all different."""
    data = np.arange(2 * 7 * 9 * 11, dtype=np.float32).reshape(2, 7, 9, 11) + 1
    return data, save(tmp_path / "nnUNetPlans_3d_fullres", "case_000", data)


def reader(n_channels=2, masked=False, cached=16):
    return CaseReader(CaseFormat(n_channels, (0, 1, 2), masked), cached)


@pytest.mark.parametrize(
    "start",
    [(0, 0, 0), (2, 3, 4), (-2, 4, 5), (4, -3, 8), (-1, -1, -1), (5, 8, 10)],
    ids=lambda s: "_".join(map(str, s)),
)
def test_windows_equal_slices_of_the_padded_array(ramp, start):
    data, ref = ramp
    window = (3, 5, 4)
    padded = np.pad(data, ((0, 0), *[(9, 9)] * 3))
    at = tuple(slice(s + 9, s + 9 + w) for s, w in zip(start, window))
    found, body = reader().open(ref).read(start, window)
    assert found.dtype == np.float32 and found.flags.c_contiguous and found.shape == (2, *window)
    assert np.array_equal(found, padded[(slice(None), *at)])
    assert body.shape == (1, *window) and body.dtype == bool
    inside = np.pad(np.ones(data.shape[1:], bool), 9)[at]
    assert not body[0][~inside].any()
    assert body[0][inside].mean() >= 0.5


def test_window_larger_than_the_image(ramp):
    data, ref = ramp
    found, body = reader().open(ref).read((-2, -1, -3), (12, 12, 20))
    assert np.array_equal(found[:, 2:9, 1:10, 3:14], data) and found.sum() == data.sum()
    assert body.sum() <= data[0].size


@pytest.mark.skipif(sys.platform != "linux", reason="needs a limit of memory")
def test_memory_that_runs_out_while_a_case_is_read_is_not_the_files_fault(ramp, monkeypatch):
    """blosc2 says the same of both; a healthy file was called damaged and moved away."""
    import resource

    _, ref = ramp
    case = reader().open(ref)

    class Failing:
        shape, urlpath = case.array.shape, case.array.urlpath

        def __getitem__(self, box):
            raise RuntimeError("Error while getting the buffer")

    case = replace(case, array=Failing())
    with pytest.raises(NnsslError, match="is damaged .Error while getting the buffer.*Preprocess the dataset again"):
        case.read((0, 0, 0), (3, 3, 3))
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    # more than glibc serves from freed memory, of which the process may have kept much
    monkeypatch.setattr(preprocessed, "SPARE_MEMORY", (1 << 30) + (1 << 26))
    resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 24), hard))
    try:
        with pytest.raises(MemoryError):
            case.read((0, 0, 0), (3, 3, 3))
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    assert ref.image.is_file()


@pytest.mark.skipif(sys.platform != "linux", reason="needs a limit of open files")
@pytest.mark.parametrize(("left", "ending"), [(0, ".b2nd"), (1, ".pkl")])
def test_files_that_cannot_be_opened_are_not_called_damaged(ramp, left, ending):
    import resource

    _, ref = ramp
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken = [os.open(os.devnull, os.O_RDONLY)]
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 2, hard))
    try:
        with suppress(OSError):  # until no number below the limit is free
            while True:
                taken.append(os.dup(taken[0]))
        for _ in range(left):
            os.close(taken.pop())
        with pytest.raises(NnsslError) as error:
            reader().open(ref)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for number in taken:
            os.close(number)
    assert str(error.value).endswith(
        f"case_000{ending}: Too many open files. Lower -o workers, or raise the limit of open files (ulimit -n 65536)."
    )


def test_intensity_range_of_a_small_image_is_exact():
    data = np.random.default_rng(0).normal(size=(2, 9, 10, 11)).astype(np.float32)
    expected = np.percentile(data.reshape(2, -1), [0.5, 99.5], axis=1).T
    assert intensity_range(data) == pytest.approx(expected, abs=1e-6)
    assert intensity_range(data).shape == (2, 2)


def test_intensity_range_of_a_large_image_is_close_and_reads_little(tmp_path):
    rng = np.random.default_rng(0)
    data = np.clip(rng.normal(size=(1, 64, 80, 72)), -3, 3).astype(np.float32)
    ref = save(tmp_path / "nnUNetPlans_3d_fullres", "big", data, blocks=(1, 16, 16, 16))
    found = reader(1).open(ref).info.intensity
    assert found[0] == pytest.approx(np.percentile(data, [0.5, 99.5]), abs=0.1)

    class Counting:
        shape, blocks, read = data.shape, (1, 16, 16, 16), 0

        def __getitem__(self, at):
            self.read += data[at].size
            return data[at]

    counting = Counting()
    assert np.array_equal(intensity_range(counting), found)
    assert counting.read == 64 * 8**3 < data.size / 10


def test_thin_images_are_sampled_too():
    data = np.random.default_rng(0).normal(size=(1, 3, 300, 300)).astype(np.float32)
    assert intensity_range(data)[0] == pytest.approx([-2.58, 2.58], abs=0.15)


def test_air_is_not_body():
    data = np.full((2, 6, 6, 6), -1.0, np.float32)
    data[0, :3] = 2.0
    data[1, 2:4] = 5.0
    threshold = air_threshold(np.array([[-1.0, 2.0], [-1.0, 5.0]], np.float32))
    assert threshold == pytest.approx([-0.7, -0.4])
    body = body_mask(data, threshold, masked=False)
    assert body[0, :4].all() and not body[0, 4:].any()


def test_zeros_of_masked_normalisation_are_not_body():
    rng = np.random.default_rng(0)
    data = np.zeros((1, 20, 20, 20), np.float32)
    data[:, 4:16, 4:16, 4:16] = rng.normal(size=(1, 12, 12, 12))
    data[0, 2, 2, 2] = 1e-6  # left by resampling
    bounds = intensity_range(data, masked=True)
    inside = data[0, 4:16, 4:16, 4:16]
    assert bounds[0] == pytest.approx(np.percentile(inside[np.abs(inside) > 1e-3], [0.5, 99.5]), abs=1e-5)
    body = body_mask(data, air_threshold(bounds), masked=True)
    assert not body[0, :4].any() and body[0, 4:16, 4:16, 4:16].mean() > 0.9
    assert body_mask(data, air_threshold(bounds), masked=False)[0, :4].all()  # what would happen without


def test_format_follows_the_plan(tiny_preprocessed, nnunet_env):
    folder = tiny_preprocessed(901, "Tiny", 2, channels=2, shape=(8, 9, 10))
    plan = load_plan(901)
    assert CaseFormat.from_plan(plan) == CaseFormat(2, (0, 1, 2), False)
    plans = json.loads((folder / "nnUNetPlans.json").read_text())
    plans["configurations"]["3d_fullres"]["use_mask_for_norm"] = [True, True]
    (folder / "nnUNetPlans.json").write_text(json.dumps(plans))
    assert CaseFormat.from_plan(load_plan(901)).masked


def test_labels_are_never_opened(ramp, monkeypatch):
    _, ref = ramp
    names = []
    real = blosc2.open
    monkeypatch.setattr(blosc2, "open", lambda urlpath, **kw: names.append(urlpath) or real(urlpath=urlpath, **kw))
    reader().open(ref).read((0, 0, 0), (2, 2, 2))
    assert names == [str(ref.folder / "case_000.b2nd")]


def test_few_cases_are_remembered(tmp_path):
    data = np.random.default_rng(0).normal(size=(1, 4, 5, 6)).astype(np.float32)
    ref = save(tmp_path / "a", "case_000", data)
    some = reader(1, cached=3)
    for i in range(6):
        for ending in (".b2nd", ".pkl"):
            shutil.copy(ref.folder / f"case_000{ending}", ref.folder / f"copy_{i}{ending}")
        some.open(CaseRef(f"copy_{i}", ref.folder, ref.source))
    assert [name for _, name in some._known] == ["copy_3", "copy_4", "copy_5"]
    (ref.folder / "copy_5.pkl").unlink()
    some.open(CaseRef("copy_5", ref.folder, ref.source))  # remembered


@pytest.mark.parametrize(("share", "own"), [(0.0, True), (0.3, False), (0.7, False), (0.99, True)])
def test_truncated_file_is_named(tmp_path, share, own):
    data = np.random.default_rng(0).normal(size=(1, 20, 20, 20)).astype(np.float32)
    ref = save(tmp_path / ("nnssl_Dataset001_X_3d" if own else "nnUNetPlans_3d_fullres"), "case_007", data)
    file = ref.folder / "case_007.b2nd"
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(NnsslError, match=rf"case_007 of Dataset001_X.*{file} is damaged.*--exclude") as error:
        reader(1).open(ref).read((0, 0, 0), (20, 20, 20))
    assert ("nnUNetv2_preprocess" in str(error.value)) != own


def test_missing_and_foreign_files_are_named(ramp):
    _, ref = ramp
    with pytest.raises(NnsslError, match="plan has 3 channel"):
        reader(3).open(ref)
    (ref.folder / "case_000.pkl").write_bytes(b"rubbish")
    with pytest.raises(NnsslError, match="case_000.pkl cannot be read"):
        reader().open(ref)
    (ref.folder / "case_000.pkl").unlink()
    with pytest.raises(NnsslError, match="case_000.pkl does not exist"):
        reader().open(ref)
    (ref.folder / "case_000.b2nd").unlink()
    with pytest.raises(NnsslError, match="case_000 of Dataset001_X is gone"):
        reader().open(ref)


def test_damage_inside_the_file_is_named(tmp_path):
    data = np.random.default_rng(0).normal(size=(1, 40, 40, 40)).astype(np.float32)
    ref = save(tmp_path / "a", "case_000", data, blocks=(1, 16, 16, 16))
    case = reader(1).open(ref)
    del case
    content = bytearray((ref.folder / "case_000.b2nd").read_bytes())
    middle = slice(len(content) // 3, 2 * len(content) // 3)
    content[middle] = bytes(0xFF for _ in content[middle])
    (ref.folder / "case_000.b2nd").write_bytes(content)
    with pytest.raises(NnsslError, match="case_000 of Dataset001_X cannot be read"):
        reader(1).open(ref).read((0, 0, 0), (40, 40, 40))
