"""Jobs through submitit: with a stand-in for it, and, where it is installed, with its own local cluster."""

import sys
from types import SimpleNamespace

import pytest

from nnssl.errors import NnsslError
from nnssl.experiments import executor
from nnssl.experiments.executor import run_jobs
from nnssl.experiments.jobs import Job
from nnssl.experiments.records import Records
from nnssl.experiments.slurm import SlurmBackend, run_command_line


@pytest.fixture
def cluster(monkeypatch):
    """A cluster that runs what is submitted at once; ``held`` jobs are only queued."""
    monkeypatch.setattr(executor, "POLL_SECONDS", 0.01)
    seen = SimpleNamespace(sent=[], parameters=[], found=[], held=set())

    class Submitted:
        def __init__(self, folder=None, job_id=None, value=0):
            self.job_id, self.value = job_id, value
            if folder is not None:
                seen.found.append(job_id)

        def done(self):
            return True

        def result(self):
            if isinstance(self.value, Exception):
                raise self.value
            return self.value

    class AutoExecutor:
        def __init__(self, folder, cluster):
            assert cluster == "slurm"

        def update_parameters(self, **parameters):
            if "partition" in parameters:
                raise NameError("partition is unknown")
            seen.parameters.append(parameters)

        def submit(self, function, command, environment, log):
            seen.sent.append(command)
            value = RuntimeError("node lost") if seen.held else function(command, environment, log)
            return Submitted(job_id=str(100 + len(seen.sent)), value=value)

    monkeypatch.setitem(sys.modules, "submitit", SimpleNamespace(AutoExecutor=AutoExecutor, SlurmJob=Submitted))
    return seen


def job(name, code, *needs, **options):
    return Job(name, "train", ("-c", code), needs, recorded=True, **options)


def test_jobs_are_submitted_once_their_needs_are_finished(cluster, tmp_path):
    records = Records(tmp_path)
    backend = SlurmBackend(records, {"slurm_partition": "gpu"}, {"HELLO": "you"}, launcher=[sys.executable, "-S"])
    jobs = [
        job("a", "import os; print('hi', os.environ['HELLO'])", gpu=True),
        job("b", "raise SystemExit(2)", "a"),
        job("c", "", "b"),
    ]
    outcome = run_jobs(jobs, records, backend, slots=9)
    assert outcome.done == ["a"] and list(outcome.failed) == ["b"] and outcome.blocked == {"c": "b"}
    assert records.last_line("a") == "hi you" and len(cluster.sent) == 2
    assert cluster.parameters[0] == {"name": "a", "timeout_min": 1440, "slurm_partition": "gpu", "gpus_per_node": 1}
    assert "gpus_per_node" not in cluster.parameters[1], "a job that needs no GPU gets none"


def test_a_job_that_an_earlier_start_submitted_is_waited_for(cluster, tmp_path):
    records = Records(tmp_path)
    records.write("a", status="running", slurm_id="77")
    outcome = run_jobs([job("a", "")], records, SlurmBackend(records, launcher=[sys.executable]))
    assert outcome.done == ["a"] and cluster.found == ["77"] and not cluster.sent
    records.write("b", status="failed", slurm_id="78")
    run_jobs([job("b", "")], records, SlurmBackend(records, launcher=[sys.executable, "-S"]))
    assert len(cluster.sent) == 1, "a failed one is sent again"


def test_a_lost_node_is_a_failed_job(cluster, tmp_path):
    cluster.held.add("all")
    records = Records(tmp_path)
    assert list(run_jobs([job("a", "")], records, SlurmBackend(records)).failed) == ["a"]


def test_wrong_parameters_and_a_missing_submitit_are_told(cluster, tmp_path, monkeypatch):
    records = Records(tmp_path)
    with pytest.raises(NnsslError, match="submitit refuses: partition is unknown"):
        run_jobs([job("a", "")], records, SlurmBackend(records, {"partition": "gpu"}))
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(NnsslError, match=r"pip install 'nnssl\[slurm\]'"):
        SlurmBackend(records)


def test_what_runs_on_the_node_returns_the_exit_status(tmp_path):
    log = tmp_path / "a.log"
    assert run_command_line([sys.executable, "-S", "-c", "print('x'); raise SystemExit(5)"], {}, str(log)) == 5
    assert log.read_text().splitlines()[-1] == "x"


@pytest.mark.slow
def test_with_submitit_itself(tmp_path):
    """Its local cluster runs the same code without Slurm."""
    pytest.importorskip("submitit")
    records = Records(tmp_path)
    backend = SlurmBackend(records, {"timeout_min": 5}, cluster="local", launcher=[sys.executable, "-S"])
    outcome = run_jobs([job("a", "print('hello')"), job("b", "raise SystemExit(2)")], records, backend, slots=2)
    assert outcome.done == ["a"] and list(outcome.failed) == ["b"] and records.last_line("a") == "hello"
