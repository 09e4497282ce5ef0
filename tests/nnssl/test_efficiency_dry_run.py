"""What is said before anything runs, and of the time that is left."""

import logging
from pathlib import Path

import pytest

from nnssl.errors import NnsslError
from nnssl.experiments.estimate import estimate_jobs
from nnssl.experiments.options import Options
from nnssl.experiments.records import Records
from nnssl.experiments.run import run_experiment


def dry_run(lab, caplog):
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="nnssl"):
        lab.run(dry_run=True)


def test_dry_run_writes_nothing_and_tells_what_is_there(lab, caplog):
    def there():
        """All but the lists and links that the shown commands name."""
        mine = [lab.out / name for name in ("lists", "test")]
        return sorted(
            p for p in lab.folder.rglob("*") if p != lab.out and not any(m == p or m in p.parents for m in mine)
        )

    before = there()
    dry_run(lab, caplog)
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
    dry_run(lab, caplog)
    assert "10 jobs, 5 of them finished" in caplog.text and caplog.text.count("exists  ") == 5
    assert f"failed before {fail.name[5:]}" in caplog.text
    assert "rough for pretrain: a few steps were timed" in caplog.text, "the rest is known from the finished jobs"
    fail.unlink()
    lab.run()
    dry_run(lab, caplog)
    assert "10 jobs, 10 of them finished" in caplog.text and "Time:" not in caplog.text
    assert "$ export" not in caplog.text
    predicted = next(i for i in graph.jobs if i.startswith("predict"))
    Records(lab.out).write(predicted, status="")  # as where it was typed by hand
    lab.file.write_text(lab.file.read_text() + "\nenvironment: {OMP_NUM_THREADS: 1, nnssl_logger: none}\n")
    dry_run(lab, caplog)
    assert f"{'to check':13} {predicted}" in caplog.text, "it may not be whole, and is no new work"
    assert "$ export OMP_NUM_THREADS=1\n" in caplog.text and "$ export nnssl_logger=none" in caplog.text


def test_estimates_come_from_finished_jobs(lab):
    graph, records = lab.graph(), Records(lab.out)
    jobs = {j.phase: j for j in graph.jobs.values()}
    trains = [j for j in graph.jobs.values() if j.phase == "train"]
    records.write(trains[0].id, status="done", seconds=120.0)
    found = estimate_jobs(graph, records, [trains[1], jobs["plan"]], "cuda")
    assert found.seconds[trains[1].id] == pytest.approx(120.0) and found.measured == {"train"}


def test_each_end_of_a_job_tells_what_is_left(lab, caplog):
    with caplog.at_level(logging.INFO, logger="nnssl"):
        lab.run()
    ends = [line for line in caplog.text.splitlines() if " done in " in line]
    assert len(ends) == 10 and all(f": {i} of 10" in line for i, line in enumerate(ends, start=1))
    assert ": 10 of 10" in ends[-1] and "left" not in ends[-1]
    assert all(line.endswith(" left") or line.endswith("time unknown yet") for line in ends[:-1])
    assert any("about" in line for line in ends[:-1])


def test_no_gpu_is_said_before_anything_runs(lab, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(NnsslError, match="-device cpu"):
        run_experiment(Options(lab.file, output=lab.out))


def test_a_file_in_the_place_of_the_output_folder(lab):
    lab.out.write_text("mine")
    with pytest.raises(NnsslError, match="--output .*out is a file; a folder is needed"):
        lab.run()
    assert lab.out.read_text() == "mine"
