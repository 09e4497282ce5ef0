"""The jobs of an experiment: run in order, one fails and others go on, and after a kill in any phase nothing is repeated.

A small program stands in for the commands: it writes the files that each would write, and can be told to hang or to fail.
"""

import csv
import json
import logging
import math
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from nnssl.errors import NnsslError
from nnssl.experiments import cli, executor, report
from nnssl.experiments.estimate import estimate_jobs
from nnssl.experiments.executor import LocalBackend, full_command, run_jobs
from nnssl.experiments.experiment import load_experiment
from nnssl.experiments.jobs import PHASES, Job, build_graph
from nnssl.experiments.records import Records, try_lock

FAKE = """
import json, os, sys, time
control = sys.argv[1]
table = json.load(open(os.path.join(control, "table.json")))
command = [a for a in sys.argv[2:] if a != "--c"]
job = table[json.dumps(command)]
for path in job["resume"][-1:]:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    open(path, "w").write("begun")
if os.path.exists(os.path.join(control, "fail-" + job["id"])):
    print("out of memory, lower the batch")
    sys.exit(3)
begin = time.monotonic()
while os.path.exists(os.path.join(control, "hang-" + job["phase"])) and time.monotonic() < begin + 600:
    with open(os.path.join(control, "hanging.tmp"), "w") as file:
        file.write(job["id"])
    os.replace(os.path.join(control, "hanging.tmp"), os.path.join(control, "hanging"))
    time.sleep(0.01)
for path in job["outputs"]:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    open(path, "w").write("written by " + job["id"])
if job["phase"] == "evaluate":
    spec = json.load(open(command[1]))
    rows = [{"case": c["case"], "label": "liver", "dice": 0.5, "surface_dice": 0.5, "hd95": float("nan"),
             "reference_voxels": 9, "prediction_voxels": 8} for c in spec["cases"]]
    curve = [{"epoch": 0, "step": 3, "pseudo_dice": 0.1, "train_loss": 1.0, "val_loss": 2.0, "minutes": 0.5}]
    json.dump({"cases": rows, "curve": curve, "labels": {"liver": 1}}, open(spec["result"], "w"))
if job["id"] + "-incomplete" in os.listdir(control):
    os.unlink(job["outputs"][0])
"""


class Lab:
    """A tiny experiment with fake commands."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.out, self.control = folder, folder / "out", folder / "control"
        self.control.mkdir()
        (self.control / "fake.py").write_text(FAKE)
        self.file = folder / "exp.yaml"
        self.write()

    def write(self, **changes: str) -> None:
        lines = {"dataset": 901, "methods": "[scratch, mae]", "labels": "[1]", "seeds": 1, "training": "{epochs: 2}"}
        lines["network"] = "{features: [4, 8, 12]}"
        self.file.write_text("".join(f"{k}: {v}\n" for k, v in {**lines, **changes}.items()))
        graph = self.graph()
        table = {
            json.dumps(list(j.command)): {"id": j.id, "phase": j.phase, "outputs": [str(p) for p in j.outputs],
                                          "resume": [str(p) for p in j.resume]}
            for j in graph.jobs.values()
        }  # fmt: skip
        (self.control / "table.json").write_text(json.dumps(table))

    def graph(self):
        return build_graph(load_experiment(self.file), self.out, "cpu")

    def run(self, slots: int = 1, **options):
        launcher = [sys.executable, "-S", str(self.control / "fake.py"), str(self.control)]
        backend = LocalBackend(Records(self.out), {}, launcher=launcher)
        return cli.run_experiment(self.file, out=self.out, device="cpu", slots=slots, backend=backend, **options)

    def starts(self, job_id: str) -> list[str]:
        file = self.out / "logs" / f"{job_id}.log"
        return [line for line in file.read_text().splitlines() if line.startswith("$ ")] if file.is_file() else []

    def rows(self, name: str) -> list[dict]:
        with (self.out / name).open(newline="") as file:
            return list(csv.DictReader(file))


@pytest.fixture
def lab(tiny_preprocessed, tmp_path, monkeypatch):
    tiny_preprocessed(901, "Tiny", 5, n_test=2)
    monkeypatch.setattr(executor, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(cli, "need_surface_library", lambda: None)
    monkeypatch.setattr(report, "write", lambda folder, experiment, published=None: None)
    return Lab(tmp_path)


def test_the_graph_has_each_phase_in_order_and_shares_what_can_be_shared(lab):
    lab.write(labels="[1, 2]", seeds="2")
    graph = lab.graph()
    phases = [j.phase for j in graph.jobs.values()]
    assert [phases.count(p) for p in PHASES] == [1, 1, 8, 8, 8, 8]
    ids = list(graph.jobs)
    assert all(ids.index(need) < ids.index(j.id) for j in graph.jobs.values() for need in j.needs)
    assert [r.arm.name for r in graph.runs[:2]] == ["scratch", "mae"]
    assert graph.runs[0].group == graph.runs[1].group != graph.runs[2].group
    assert ids.index(graph.runs[0].jobs[-1]) < next(i for i, p in enumerate(phases) if p == "pretrain")


def test_names_change_with_what_decides_the_result_and_with_nothing_else(lab):
    def names():
        return {p: {j.id for j in lab.graph().jobs.values() if j.phase == p} for p in ("pretrain", "train", "evaluate")}

    first = names()
    lab.write(environment="{A: 1}", title="other", pictures="false")
    assert names() == first
    lab.write(surface_tolerance_mm="2")
    assert names()["train"] == first["train"] and names()["evaluate"].isdisjoint(first["evaluate"])
    lab.write(training="{epochs: 3}")
    assert names()["pretrain"] == first["pretrain"] and names()["train"].isdisjoint(first["train"])
    lab.write(pretraining="{epochs: 3}")
    scratch = {i for i in first["train"] if "scratch" in i}
    assert names()["pretrain"].isdisjoint(first["pretrain"]) and names()["train"] & first["train"] == scratch
    lab.write(network="{features: [4, 8, 16]}")
    assert all(names()[p].isdisjoint(first[p]) for p in first)


def test_a_pretraining_with_labels_is_made_for_each_draw_with_exactly_its_cases(lab):
    lab.write(labels="[1, 2]", seeds="2", methods="[scratch, {name: omni, method: mae, pretraining: {labelled: true}}]")
    graph = lab.graph()
    made = {j.id: j for j in graph.jobs.values() if j.phase == "pretrain"}
    assert len(made) == 4 and len({j.outputs for j in made.values()}) == 4
    for run in graph.runs:
        if run.arm.name == "omni":
            (job,) = [made[i] for i in run.jobs if i in made]
            command = list(job.command)
            listed = graph.texts[Path(command[command.index("--labelled-cases") + 1])]
            assert listed.split() == list(run.draw.cases) and command[command.index("--labelled") + 1] == "901"
            assert job.outputs[0].parent.name.startswith("nnsslMaeOmni_")
    with pytest.raises(NnsslError, match="'omni.switch' belongs to a pretraining with 'labelled: true'"):
        lab.write(methods="[{name: omni, method: mae, options: {omni.switch: 0.5}}]")
    with pytest.raises(NnsslError, match="omni: .*swich"):
        lab.write(methods="[{name: omni, method: mae, pretraining: {labelled: true, options: {omni.swich: 0.5}}}]")


def test_the_network_of_a_labelled_pretraining_is_an_arm_without_steps(lab):
    """No step, and nothing in the estimate or the training curves that needs one."""
    own = "{name: own, method: mae, pretraining: {labelled: true}, training: {epochs: 0}}"
    lab.write(labels="[1]", seeds="1", methods=f"[scratch, {own}]")
    graph = lab.graph()
    run = next(r for r in graph.runs if r.arm.name == "own")
    train = graph.jobs[next(j for j in run.jobs if j.startswith("train-"))]
    plan = graph.jobs[next(j for j in run.jobs if j.startswith("plan-"))]
    assert run.steps == train.amount == 0
    assert plan.command[plan.command.index("--epochs") + 1] == "0"
    records = Records(lab.out)
    records.write(train.id, status="done", seconds=40.0)
    times = estimate_jobs(graph, records, [train], "cpu", timed=False)
    assert math.isnan(times.seconds[train.id])  # unknown: a job without steps tells nothing of a step
    with pytest.raises(NnsslError, match="0 epochs keep the weights as they are"):
        lab.write(methods="[scratch, {name: own, method: mae, training: {schedule: mean-teacher, epochs: 0}}]")
        lab.graph()


def test_settings_share_what_is_the_same(lab):
    first = set(lab.graph().jobs)
    lab.write(
        settings="[{name: one}, {name: two, methods: [scratch, {name: other, method: mae}]}, {name: three, labels: [2]}]"
    )
    graph = lab.graph()
    phases = [j.phase for j in graph.jobs.values()]
    assert first < set(graph.jobs) and phases.count("pretrain") == phases.count("network") == 1
    assert phases.count("train") == 5, "scratch of one and two is one training"
    assert [r.about["setting"] for r in graph.runs] == ["one"] * 2 + ["two"] * 2 + ["three"] * 2
    assert not lab.run().failed
    rows = lab.rows("cases.csv")
    there = {(r["setting"], r["method"]) for r in rows}
    assert there == {(r.resolved.name, r.arm.name) for r in graph.runs} and len(there) == 6
    about = json.loads((lab.out / "experiment.json").read_text())
    assert (
        [s["labels"] for s in about["settings"]] == [[1], [1], [2]] and "labels" not in about and about["seeds"] == [0]
    )


def test_networks_of_two_datasets_are_told_apart(lab, tiny_preprocessed):
    tiny_preprocessed(902, "Twin", 5, n_test=2)
    lab.write(settings="[{name: one}, {name: two, dataset: 902}]")
    networks = [j for j in lab.graph().jobs.values() if j.phase == "network"]
    assert len({j.id for j in networks}) == len({j.outputs[0] for j in networks}) == 2


def test_all_is_run_once_and_collected(lab):
    outcome = lab.run(slots=2)
    graph = lab.graph()
    assert not outcome.failed and set(outcome.done) == set(graph.jobs)
    assert len(lab.rows("cases.csv")) == 4 and {r["method"] for r in lab.rows("cases.csv")} == {"scratch", "mae"}
    row = lab.rows("cases.csv")[0]
    assert (row["labels"], row["setting"], row["seed"], row["fold"], row["hd95"]) == ("1", "Tiny", "0", "all", "")
    assert lab.rows("runs.csv")[0]["pseudo_dice"] == "0.1" and lab.rows("failures.csv") == []
    about = json.loads((lab.out / "experiment.json").read_text())
    assert about["methods"] == ["scratch", "mae"] and about["labels"] == [1] and about["seeds"] == [0]
    images = json.loads((lab.out / "images.json").read_text())
    assert Path(images["cases"]["Tiny"]["case_005"]["image"]).is_file() and len(images["predictions"]) == 2
    links = list((lab.out / "test").glob("*/*"))
    assert sorted(p.name for p in links) == ["case_005_0000.nii.gz", "case_006_0000.nii.gz"] and links[0].stat().st_size
    again = lab.run()
    assert not again.done and set(again.finished) == set(graph.jobs)
    assert all(len(lab.starts(i)) == 1 for i in graph.jobs)


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
    assert records.last_lines("a") == ["hello"]


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


def test_a_failing_job_stops_only_what_needs_it(lab, caplog):
    graph = lab.graph()
    pretrain = next(i for i in graph.jobs if i.startswith("pretrain"))
    fail = lab.control / f"fail-{pretrain}"
    fail.touch()
    outcome = lab.run()
    assert list(outcome.failed) == [pretrain] and "exit status 3: out of memory" in outcome.failed[pretrain]
    assert {i.split("-")[0] for i in outcome.blocked} == {"plan", "train", "predict", "evaluate"}
    assert {r["method"] for r in lab.rows("cases.csv")} == {"scratch"}
    failures = lab.rows("failures.csv")
    assert [f["phase"] for f in failures] == ["pretrain", "plan", "train", "predict", "evaluate"]
    assert failures[0]["method"] == "mae" and (lab.out / failures[0]["log"]).is_file()
    assert failures[1]["reason"] == f"not run: {pretrain} failed"
    fail.unlink()
    again = lab.run()
    assert not again.failed and again.done[0] == pretrain and lab.starts(pretrain)[1].endswith(" --c")
    assert lab.rows("failures.csv") == [] and {r["method"] for r in lab.rows("cases.csv")} == {"scratch", "mae"}


def test_the_command_tells_failures_by_its_exit_status(lab, monkeypatch, capsys):
    train = next(i for i in lab.graph().jobs if i.startswith("train"))
    (lab.control / f"fail-{train}").touch()
    launcher = [sys.executable, "-S", str(lab.control / "fake.py"), str(lab.control)]
    monkeypatch.setattr(cli, "LocalBackend", lambda records, *args: LocalBackend(records, launcher=launcher))
    assert cli.main([str(lab.file), "-device", "cpu", "--output", str(lab.out)]) == 1
    out = capsys.readouterr().out
    assert "1 job failed, 2 that need them were not run" in out and str(lab.out / "logs" / f"{train}.log") in out
    (lab.control / f"fail-{train}").unlink()
    assert cli.main([str(lab.file), "-device", "cpu", "--output", str(lab.out)]) == 0


def test_a_command_that_ends_well_without_its_file_has_failed(lab):
    job_id = next(i for i in lab.graph().jobs if i.startswith("train"))
    (lab.control / f"{job_id}-incomplete").touch()
    outcome = lab.run()
    assert "checkpoint_final.pth is missing though the command ended well" in outcome.failed[job_id]


def test_predictions_without_a_record_are_looked_at_again(lab):
    """A killed prediction may leave a half written last file: only its record tells that it was finished."""
    lab.run()
    job_id = next(i for i in lab.graph().jobs if i.startswith("predict"))
    (lab.out / "jobs" / f"{job_id}.json").unlink()
    assert lab.run().done == [job_id]


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

    launcher = [sys.executable, "-S", str(lab.control / "fake.py"), str(lab.control)]
    with pytest.raises(Impatient):
        cli.run_experiment(lab.file, out=lab.out, device="cpu", backend=Watching(Records(lab.out), launcher=launcher))
    assert seen[0].process.poll() == -signal.SIGTERM
    (lab.control / "hang-train").unlink()
    assert not lab.run().failed


def test_dry_run_writes_nothing_and_tells_what_is_there(lab, caplog):
    def there():
        """All but the lists and links that the shown commands name."""
        mine = [lab.out / name for name in ("lists", "test")]
        return sorted(
            p for p in lab.folder.rglob("*") if p != lab.out and not any(m == p or m in p.parents for m in mine)
        )

    before = there()
    with caplog.at_level(logging.INFO, logger="nnssl"):
        cli.run_experiment(lab.file, out=lab.out, device="cpu", dry_run=True)
    assert there() == before
    graph = lab.graph()
    named = {w for j in graph.jobs.values() for w in j.command if w.startswith(str(lab.out / "lists"))}
    assert named and all(Path(w).is_file() for w in named), "each line with $ can be typed"
    assert "nnssl_evaluate" not in caplog.text and "$ python -m nnssl.experiments.evaluate " in caplog.text
    (head,) = [line for line in caplog.text.splitlines() if "labels  done  to do" in line]
    assert caplog.text.index(head) < caplog.text.index("$ ")
    assert all(f"{'to do':13} {i}" in caplog.text for i in graph.jobs)
    assert "10 jobs, 0 of them finished" in caplog.text and "a few steps were timed" in caplog.text
    assert "$ nnUNetv2_train 901 3d_fullres all -p nnUNetPlans_exp-" in caplog.text
    fail = lab.control / f"fail-{next(i for i in graph.jobs if i.startswith('pretrain'))}"
    fail.touch()
    lab.run()
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="nnssl"):
        cli.run_experiment(lab.file, out=lab.out, device="cpu", dry_run=True)
    assert "10 jobs, 5 of them finished" in caplog.text and caplog.text.count("exists  ") == 5
    assert f"failed before {fail.name[5:]}" in caplog.text
    assert "rough for pretrain: a few steps were timed" in caplog.text, "the rest is known from the finished jobs"
    fail.unlink()
    lab.run()
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="nnssl"):
        cli.run_experiment(lab.file, out=lab.out, device="cpu", dry_run=True)
    assert "10 jobs, 10 of them finished" in caplog.text and "Time:" not in caplog.text
    assert "$ export" not in caplog.text
    predicted = next(i for i in graph.jobs if i.startswith("predict"))
    Records(lab.out).write(predicted, status="")  # as where it was typed by hand
    lab.file.write_text(lab.file.read_text() + "\nenvironment: {OMP_NUM_THREADS: 1, nnssl_logger: none}\n")
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="nnssl"):
        cli.run_experiment(lab.file, out=lab.out, device="cpu", dry_run=True)
    assert f"{'to check':13} {predicted}" in caplog.text, "it may not be whole, and is no new work"
    assert "$ export OMP_NUM_THREADS=1\n" in caplog.text and "$ export nnssl_logger=none" in caplog.text


def test_estimates_come_from_finished_jobs(lab):
    from nnssl.experiments.estimate import estimate_jobs

    graph, records = lab.graph(), Records(lab.out)
    jobs = {j.phase: j for j in graph.jobs.values()}
    trains = [j for j in graph.jobs.values() if j.phase == "train"]
    records.write(trains[0].id, status="done", seconds=120.0)
    found = estimate_jobs(graph, records, [trains[1], jobs["plan"]], "cuda")
    assert found.seconds[trains[1].id] == pytest.approx(120.0) and found.measured == {"train"}


def test_two_at_a_time_in_one_folder_are_refused_and_report_only_runs_nothing(lab):
    lab.run()
    with try_lock(lab.out / ".lock"), pytest.raises(NnsslError, match="another process is at work"):
        lab.run()
    (lab.out / "cases.csv").unlink()
    graph = lab.graph()
    next(iter(graph.jobs.values())).outputs[0].unlink()
    command = json.loads((lab.out / "experiment.json").read_text())["commands"][-1]
    assert command.startswith(f"nnssl_label_efficiency {lab.file}") and f"--output {lab.out}" in command
    with try_lock(lab.out / ".lock"):
        lab.run(report_only=True)  # beside a running experiment
        assert len(lab.rows("cases.csv")) == 4
    outcome = lab.run(report_only=True)
    assert not outcome.done and len(lab.rows("cases.csv")) == 4
    assert json.loads((lab.out / "experiment.json").read_text())["commands"][-1] == command


def test_report_only_names_what_failed_before(lab):
    job_id = next(i for i in lab.graph().jobs if i.startswith("pretrain"))
    (lab.control / f"fail-{job_id}").touch()
    lab.run()
    outcome = lab.run(report_only=True)
    assert list(outcome.failed) == [job_id] and not outcome.done
    assert [f["job"] for f in lab.rows("failures.csv")] == [job_id] and "out of memory" in lab.rows("failures.csv")[0][
        "reason"
    ]


def test_slots_run_side_by_side_and_gpus_are_shared_out(lab, tmp_path):
    records = Records(tmp_path / "side")
    code = "import os, sys, time; p = sys.argv[1]\n"
    code += "open(p + sys.argv[2], 'w').write(os.environ.get('CUDA_VISIBLE_DEVICES', '-'))\n"
    code += "while len([f for f in os.listdir(p)]) < 2: time.sleep(0.01)"
    (tmp_path / "seen").mkdir()
    backend = LocalBackend(records, {"CUDA_VISIBLE_DEVICES": "9"}, ["4", "7"], [sys.executable, "-S", "-c", code])
    jobs = [Job(i, "train", (str(tmp_path / "seen") + "/", i), recorded=True, gpu=True) for i in "ab"]
    assert sorted(run_jobs(jobs, records, backend, slots=2).done) == ["a", "b"], "one alone would wait for ever"
    assert {(tmp_path / "seen" / i).read_text() for i in "ab"} == {"4", "7"}


def test_published_figures_and_pictures_reach_the_report(lab, monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(
        report, "write", lambda folder, experiment, published=None: seen.append((folder, experiment, published))
    )
    with pytest.raises(NnsslError, match="do not exist"):
        lab.run(published=tmp_path / "none.csv")
    (tmp_path / "p.csv").write_text("method,labels,dice\n")
    lab.write(published="p.csv", pictures="false")
    lab.run()
    assert seen[-1][0] == lab.out and seen[-1][2] == tmp_path / "p.csv" and not seen[-1][1].pictures
    assert len(seen) == 2, "after the only group, and at the end"


def test_a_fault_of_the_report_does_not_stop_the_jobs(lab, monkeypatch, caplog):
    calls = []

    def write(folder, experiment, published=None):
        calls.append(1)
        if len(calls) == 1:
            raise ValueError("no such colour")

    monkeypatch.setattr(report, "write", write)
    assert not lab.run().failed and "no such colour" in caplog.text and len(calls) == 2


def test_resume_is_asked_for_where_something_was_begun(tmp_path):
    job = Job("a", "train", ("nnUNetv2_train", "4"), resume=(tmp_path / "x",))
    assert full_command(job) == ("nnUNetv2_train", "4")
    (tmp_path / "x").touch()
    assert full_command(job)[-1] == "--c"


def test_no_gpu_is_said_before_anything_runs(lab, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(NnsslError, match="-device cpu"):
        cli.run_experiment(lab.file, out=lab.out, device="cuda")


def test_a_job_killed_in_its_validation_beside_a_killed_program(tmp_path):
    """What it is for was written: it is done, and its time runs to the last sign of life."""
    from nnssl.experiments.executor import settle_lost
    from nnssl.experiments.jobs import Job

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
    from nnssl.experiments.executor import settle_lost

    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs" / "a.json").write_text(content)
    job = Job("a", "train", ("x",), outputs=(tmp_path / "weights",))
    settle_lost([job], Records(tmp_path))
    code = f"open({str(tmp_path / 'weights')!r}, 'w').write('x')"
    records = Records(tmp_path)
    outcome = run_jobs([job], records, LocalBackend(records, launcher=[sys.executable, "-S", "-c", code]))
    assert outcome.done == ["a"] and records.read("a")["status"] == "done" and 0 <= records.read("a")["seconds"] < 60


def test_a_damaged_result_is_named_and_left_out(lab, caplog):
    lab.run()
    file = lab.graph().runs[0].result
    for content in ("{", "{}", '{"cases": 5, "curve": [], "labels": {}}', '{"cases": [], "curve": [3], "labels": {}}'):
        file.write_text(content)
        caplog.clear()
        lab.run(report_only=True)
        assert f"{file} is damaged" in caplog.text and "Delete it, and the same command evaluates anew" in caplog.text
        assert {r["method"] for r in lab.rows("cases.csv")} == {"mae"}
    file.unlink()
    lab.run()
    assert {r["method"] for r in lab.rows("cases.csv")} == {"scratch", "mae"}


def test_a_file_in_the_place_of_the_output_folder(lab):
    lab.out.write_text("mine")
    with pytest.raises(NnsslError, match="--output .*out is a file; a folder is needed"):
        lab.run()
    assert lab.out.read_text() == "mine"


def test_all_missing_datasets_are_named_at_once_with_where_they_come_from(lab, tmp_path):
    file = tmp_path / "paper.yaml"
    file.write_text(
        "methods: [scratch, mae]\nlabels: [1]\ndatasets: {27: 'ACDC, from its organisers'}\npretraining: {datasets: [301]}\n"
        "settings: [{name: ACDC, dataset: 27}, {name: Spleen, dataset: 9}, {name: here, dataset: 901}]\n"
    )
    with pytest.raises(NnsslError, match="3 datasets are not there") as error:
        cli.run_experiment(file, out=tmp_path / "out", device="cpu", dry_run=True)
    text = str(error.value)
    assert "\n  27: ACDC, from its organisers (for ACDC)" in text and "\n  9 (for Spleen)" in text
    assert "\n  301 (to pretrain on for ACDC, Spleen, here)" in text and text.endswith("or leave out what needs it.")
    file.write_text("dataset: 27\nmethods: [scratch]\nlabels: [1]\n")  # a setting without a name of its own
    with pytest.raises(NnsslError, match=r"a dataset is not there: 27\.\n"):
        cli.run_experiment(file, out=tmp_path / "out", device="cpu", dry_run=True)


def test_each_end_of_a_job_tells_what_is_left(lab, caplog):
    with caplog.at_level(logging.INFO, logger="nnssl"):
        lab.run()
    ends = [line for line in caplog.text.splitlines() if " done in " in line]
    assert len(ends) == 10 and all(f": {i} of 10" in line for i, line in enumerate(ends, start=1))
    assert ": 10 of 10" in ends[-1] and "left" not in ends[-1]
    assert all(line.endswith(" left") or line.endswith("time unknown yet") for line in ends[:-1])
    assert any("about" in line for line in ends[:-1])
