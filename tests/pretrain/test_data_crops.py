"""Crops: a pure function of (seed, step, sample), inside the image, with body; and cases that cannot give any."""

from __future__ import annotations

import pickle

import blosc2
import numpy as np
import pytest
import torch

from nnssl.errors import NnsslError
from nnssl.pretrain.data import CaseFormat, CaseReader, CaseRef, CropDataset, SampleStream, collate
from nnssl.pretrain.data.crops import TRIES, CaseTable
from nnssl.pretrain.data.sampling import HELD_OUT, TRAIN, draw_cases, draw_start, generator
from nnssl.pretrain.methods import CropRequest

FORM = CaseFormat(1, (0, 1, 2), False)


def dataset(refs, size=(8, 10, 6), window=(10, 12, 8), form=FORM, seed=3, batch_size=4, crops_per_case=1, **stream):
    request = CropRequest(size=size, read_size=window, crops_per_case=crops_per_case)
    return CropDataset(refs, CaseReader(form), request, SampleStream(seed, batch_size, **stream))


def equal(a, b):
    names = ("data", "body", "position", "axis_position", "intensity", "start", "case")
    return all(np.array_equal(getattr(a, n), getattr(b, n)) for n in names)


# ---- what a sample is ------------------------------------------------------------------------------------------------------


def test_a_sample_is_the_window_that_it_says(refs):
    data = dataset(refs)
    for sample in range(4):
        found = data[(7, sample)]
        ref = data.case_of(7, sample)
        volume = blosc2.open(str(ref.folder / f"{ref.name}.b2nd"))[:]
        at = tuple(slice(s, s + w) for s, w in zip(found.start, (10, 12, 8)))
        assert found.case == ref.name and np.array_equal(found.data, volume[(slice(None), *at)])
        expected = (found.start + np.array([10, 12, 8]) / 2 + 1) / (np.array(volume.shape[1:]) + 3)
        assert found.axis_position == pytest.approx(expected)
        assert found.position == pytest.approx([expected[2], expected[1], 1 - expected[0]])


def test_collate_has_the_shapes_and_types_of_crops(refs):
    data = dataset(refs)
    crops = collate([data[(0, i)] for i in range(4)])
    assert crops.data.shape == (4, 1, 10, 12, 8) and crops.data.dtype == torch.float32
    assert crops.body.shape == (4, 1, 10, 12, 8) and crops.body.dtype == torch.bool
    assert crops.position.shape == crops.axis_position.shape == (4, 3) and crops.position.dtype == torch.float64
    assert crops.intensity.shape == (4, 1, 2) and crops.intensity.dtype == torch.float32
    assert crops.start.shape == (4, 3) and crops.start.dtype == torch.int64
    assert len(crops) == 4 and len(crops.case) == 4
    assert ((crops.position > 0) & (crops.position < 1)).all()


def test_2d_plans_draw_slices(refs):
    data = dataset(refs, size=(8, 10), window=(12, 12))
    slices = set()
    for step in range(40):
        found = data[(step, 0)]
        ref = data.case_of(step, 0)
        volume = blosc2.open(str(ref.folder / f"{ref.name}.b2nd"))[:]
        z, y, x = found.start
        assert found.data.shape == (1, 12, 12) and found.body.shape == (1, 12, 12) and found.position.shape == (3,)
        assert np.array_equal(found.data, volume[:, z, y : y + 12, x : x + 12])
        assert found.axis_position[0] == pytest.approx((z + 0.5 + 1) / (volume.shape[1] + 3))
        slices.add(round(z / volume.shape[1], 1))
    assert len(slices) > 6


# ---- purity ----------------------------------------------------------------------------------------------------------------


def test_samples_depend_on_seed_step_and_sample_alone(refs):
    a, b, other = dataset(refs), dataset(refs), dataset(refs, seed=4)
    forward = {(s, i): a[(s, i)] for s in range(3) for i in range(4)}
    np.random.seed(1)
    torch.manual_seed(1)
    for item in reversed(forward):
        assert equal(forward[item], b[item])
    assert not all(equal(forward[item], other[item]) for item in forward)
    starts = {tuple(f.start) + (f.case,) for f in forward.values()}
    assert len(starts) > 8
    c = pickle.loads(pickle.dumps(a))
    assert equal(c[(1, 2)], forward[(1, 2)])


def test_streams_differ(refs):
    train, held_out = dataset(refs), dataset(refs, number=HELD_OUT)
    assert not all(equal(train[(s, 0)], held_out[(s, 0)]) for s in range(4))


def test_cases_of_a_step_are_distinct_as_far_as_there_are_cases():
    for step in range(20):
        assert len(set(draw_cases(0, step, TRAIN, 10, 7))) == 7
        counts = np.bincount(draw_cases(0, step, TRAIN, 3, 8), minlength=3)
        assert sorted(counts) == [2, 3, 3]
    drawn = np.concatenate([draw_cases(0, s, TRAIN, 10, 4) for s in range(500)])
    assert np.bincount(drawn).min() > 150 and np.bincount(drawn).max() < 250  # 200 each


def test_held_out_steps_walk_through_all_cases():
    drawn = np.concatenate([draw_cases(5, s, HELD_OUT, 7, 3) for s in range(7)])
    assert np.bincount(drawn).tolist() == [3] * 7
    assert all(len(set(drawn[i : i + 7])) == 7 for i in range(0, 21, 7))


def test_weights_are_probabilities(refs):
    weights = [0, 1, 0, 3, 0, 0]
    data = dataset(refs, batch_size=1, weights=weights)
    drawn = [data.case_of(step, 0).name for step in range(400)]
    assert set(drawn) == {"case_1", "case_3"} and 250 < drawn.count("case_3") < 350
    many = dataset(refs, batch_size=5, weights=weights)
    assert {many.case_of(0, i).name for i in range(5)} <= {"case_1", "case_3"}
    for bad in ([1, 2], [1, 1, 1, 1, 1, -1], [0] * 6, [1, 1, 1, 1, 1, np.nan]):
        with pytest.raises(NnsslError, match="weights must be 6"):
            dataset(refs, weights=bad)


def test_several_crops_of_a_case_are_neighbours_in_the_batch(refs):
    data = dataset(refs, batch_size=6, crops_per_case=2)
    found = [data[(2, i)] for i in range(6)]
    names = [f.case for f in found]
    assert names[0::2] == names[1::2] and len(set(names)) == 3
    assert not np.array_equal(found[0].start, found[1].start)


# ---- where crops lie -------------------------------------------------------------------------------------------------------


def starts(shape, window, size, n=400):
    return np.array([draw_start(generator(0, i, TRAIN, 0), shape, window, size) for i in range(n)])


def test_windows_lie_inside_and_take_every_place():
    found = starts((20, 30, 12), (10, 12, 8), (8, 8, 8))
    assert found.min(0).tolist() == [0, 0, 0] and found.max(0).tolist() == [10, 18, 4]
    assert [len(set(found[:, a])) for a in range(3)] == [11, 19, 5]


def test_where_the_window_fills_the_image_its_centre_still_moves():
    # window 20 in 20: the crop of 8 may move by 6 of its 12 places; window 30 in 20 likewise; 40 of 10: no room at all
    found = starts((20, 20, 10), (20, 30, 40), (8, 8, 12))
    assert (found.min(0).tolist(), found.max(0).tolist()) == ([-3, -8, -15], [3, -2, -15])
    inner = found + (np.array([20, 30, 40]) - np.array([8, 8, 12])) // 2
    assert inner[:, :2].min() >= 0 and (inner[:, :2] + 8).max() <= 20


def test_small_images_are_padded_in_the_middle(tmp_path, save_case):
    ref = save_case(tmp_path / "a", "tiny", np.random.default_rng(0).normal(size=(1, 5, 6, 7)))
    found = dataset([ref], size=(8, 8, 8), window=(8, 8, 8), batch_size=1)[(0, 0)]
    assert found.start.tolist() == [-2, -1, -1]
    volume = blosc2.open(str(tmp_path / "a" / "tiny.b2nd"))[:]
    assert np.array_equal(found.data[:, 2:7, 1:7, 1:8], volume)
    assert not found.body[0, :2].any() and not found.body[0, 7:].any() and found.data[0, 7:].sum() == 0
    assert found.axis_position == pytest.approx([(-2 + 4 + 1) / 8, (-1 + 4 + 1) / 9, (-1 + 4 + 1) / 10])


# ---- air and damage --------------------------------------------------------------------------------------------------------


def test_air_only_crops_are_drawn_again_and_counted(tmp_path, save_case):
    data = np.full((1, 40, 40, 40), -1.0)
    data[:, :16, :16, :16] = np.random.default_rng(0).normal(2, 0.3, (1, 16, 16, 16))  # 6 % of the image
    ref = save_case(tmp_path / "a", "mostly_air", data)
    crops = dataset([ref], size=(8, 8, 8), window=(10, 10, 10), batch_size=4)
    counters = crops.counters = torch.zeros(1, 2, dtype=torch.int64)
    found = [crops[(s, i)] for s in range(5) for i in range(4)]
    shares = [f.body[0, 1:9, 1:9, 1:9].mean() for f in found]
    assert np.mean([s >= 0.1 for s in shares]) > 0.8
    assert counters[0, 0] > 20 and counters[0, 1] == sum(s < 0.1 for s in shares)
    assert all(f.body_share == pytest.approx(s) for f, s in zip(found, shares))


def test_the_best_of_nothing_is_taken(tmp_path, save_case):
    data = np.random.default_rng(0).normal(-1, 0.001, (1, 24, 24, 24))
    data[0, 12, 12, 12] = 100.0
    data[0, :, :, ::9] = 60.0  # bright planes: 3 of 24, body only where a crop shows one
    crops = dataset([save_case(tmp_path / "a", "x", data)], (8, 8, 8), (8, 8, 8), batch_size=1)
    assert crops[(0, 0)].body_share >= 0.1
    flat = dataset([save_case(tmp_path / "b", "flat", np.full((1, 16, 16, 16), 3.0))], batch_size=1)
    counters = flat.counters = torch.zeros(1, 2, dtype=torch.int64)
    assert flat[(0, 0)].body_share == 0 and counters.tolist() == [[TRIES - 1, 1]]


def test_constant_crops_inside_the_body_are_rejected(tmp_path, save_case):
    data = np.random.default_rng(0).normal(0, 1, (1, 8, 8, 64))
    data[..., 16:] = 5.0  # a saturated part: above air, but nothing to see
    crops = dataset([save_case(tmp_path / "a", "x", data)], (8, 8, 8), (8, 8, 8), batch_size=2)
    assert all(crops[(s, i)].start[2] < 16 for s in range(8) for i in range(2))


def test_crops_with_nan_are_never_delivered(tmp_path, save_case):
    data = np.random.default_rng(0).normal(size=(1, 20, 20, 40))
    data[0, 5, 5, 30] = np.nan
    data[0, 15, 12, 35] = np.inf
    crops = dataset([save_case(tmp_path / "a", "x", data)], (8, 8, 8), (8, 8, 8), batch_size=4)
    assert all(np.isfinite(crops[(s, i)].data).all() for s in range(10) for i in range(4))
    ref = save_case(tmp_path / "b", "all_nan", np.full((1, 16, 16, 16), np.nan))
    with pytest.raises(NnsslError, match="all_nan of Dataset001_X has NaN.*all_nan.b2nd.*--exclude"):
        dataset([ref], batch_size=1)[(0, 0)]


def test_nothing_to_draw_from(refs):
    with pytest.raises(NnsslError, match="no cases"):
        dataset([])
    with pytest.raises(ValueError, match="at least as large"):
        dataset(refs, size=(8, 10, 6), window=(8, 9, 6))


# ---- memory ----------------------------------------------------------------------------------------------------------------


def test_the_table_of_cases_is_small_and_whole(tmp_path):
    names = [f"pätient {i:06d}" for i in range(20_000)] + ["a\udcff"]
    given = [CaseRef(n, tmp_path / str(i % 3), f"Dataset{i % 3:03d}_X") for i, n in enumerate(names)]
    table = CaseTable(given)
    assert len(table) == len(given) and all(table[i] == given[i] for i in (0, 1, 2, 777, 19_999, 20_000))
    assert len(pickle.dumps(table)) < 60 * len(given)


@pytest.mark.parametrize("n", [50, 3000])
def test_memory_of_a_reader_does_not_grow_with_the_cases(tmp_path, n, save_case):
    import os
    import tracemalloc

    rng = np.random.default_rng(0)
    ref = save_case(tmp_path / "a", "case_0", rng.normal(size=(1, 12, 12, 12)))
    for i in range(1, n):
        for ending in (".b2nd", ".pkl"):
            os.link(ref.folder / f"case_0{ending}", ref.folder / f"case_{i}{ending}")
    crops = dataset(
        [CaseRef(f"case_{i}", ref.folder, ref.source) for i in range(n)], (8, 8, 8), (8, 8, 8), batch_size=50
    )
    crops._reader.cached = 40
    for i in range(50):
        crops[(0, i)]
    files = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    tracemalloc.start()
    for step in range(1, 8):
        for i in range(50):
            crops[(step, i)]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1e6  # 350 crops of 8 kB would be 2.8 MB
    assert len(crops._reader._known) == 40
    if files:
        assert len(os.listdir("/proc/self/fd")) <= files + 2
