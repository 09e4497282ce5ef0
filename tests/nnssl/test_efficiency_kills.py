"""Jobs that are killed, in any phase, with the program or without it: nothing is lost and nothing repeated."""

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from nnssl.experiments.executor import LocalBackend, run_jobs, settle_lost
from nnssl.experiments.jobs import PHASES, Job
from nnssl.experiments.records import Records, try_lock


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("whole", [True, False], ids=["machine goes down", "program is killed"])
@pytest.mark.parametrize("phase", PHASES)
def test_a_kill_in_each_phase_loses_nothing(lab, phase, whole, caplog):
    """SIGKILL while a job of the phase runs: of the program and its job (as a crash), or of the program alone."""
    hang = lab.control / f"hang-{phase}"
    hang.touch()
    child = os.fork()
    if child == 0:
        try:
            lab.run()
        finally:
            os._exit(1)
    deadline = time.monotonic() + 300
    while not (lab.control / "hanging").is_file() and time.monotonic() < deadline:
        time.sleep(0.01)
    job_id = (lab.control / "hanging").read_text()
    record = lab.out / "jobs" / f"{job_id}.json"
    while json.loads(record.read_text() if record.is_file() else "{}").get("status") != "running":
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    pid = json.loads(record.read_text())["pid"]
    if whole:
        os.killpg(pid, signal.SIGKILL)
        before = {i for i in lab.graph().jobs if lab.starts(i)}
        hang.unlink()
        lab.run()
    else:
        before = {i for i in lab.graph().jobs if lab.starts(i)}
        with caplog.at_level(logging.INFO, logger="nnssl"):
            outcome = _run_while_hanging(lab, hang, caplog)
        assert job_id in outcome.done, "it was waited for"
        assert len(lab.starts(job_id)) == 1, "and not started a second time"
    job = lab.graph().jobs[job_id]
    if whole:
        assert len(lab.starts(job_id)) == 2
        assert lab.starts(job_id)[1].endswith(" --c") == bool(job.resume)
    assert all(len(lab.starts(i)) == 1 for i in lab.graph().jobs if i != job_id)
    assert len(before) == list(lab.graph().jobs).index(job_id) + 1
    assert len(lab.rows("cases.csv")) == 4


def _run_while_hanging(lab, hang, caplog):
    """Start again while the old job still runs, and let it end once the program says that it waits."""

    def release():
        deadline = time.monotonic() + 300
        while "still running from an earlier start" not in caplog.text and time.monotonic() < deadline:
            time.sleep(0.01)
        hang.unlink()

    thread = threading.Thread(target=release)
    thread.start()
    try:
        return lab.run()
    finally:
        thread.join()


def test_a_process_that_outlives_its_dead_leader_is_ended(lab):
    """Data-loading workers of a killed training hold its lock; they are ended and the job is started anew."""
    records = Records(lab.out)
    lock = try_lock(records.lock("a"))
    leader = os.fork()
    if leader == 0:
        os.setsid()
        if os.fork() == 0:
            time.sleep(60)
        os._exit(0)
    os.waitpid(leader, 0)
    lock.close()
    assert try_lock(records.lock("a")) is None
    records.write("a", status="running", pid=leader)
    backend = LocalBackend(records, launcher=[sys.executable, "-S", "-c", "print('hello')"])
    outcome = run_jobs([Job("a", "plan", ("x",), recorded=True)], records, backend)
    assert outcome.done == ["a"], outcome
    assert records.last_line("a") == "hello"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_killed_job_that_dies_late_is_started_again(lab, caplog):
    """It still lives at the second start, as after SIGTERM during a save, and ends without its output: it has not failed."""
    records, output = Records(lab.out), lab.out / "weights"
    lock = try_lock(records.lock("a"))
    dying = os.fork()
    if dying == 0:
        os.setsid()
        time.sleep(600)
        os._exit(0)
    lock.close()
    records.write("a", status="running", pid=dying, started=time.time() - 30, seconds=5.0)
    code = f"import os; os.makedirs({str(lab.out)!r}, exist_ok=True); open({str(output)!r}, 'w').write('x')"
    job = Job("a", "train", ("x",), outputs=(output,))

    def die():
        deadline = time.monotonic() + 60
        while "still running from an earlier start" not in caplog.text and time.monotonic() < deadline:
            time.sleep(0.01)
        os.kill(dying, signal.SIGKILL)

    ended = []
    thread = threading.Thread(target=die)
    thread.start()
    with caplog.at_level(logging.INFO, logger="nnssl"):
        backend = LocalBackend(records, launcher=[sys.executable, "-S", "-c", code])
        outcome = run_jobs([job], records, backend, on_end=lambda j, o: ended.append(j.id))
    thread.join()
    os.waitpid(dying, 0)
    assert (outcome.done, outcome.failed, ended) == (["a"], {}, ["a"]) and output.read_text() == "x"
    assert "a has ended without its outputs: it is started again" in caplog.text
    assert len(lab.starts("a")) == 1 and 35 < records.read("a")["seconds"] < 90, "the time of both starts"


def test_stopping_while_a_left_job_runs_leaves_its_record(lab):
    """Its process goes on; the next start waits for it, and its time is not counted twice."""
    records = Records(lab.out)
    records.write("a", status="running", pid=os.getpid(), started=time.time() - 30, seconds=5.0)
    before = records.read("a")
    polled = []

    class Interrupted(LocalBackend):
        def start(self, job, slot):
            handle = super().start(job, slot)
            polled.append(handle)
            handle.poll = _interrupt
            return handle

    with try_lock(records.lock("a")), pytest.raises(KeyboardInterrupt):
        run_jobs([Job("a", "train", ("x",), outputs=(lab.out / "weights",))], records, Interrupted(records))
    assert polled and records.read("a") == before


def _interrupt():
    raise KeyboardInterrupt


def test_interrupting_ends_the_job_and_the_next_start_goes_on(lab):
    class Impatient(Exception):  # noqa: N818
        pass

    (lab.control / "hang-train").touch()
    seen = []

    class Watching(LocalBackend):
        def start(self, job, slot):
            handle = super().start(job, slot)
            if job.phase == "train":
                while not (lab.control / "hanging").is_file():
                    time.sleep(0.01)
                seen.append(handle)
                raise_on_poll(handle)
            return handle

    def raise_on_poll(handle):
        def poll():
            raise Impatient

        handle.poll = poll

    with pytest.raises(Impatient):
        lab.run(Watching(Records(lab.out), launcher=lab.launcher))
    assert seen[0].process.poll() == -signal.SIGTERM
    (lab.control / "hang-train").unlink()
    assert not lab.run().failed


def test_a_job_killed_in_its_validation_beside_a_killed_program(tmp_path):
    """What it is for was written: it is done, and its time runs to the last sign of life."""
    records, output = Records(tmp_path), tmp_path / "checkpoint_final.pth"
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    jobs = [
        Job("a", "train", ("x",), outputs=(output,), amount=7),
        Job("b", "train", ("x",), outputs=(tmp_path / "no",)),
    ]
    output.write_bytes(b"weights")
    for job in jobs:
        records.write(job.id, status="running", pid=dead.pid, started=1000.0, seconds=5.0)
        records.log(job.id).parent.mkdir(exist_ok=True)
        records.log(job.id).write_text("validating")
        os.utime(records.log(job.id), (1060, 1060))
    os.utime(output, (1040, 1040))
    settle_lost(jobs, records)
    a, b = (records.read(job.id) for job in jobs)
    assert (a["status"], a["seconds"], a["amount"]) == ("done", 65.0, 7)
    assert (b["status"], b["seconds"]) == ("stopped", 65.0)
    records.write("b", status="running", pid=os.getpid())
    settle_lost(jobs, records)
    assert records.read("b")["status"] == "running"


ODD = ['{"pid": "abc", "status": "running", "started": 5}', '{"pid": 1, "status": "running", "started": "now", "seconds": [1]}',
       '{"pid": 99999999999999999999, "status": "running"}', '{"pid": -1, "status": true}', '{"status"', "[]"]  # fmt: skip


@pytest.mark.parametrize("content", ODD)
def test_a_record_that_a_hand_has_spoilt_is_looked_at_anew(tmp_path, content):
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs" / "a.json").write_text(content)
    job = Job("a", "train", ("x",), outputs=(tmp_path / "weights",))
    settle_lost([job], Records(tmp_path))
    code = f"open({str(tmp_path / 'weights')!r}, 'w').write('x')"
    records = Records(tmp_path)
    outcome = run_jobs([job], records, LocalBackend(records, launcher=[sys.executable, "-S", "-c", code]))
    assert outcome.done == ["a"] and records.read("a")["status"] == "done" and 0 <= records.read("a")["seconds"] < 60


def test_predictions_without_a_record_are_looked_at_again(lab):
    """A killed prediction may leave a half written last file: only its record tells that it was finished."""
    lab.run()
    job_id = next(i for i in lab.graph().jobs if i.startswith("predict"))
    (lab.out / "jobs" / f"{job_id}.json").unlink()
    assert lab.run().done == [job_id]
