"""What machines do to a run: each fault ends in a clear message, and a second start continues to the same weights."""

import errno
import os
import signal
import time

import pytest
import torch

from nnssl import checkpoint
from nnssl.errors import NnsslError
from nnssl.plans import load_plan
from nnssl.pretrain.engine import folder as run_folder
from nnssl.pretrain.engine.logs import RunLog
from nnssl.results import output_folder

OPTIONS = {"workers": 0, "held_out_batches": 1, "picture_every": 0}
pytestmark = pytest.mark.usefixtures("no_drawing")


# ---- disks -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.ENOSPC, "Free space"),
        (errno.EROFS, "Make it writable"),
        (errno.ESTALE, "See to the file system"),
        (errno.EFBIG, r"Lift the limit on the size of files .ulimit -f unlimited."),
    ],
)
def test_a_results_folder_that_fails_in_the_middle(small_target, monkeypatch, number, advice, go, same_weights):
    straight = go(name="straight")
    event = RunLog.event

    def fail(self, kind, **values):
        if values.get("step") == 4:
            raise OSError(number, os.strerror(number))
        event(self, kind, **values)

    with monkeypatch.context() as patch:
        patch.setattr(RunLog, "event", fail)
        with pytest.raises(NnsslError, match=f"{os.strerror(number)} in .* {advice}, then continue with --c"):
            go(name="broken")
    assert same_weights(straight, go(name="broken", continue_run=True))


def test_a_file_in_the_place_of_the_runs_folder(small_target, nnunet_env, go):
    folder = output_folder(load_plan(901), "Mae", [901], "taken")
    folder.parent.mkdir()
    folder.write_text("a file")
    with pytest.raises(
        NnsslError, match="File exists. Something else is in its place: move that away, or give .*--name"
    ):
        go(name="taken")
    assert folder.read_text() == "a file"


def test_a_results_folder_that_cannot_be_written(small_target, nnunet_env, monkeypatch, go):
    def read_only(*args, **kwargs):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    with monkeypatch.context() as patch:
        patch.setattr(run_folder, "open", read_only, raising=False)
        with pytest.raises(NnsslError, match="Read-only file system. nnUNet_results must be writable"):
            go()
    if os.geteuid() != 0:
        nnunet_env.results.chmod(0o555)
        with pytest.raises(NnsslError, match="nnUNet_results must be writable"):
            go()
        nnunet_env.results.chmod(0o755)
    assert go().finished


def test_a_checkpoint_folder_that_becomes_read_only(small_target, monkeypatch, go, latest):
    save, calls = checkpoint.save, []

    def fail(path, payload):
        calls.append(1)
        if len(calls) == 2:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        save(path, payload)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", fail)
        with pytest.raises(NnsslError, match="cannot save .*Permission denied. The checkpoint saved before is whole"):
            go()
    assert checkpoint.load(latest()).training["step"] == 2
    assert go(continue_run=True).finished


# ---- two runs --------------------------------------------------------------------------------------------------------------


def test_a_second_run_for_the_same_folder_is_refused_while_the_first_lives(small_target, go, after_two):
    refused = []

    def again(engine):
        with pytest.raises(NnsslError, match=rf"in use by another process \(process {os.getpid()} on .*\).*--name"):
            go(continue_run="auto")
        refused.append(1)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        go(hooks=[after_two(again)])
    assert refused
    assert go(continue_run="auto").finished


def test_a_file_system_without_locks(small_target, monkeypatch, caplog, go):
    import fcntl

    def flock(handle, how):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", flock)
    assert go().finished
    assert "has no locks" in caplog.text


# ---- pictures, signals, memory ---------------------------------------------------------------------------------------------


def test_pictures_that_cannot_be_written_end_no_run(small_target, monkeypatch, caplog, go, same_weights):
    from nnssl.pretrain.engine import drawing

    def fail(*args, **options):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    straight = go(name="straight", options={**OPTIONS, "picture_every": 0})
    monkeypatch.setattr(drawing, "save_picture", fail)
    monkeypatch.setattr(drawing, "plot_progress", fail)
    other = go(name="blind", options={**OPTIONS, "picture_every": 1})
    assert other.finished and same_weights(straight, other)
    assert "progress.png could not be written" in caplog.text and "views_epoch_0003.png could not" in caplog.text


def test_a_second_interrupt_ends_a_save_and_leaves_the_checkpoint_before(small_target, monkeypatch, capsys, go, latest):
    from nnssl.pretrain.cli import main

    arguments = [
        "-d",
        "901",
        "-m",
        "mae",
        "-device",
        "cpu",
        "--epochs",
        "3",
        "--iterations",
        "2",
        "--robustness-every",
        "0",
    ]
    arguments += ["-o", "workers=0", "picture_every=0", "held_out_batches=1"]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    plain, calls = checkpoint.save, []

    def interrupted(path, payload):
        calls.append(path)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGINT)  # asks to save and end
        if len(calls) == 3:
            real = torch.save

            def slow(content, file):
                os.kill(os.getpid(), signal.SIGINT)
                real(content, file)

            patch.setattr(torch, "save", slow)
        plain(path, payload)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", interrupted)
        assert main(arguments) == 130
    told = capsys.readouterr()
    assert told.err == "Stopped.\n"
    assert (
        "Interrupted at step 6. The last checkpoint is of step 4. The same command with --c goes on from there."
        in told.out
    )
    assert checkpoint.load(latest()).training["step"] == 4
    assert not list(latest().parent.glob(".*.tmp"))


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGHUP", 129), ("SIGINT", 130)])
def test_commands_end_alike(name, code, capsys):
    from nnssl.command import run_command

    signal.signal(signal.SIGINT, signal.default_int_handler)
    before = signal.getsignal(signal.SIGTERM)

    def body():
        os.kill(os.getpid(), getattr(signal, name))
        time.sleep(5)

    assert run_command(body) == code
    assert capsys.readouterr().err == "Stopped.\n" and signal.getsignal(signal.SIGTERM) is before


def test_what_dead_writers_left_is_removed(small_target, go):
    result = go(name="first", epochs=1)
    left = result.folder / ".checkpoint_latest.pth.abc123.tmp"
    left.write_bytes(b"half")
    (result.folder / "checkpoint_final.pth").unlink()
    assert go(name="first", epochs=1, continue_run=True).finished and not left.exists()


def test_a_batch_that_cannot_be_handed_over_ends_the_run(small_target, monkeypatch, go):
    """As in a container with 64 MB of shared memory: Python's queue drops the batch, and the run would wait for ever."""
    import torch.multiprocessing.reductions as reductions

    main = os.getpid()
    real = reductions.reduce_storage

    def no_space(storage):
        if os.getpid() != main:
            raise RuntimeError(
                "unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)"
            )
        return real(storage)

    from multiprocessing.reduction import ForkingPickler

    for kind in (torch.UntypedStorage, torch.FloatStorage):
        monkeypatch.setitem(ForkingPickler._extra_reducers, kind, no_space)
    with pytest.raises(NnsslError, match=r"Shared memory ran out.*--shm-size.*-o workers=0"):
        go(options={**OPTIONS, "workers": 1})


def test_memory_that_runs_out_on_a_processor(small_target, monkeypatch, go):
    """torch says so in an error of no kind of its own."""
    with pytest.raises(RuntimeError, match="can't allocate memory") as real:
        torch.empty(1 << 60)

    from nnssl.pretrain.engine.stepping import Stepper

    def fail(*args, **options):
        raise real.value

    with monkeypatch.context() as patch:
        patch.setattr(Stepper, "step", fail)
        with pytest.raises(NnsslError, match="out of memory with 2 crops of 8x8x8 voxels a step. Lower -o batch_size"):
            go()
    assert go(continue_run=True).finished


def test_weights_that_are_not_finite_after_the_last_step(small_target, monkeypatch, go, same_weights):
    from nnssl.pretrain.engine.loop import NonFiniteError
    from nnssl.pretrain.engine.stepping import Stepper

    step = Stepper.step

    def spoil(self, batch, number, *args, **options):
        out = step(self, batch, number, *args, **options)
        if number == 5:
            with torch.no_grad():
                next(self.method.network.parameters()).fill_(float("nan"))
        return out

    with monkeypatch.context() as patch:
        patch.setattr(Stepper, "step", spoil)
        with pytest.raises(NonFiniteError, match="step 5: a weight after it is not finite. Cases of the batch: case_0"):
            go(name="broken")
    assert same_weights(go(name="straight"), go(name="broken", continue_run=True))
