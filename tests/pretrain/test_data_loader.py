"""The loader: the same crops whatever the number of workers and ranks and wherever it starts; readable errors."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from nnssl.errors import NnsslError
from nnssl.plans import load_plan
from nnssl.pretrain.data import HELD_OUT, SampleStream, make_loader
from nnssl.pretrain.methods import CropRequest, Crops
from nnssl.pretrain.prepare import prepare_sources

REQUEST = CropRequest(size=(8, 8, 8), read_size=(10, 12, 10), crops_per_case=2)


@pytest.fixture
def data(tiny_preprocessed):
    """A pool of 9 small images with 2 held out, and the plan."""
    tiny_preprocessed(901, "Tiny", 9, shape=(14, 18, 16))
    plan = load_plan(901)
    return prepare_sources(plan, ["Dataset901_Tiny"], held_out=0.2), plan


STREAM = SampleStream(seed=1, batch_size=4)


def crops_of(data, request=REQUEST, stream=STREAM, steps=range(3), **options) -> list[Crops]:
    pool, plan = data
    return list(make_loader(pool, plan, request, stream, steps, **options))


def assert_equal(a: list[Crops], b: list[Crops]) -> None:
    assert len(a) == len(b)
    for x, y in zip(a, b):
        for name, value in vars(x).items():
            other = getattr(y, name)
            if isinstance(value, torch.Tensor):
                assert value.dtype == other.dtype and torch.equal(value, other), name
            else:
                assert value == other, name


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_do_not_matter(data, workers):
    assert_equal(crops_of(data), crops_of(data, num_workers=workers))


@pytest.mark.slow
def test_spawned_workers_do_not_matter(data):
    pool, plan = data
    loader = make_loader(pool, plan, REQUEST, STREAM, range(3), num_workers=2)
    loader.multiprocessing_context = "spawn"
    assert_equal(crops_of(data), list(loader))


def test_data_set_and_loader_parts_pickle_for_spawned_workers(data):
    pool, plan = data
    loader = make_loader(pool, plan, REQUEST, STREAM, range(2))
    guarded = loader.dataset
    guarded.dataset.counters = None  # shared memory, which only a starting process may take along
    copy = pickle.loads(pickle.dumps((guarded, loader.collate_fn, loader.worker_init_fn)))[0]
    assert_equal([loader.collate_fn(copy.__getitems__([(0, i) for i in range(4)]))], list(loader)[:1])


def test_ranks_do_not_matter(data):
    whole = crops_of(data, stream=SampleStream(1, 6))
    parts = [crops_of(data, stream=SampleStream(1, 6, rank=r, world_size=3)) for r in range(3)]
    joined = []
    for step in zip(*parts):
        names = [n for n, v in vars(step[0]).items() if isinstance(v, torch.Tensor)]
        tensors = {n: torch.cat([getattr(p, n) for p in step]) for n in names}
        lists = {n: [c for p in step for c in getattr(p, n)] for n in ("case", "source")}
        joined.append(Crops(**tensors, **lists))
    assert_equal(whole, joined)
    with pytest.raises(NnsslError, match="batch_size=4 cannot be shared by 3"):
        crops_of(data, stream=replace(STREAM, rank=0, world_size=3))


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_is_exact(data, workers):
    whole = crops_of(data, steps=range(5))
    assert_equal(whole[3:], crops_of(data, steps=range(3, 5), num_workers=workers))


def test_held_out_crops_are_the_same_each_time_and_their_own(data):
    pool, plan = data
    loader = make_loader(pool, plan, REQUEST, replace(STREAM, number=HELD_OUT), range(2), num_workers=1)
    first = list(loader)
    assert_equal(first, list(loader))
    held_out = {c.name for c in pool.held_out}
    assert {n for b in first for n in b.case} == held_out and len(held_out) == 2
    assert not held_out & {n for b in crops_of(data, steps=range(6)) for n in b.case}


def test_global_random_numbers_are_left_alone(data):
    torch.manual_seed(5)
    np.random.seed(5)
    before = torch.get_rng_state().clone(), np.random.get_state()[1].copy()
    crops_of(data)
    crops_of(data, num_workers=1)
    assert torch.equal(before[0], torch.get_rng_state()) and np.array_equal(before[1], np.random.get_state()[1])


def test_2d(tiny_preprocessed):
    tiny_preprocessed(901, "Tiny", 5, dim=2, shape=(14, 18, 16))
    plan = load_plan(901, "2d")
    pool = prepare_sources(plan, ["Dataset901_Tiny"])
    request = CropRequest(size=(8, 8), read_size=(10, 12))
    (crops,) = crops_of((pool, plan), request, steps=range(1), num_workers=1)
    assert crops.data.shape == (4, 1, 10, 12) and crops.body.shape == (4, 1, 10, 12) and crops.start.shape == (4, 3)


def test_counts_come_from_all_workers(data):
    pool, plan = data
    loader = make_loader(pool, plan, REQUEST, STREAM, range(2), num_workers=2)
    assert loader.counts() == {"redrawn": 0, "air": 0}
    loader.crops.counters[1] += 3
    assert loader.counts() == {"redrawn": 3, "air": 3}
    assert len(loader) == 2


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("damage", ["deleted", "truncated"])
def test_damaged_cases_are_named_through_workers(data, workers, damage):
    pool, plan = data
    for case in pool.cases:
        file = case.folder / f"{case.name}.b2nd"
        if damage == "deleted":
            file.unlink()
        else:
            file.write_bytes(file.read_bytes()[:-50])
    loader = make_loader(pool, plan, REQUEST, STREAM, range(3), num_workers=workers)
    for _ in range(2):
        with pytest.raises(NnsslError, match=r"case_00\d of Dataset901_Tiny .*case_00\d.b2nd") as error:
            list(loader)
        assert "Traceback" not in str(error.value) and not multiprocessing.active_children()


def test_killed_worker_tells_what_to_do(data, monkeypatch):
    pool, plan = data
    loader = make_loader(pool, plan, REQUEST, STREAM, range(50), num_workers=1)
    batches = iter(loader)
    next(batches)
    (worker,) = batches._batches._workers
    os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(NnsslError, match=r"loader process was killed \(SIGKILL\).*workers=N"):
        for _ in batches:
            pass


@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="needs sigwaitinfo")
def test_signals_of_a_scheduler_do_not_end_workers(data):
    pool, plan = data
    loader = make_loader(pool, plan, REQUEST, STREAM, range(60), num_workers=1)
    batches = iter(loader)
    next(batches)
    (worker,) = batches._batches._workers
    # from another process, as Slurm sends it to each process of a job step, or a terminal's Ctrl-C
    for name in ("SIGTERM", "SIGINT"):
        code = f"import os, signal; os.kill({worker.pid}, signal.{name})"
        subprocess.run([sys.executable, "-c", code], check=True)
    assert len(list(batches)) == 59 and worker.is_alive()
    worker.terminate()  # the main process may
    worker.join(10)
    assert worker.exitcode == 0
    del batches, loader


def test_no_held_out_cases(data):
    pool, plan = data
    none = type(pool)(pool.cases, pool.cases, [], pool.median_shape, "")
    with pytest.raises(NnsslError, match="no held-out cases"):
        crops_of((none, plan), stream=replace(STREAM, number=HELD_OUT))


def test_started_workers_deliver_the_rest(data):
    pool, plan = data
    loader = make_loader(pool, plan, REQUEST, STREAM, range(4), num_workers=1)
    batches = iter(loader)
    next(batches)
    assert len(list(batches)) == 3
