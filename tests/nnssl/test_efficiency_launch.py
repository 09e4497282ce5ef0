"""What a job's process runs: the ordinary commands, with our trainers found and the user's number of threads kept."""

import multiprocessing
import os
import subprocess
import sys
from importlib import import_module
from types import SimpleNamespace

import pytest

from nnssl.experiments import launch
from nnssl.trainers.discovery import VARIABLE, shim_folder


@pytest.fixture
def command(monkeypatch):
    """Stands in for all commands; returns what it saw."""
    seen = SimpleNamespace(status=0)

    def run():
        seen.argv, seen.cores, seen.trainers = list(sys.argv), multiprocessing.cpu_count(), os.environ.get(VARIABLE)
        return seen.status

    monkeypatch.setitem(sys.modules, "stand_in", SimpleNamespace(run=run))
    for name in launch.COMMANDS:
        monkeypatch.setitem(launch.COMMANDS, name, "stand_in:run")
    monkeypatch.setattr(multiprocessing, "cpu_count", lambda: 64)
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    monkeypatch.setenv(VARIABLE, "")
    return seen


@pytest.mark.parametrize("name", sorted(launch.COMMANDS))
def test_the_commands_exist(name):
    module, _, function = launch.COMMANDS[name].partition(":")
    assert callable(getattr(import_module(module), function))


@pytest.mark.parametrize(("threads", "cores"), [("1", 1), ("3", 3), ("", 64), ("many", 64), ("0", 64)])
def test_training_on_a_cpu_keeps_to_the_threads_of_the_user(command, monkeypatch, threads, cores):
    monkeypatch.setenv("OMP_NUM_THREADS", threads)
    assert launch.main(["nnUNetv2_train", "4", "3d_fullres", "0"]) == 0
    assert command.argv == ["nnUNetv2_train", "4", "3d_fullres", "0"] and command.cores == cores
    assert command.trainers == shim_folder()


def test_exit_status_and_half_written_predictions(command, tmp_path):
    command.status = 3
    assert launch.main(["nnssl_plan", "--list"]) == 3
    (tmp_path / "case_1.nii.gz").write_bytes(b"half")
    launch.main(["nnUNetv2_predict", "-i", "x", "-o", str(tmp_path)])
    assert not (tmp_path / "case_1.nii.gz").exists()


def test_as_a_program():
    run = subprocess.run(
        [sys.executable, "-m", "nnssl.experiments.launch", "nnssl_evaluate", "nothing.json"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 1 and "nothing.json" in run.stderr
