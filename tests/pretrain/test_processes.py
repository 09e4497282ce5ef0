"""Preprocessing in several processes, and what becomes of a case whose process ends."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import time

import blosc2
import numpy as np
import pytest
from preparing import RAW, prepare

from nnssl.errors import NnsslError
from nnssl.pretrain.prepare import prepare_sources, processes


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
