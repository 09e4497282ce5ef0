"""Running an experiment: in order, one job fails and others go on, and what is collected and reported of it."""

import json
import sys
from pathlib import Path

import pytest

from nnssl.errors import NnsslError
from nnssl.experiments import cli, report, run
from nnssl.experiments.executor import LocalBackend, run_jobs
from nnssl.experiments.jobs import Job
from nnssl.experiments.records import Records, try_lock


def test_all_is_run_once_and_collected(lab):
    outcome = lab.run(jobs=2)
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
    monkeypatch.setattr(run, "LocalBackend", lambda records, *args: LocalBackend(records, launcher=lab.launcher))
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
    monkeypatch.setattr(report, "write", lambda folder, published=None: seen.append((folder, published)))
    with pytest.raises(NnsslError, match="do not exist"):
        lab.run(compare=tmp_path / "none.csv")
    (tmp_path / "p.csv").write_text("method,labels,dice\n")
    lab.write(published="p.csv", pictures="false")
    lab.run()
    assert seen[-1] == (lab.out, tmp_path / "p.csv")
    assert json.loads((lab.out / "experiment.json").read_text())["pictures"] is False
    assert len(seen) == 2, "after the only group, and at the end"


def test_a_fault_of_the_report_does_not_stop_the_jobs(lab, monkeypatch, caplog):
    calls = []

    def write(folder, published=None):
        calls.append(1)
        if len(calls) == 1:
            raise ValueError("no such colour")

    monkeypatch.setattr(report, "write", write)
    assert not lab.run().failed and "no such colour" in caplog.text and len(calls) == 2


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
