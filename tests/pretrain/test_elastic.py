"""Runs that something starts again: torch's elastic launcher after a killed rank, a scheduler after a lost node."""

import os
import signal
import subprocess
import sys
import textwrap

import pytest
import torch

from nnssl import checkpoint
from nnssl.errors import NnsslError
from nnssl.pretrain import run
from nnssl.pretrain.engine import devices
from nnssl.pretrain.engine.hooks import Hook

COMMON = {"method": "mae", "device": "cpu", "epochs": 3, "iterations": 2, "robustness_every": 0}
OPTIONS = {"workers": 0, "held_out_batches": 1, "picture_every": 0}
pytestmark = pytest.mark.usefixtures("no_drawing")


@pytest.fixture
def dataset(tiny_preprocessed):
    return tiny_preprocessed(901, "Tiny", 6)


def go(**options):
    return run(901, **{**COMMON, "options": OPTIONS, **options})


class Lost(Exception):
    pass


class Lose(Hook):
    """Ends the process as a lost node would, after the second epoch's checkpoint."""

    def after_epoch(self, engine, row):
        if engine.step == 6:
            raise Lost


def weights(path):
    return checkpoint.load(path).weights


def test_auto_continue_starts_continues_and_ends(dataset):
    straight = go(name="straight")
    with pytest.raises(Lost):
        go(name="auto", continue_run="auto", hooks=[Lose()])
    done = go(name="auto", continue_run="auto")
    assert done.finished
    a, b = weights(straight.checkpoint), weights(done.checkpoint)
    assert all(torch.equal(a[k], b[k]) for k in a)
    times = done.checkpoint.stat().st_mtime_ns
    assert go(name="auto", continue_run="auto").checkpoint == done.checkpoint
    assert done.checkpoint.stat().st_mtime_ns == times
    with pytest.raises(NnsslError, match="seed: 0 in the folder, 5 now"):
        go(name="auto", continue_run="auto", seed=5)


def test_what_the_elastic_launcher_starts_again_continues(dataset, monkeypatch):
    with pytest.raises(Lost):
        go(hooks=[Lose()])
    with pytest.raises(NnsslError, match="unfinished. Continue it with --c"):
        go()
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert go().finished


def test_the_command_hands_restarts_to_the_launcher(monkeypatch, capsys):
    import torch.distributed.launcher.api as launcher

    from nnssl.pretrain.cli import main

    seen = []

    def elastic_launch(config, entry):
        seen.append(config)
        return lambda *arguments: seen.append(arguments)

    monkeypatch.setattr(launcher, "elastic_launch", elastic_launch)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    arguments = ["-d", "901", "-m", "mae", "-device", "cpu", "-num_gpus", "2", "--restarts", "3"]
    assert main(arguments) == 0
    assert seen[0].max_restarts == 3 and seen[0].nproc_per_node == 2
    assert seen[1] == ("-m", "nnssl.pretrain.cli", *arguments)
    assert main(arguments[:-4] + ["--restarts", "1"]) == 2
    assert "--auto-continue" in capsys.readouterr().err
    assert main(arguments[:-1] + ["-1"]) == 2
    assert devices.restarted() is False


@pytest.mark.parametrize("count", ["0", "2"])
def test_processes_that_are_started_again_do_not_meet_the_addresses_of_the_dead(monkeypatch, count):
    """The launcher's store may outlive its processes: each start has keys of its own."""
    import torch.distributed as dist

    shared = dist.HashStore()
    seen = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", count)
    monkeypatch.setattr(devices, "rendezvous", lambda url: iter([(shared, 1, 2)]))
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **options: seen.append((backend, options)))
    monkeypatch.setattr(dist, "destroy_process_group", lambda: None)
    with devices.process_group(torch.device("cpu")):
        pass
    ((backend, options),) = seen
    assert backend == "gloo" and (options["rank"], options["world_size"]) == (1, 2)
    options["store"].set("address", "here")
    assert shared.check([f"nnssl_start_{count}/address"])


@pytest.mark.parametrize(("there", "missing"), [({}, "RANK"), ({"RANK": "0"}, "MASTER_ADDR")])
def test_half_of_torchruns_environment_is_refused(monkeypatch, there, missing):
    """As an interactive job of a scheduler leaves it."""
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"WORLD_SIZE": "2", **there}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(NnsslError, match=f"WORLD_SIZE=2 .*{missing} expected.*unset WORLD_SIZE"):
        with devices.process_group(torch.device("cpu")):
            pass


@pytest.mark.parametrize(
    ("launched", "signals", "interrupts", "name"),
    [
        (False, ("SIGINT", "SIGINT"), True, "SIGINT"),
        (False, ("SIGTERM", "SIGINT"), True, "SIGTERM"),
        (False, ("SIGINT", "SIGTERM"), False, "SIGINT"),
        (False, ("SIGHUP", "SIGTERM", "SIGTERM"), False, "SIGHUP"),
        (True, ("SIGINT", "SIGTERM"), True, "SIGINT"),
        (True, ("SIGINT", "SIGINT"), False, "SIGINT"),
        (True, ("SIGTERM", "SIGTERM"), False, "SIGTERM"),
        (True, ("SIGHUP", "SIGTERM"), False, "SIGHUP"),
    ],
)
def test_which_signals_interrupt_a_save(monkeypatch, launched, signals, interrupts, name):
    """In a launcher's processes a second Ctrl-C arrives as SIGTERM, and a scheduler's one signal arrives twice."""
    from nnssl.pretrain.engine.signals import LAUNCHER, StopSignals

    monkeypatch.delenv(LAUNCHER, raising=False)
    if launched:
        monkeypatch.setenv(LAUNCHER, "1")
    seen = False
    with StopSignals() as stop:
        try:
            for s in signals:
                signal.raise_signal(getattr(signal, s))
        except KeyboardInterrupt:
            seen = True
    assert seen == interrupts and stop.received and stop.number == getattr(signal, name)


@pytest.mark.parametrize(("rank", "name", "told"), [("0", "SIGINT", 1), ("1", "SIGINT", 0), ("0", "SIGTERM", 0)])
def test_ctrl_c_is_answered_in_a_terminal(monkeypatch, rank, name, told):
    """Saving takes a while: without a word a person presses again, and loses what was not saved."""
    from nnssl.pretrain.engine import signals

    written = []
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(signals.os, "isatty", lambda number: True)
    monkeypatch.setattr(signals.os, "write", lambda number, text: written.append((number, text)))
    with signals.StopSignals() as stop:
        signal.raise_signal(getattr(signal, name))
    assert stop.received and stop.spoken == ("Ctrl-C" if name == "SIGINT" else "SIGTERM")
    assert len(written) == told and all(n == 2 and b"a checkpoint is saved first" in text for n, text in written)


@pytest.mark.parametrize(
    ("signals", "raised", "status"),
    [
        (("SIGINT", "SIGINT"), [0, 1], 130),
        (("SIGTERM", "SIGTERM", "SIGHUP", "SIGTERM"), [0], 143),
        (("SIGHUP", "SIGTERM", "SIGINT"), [0, 2], 129),
    ],
)
def test_the_launcher_hears_a_signal_once_and_each_interrupt(monkeypatch, signals, raised, status):
    import torch.distributed.launcher.api as launcher
    from torch.distributed.elastic.multiprocessing import SignalException

    heard = []

    def elastic_launch(config, entry):
        def start(*arguments):
            last = None
            for i, name in enumerate(signals):
                try:
                    signal.raise_signal(getattr(signal, name))
                except SignalException as error:
                    heard.append(i)
                    last = error
            raise last

        return start

    monkeypatch.setattr(launcher, "elastic_launch", elastic_launch)
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    assert devices.launch(["-d", "901"], 2) == status
    assert heard == raised
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == before


def test_a_launcher_under_nohup_does_not_hear_sighup(monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with devices._passed_on([]):
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)


SCRIPT = textwrap.dedent("""
    import os, signal, sys
    from nnssl.pretrain import run
    from nnssl.pretrain.engine.hooks import Hook

    class Kill(Hook):
        def after_epoch(self, engine, row):
            first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
            if engine.step == 6 and first and os.environ["RANK"] == sys.argv[2]:
                os.kill(os.getpid(), signal.SIGKILL)

    if __name__ == "__main__":
        run(901, method="mae", device="cpu", epochs=4, iterations=2, name=sys.argv[1], hooks=[Kill()], robustness_every=0,
            options={"workers": 0, "held_out_batches": 1, "picture_every": 0})
""")


@pytest.mark.slow
def test_a_killed_rank_is_started_again_and_the_run_ends_as_if_nothing_had_been(dataset, tmp_path):
    """Two gloo processes; rank 1, then rank 0, is killed after six of eight steps, the checkpoint being of the fourth."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--rdzv_backend=c10d"]
    launcher += ["--rdzv_endpoint=localhost:0", "--max_restarts=1"]
    results = dataset.parent.parent / "nnUNet_results" / "Dataset901_Tiny"
    files = {}
    for name, killed in (("straight", "none"), ("killed1", "1"), ("killed0", "0")):
        out = subprocess.run([*launcher, script, name, killed], capture_output=True, text=True)
        assert out.returncode == 0, out.stderr[-8000:]
        assert ("SIGKILL" in out.stderr or "-9" in out.stderr) == (killed != "none"), out.stderr[-8000:]
        folder = results / f"nnsslMae_{name}__nnUNetPlans__3d_fullres"
        files[name] = weights(folder / "checkpoint_final.pth")
        events = (folder / "metrics.jsonl").read_text()
        assert ('"event": "continue"' in events) == (killed != "none")
    for name in ("killed1", "killed0"):
        for key, value in files["straight"].items():
            assert torch.equal(value, files[name][key]), (name, key)


@pytest.mark.slow
def test_a_scheduler_that_kills_and_starts_again(dataset, tmp_path):
    """``--auto-continue`` as in examples/slurm: SIGTERM, then the same command again."""
    command = [
        sys.executable,
        "-m",
        "nnssl.pretrain.cli",
        "-d",
        "901",
        "-m",
        "mae",
        "-device",
        "cpu",
        "--auto-continue",
    ]
    command += ["--epochs", "3", "--iterations", "40", "-o", "workers=0", "picture_every=0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    for line in process.stdout:
        if line.startswith("epoch 1/3"):
            process.send_signal(signal.SIGTERM)
            break
    rest = process.stdout.read()
    assert process.wait() == 143, rest
    out = subprocess.run(command, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    assert "Continuing after step" in out.stdout
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 0 and "finished" in again.stdout
