"""What machines do to a run: each fault ends in a clear message, and a second start continues to the same weights."""

import errno
import os
import signal
import subprocess
import sys
import time

import pytest
import SimpleITK as sitk
import torch

from nnssl import checkpoint
from nnssl.errors import NnsslError
from nnssl.plans import load_plan
from nnssl.pretrain import preprocess, run
from nnssl.pretrain.engine import folder as run_folder
from nnssl.pretrain.engine.hooks import Hook
from nnssl.pretrain.engine.logs import RunLog
from nnssl.results import output_folder

COMMON = {"method": "mae", "device": "cpu", "epochs": 3, "iterations": 2, "processes": 1, "robustness_every": 0}
OPTIONS = {"workers": 0, "held_out_batches": 1, "picture_every": 0}
SMALL = {"shape": (12, 16, 12), "plan_options": {"patch": (8, 8, 8)}}


pytestmark = pytest.mark.usefixtures("no_drawing")


@pytest.fixture
def target(tiny_preprocessed):
    tiny_preprocessed(901, "Tiny", 5, **SMALL)


@pytest.fixture
def free(target, tiny_raw_dataset):
    """imagesTr of an unlabelled dataset beside the target."""
    return tiny_raw_dataset(902, "Free", 6, labelled=False, seed=1, shape=(12, 16, 12)) / "imagesTr"


def go(source=901, **options):
    return run(source, **{**COMMON, "options": OPTIONS, "target": 901, **options})


def same_weights(a, b):
    x, y = (checkpoint.load(r.checkpoint).weights for r in (a, b))
    return a.folder != b.folder and all(torch.equal(x[k], y[k]) for k in x)


class After(Hook):
    """Does something once, after the second epoch."""

    def __init__(self, what):
        self.what = what

    def after_epoch(self, engine, row):
        if row["epoch"] == 2:
            self.what(engine)


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
def test_a_results_folder_that_fails_in_the_middle(target, monkeypatch, number, advice):
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


def test_a_file_in_the_place_of_the_runs_folder(target, nnunet_env):
    folder = output_folder(load_plan(901), "Mae", [901], "taken")
    folder.parent.mkdir()
    folder.write_text("a file")
    with pytest.raises(
        NnsslError, match="File exists. Something else is in its place: move that away, or give .*--name"
    ):
        go(name="taken")
    assert folder.read_text() == "a file"


@pytest.mark.parametrize("content", [b"", b'{"a": ', b"[]", b"\xff\xfe\x00"])
def test_a_damaged_list_of_the_images_of_a_run(stopped, content):
    (stopped / "images.json").write_bytes(content)
    with pytest.raises(NnsslError, match="images.json cannot be read: .*Remove it, and the images are not compared"):
        go(name="broken", continue_run=True)
    (stopped / "images.json").unlink()
    assert same_weights(go(name="straight"), go(name="broken", continue_run=True))
    assert (stopped / "images.json").is_file()


def test_a_results_folder_that_cannot_be_written(target, nnunet_env, monkeypatch):
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


def test_a_checkpoint_folder_that_becomes_read_only(target, monkeypatch):
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
    assert checkpoint.load(next(iter_latest())).training["step"] == 2
    assert go(continue_run=True).finished


def iter_latest():
    from nnssl.paths import results_folder

    return results_folder().glob("*/*/checkpoint_latest.pth")


# ---- cases -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 1])
def test_a_case_deleted_during_the_run(free, workers):
    """Of our own folder: the second start makes it anew and goes on."""
    options = {"options": {**OPTIONS, "workers": workers}, "iterations": 4}
    straight = go(902, name="straight", **options)

    def delete(engine):
        for ref in engine.spec.case_set.train:
            (ref.folder / f"{ref.name}.b2nd").unlink()

    with pytest.raises(NnsslError, match="is gone: .* does not exist. Start again, and it is made anew"):
        go(902, name="broken", hooks=[After(delete)], **options)
    assert same_weights(straight, go(902, name="broken", continue_run=True, **options))


def test_a_case_of_nnunets_own_folder_deleted_during_the_run(target):
    """It is nnU-Net's to make again; until then the run is told what is missing."""

    def delete(engine):
        ref = engine.spec.case_set.train[0]
        (ref.folder / f"{ref.name}.b2nd").rename(ref.folder.parent / "elsewhere")

    with pytest.raises(NnsslError, match="Preprocess the dataset again"):
        go(iterations=8, hooks=[After(delete)])
    with pytest.raises(
        NnsslError, match=r"with other images than there are now:\n  - Dataset901_Tiny/case_00\d is gone\n"
    ):
        go(iterations=8, continue_run=True)
    elsewhere = next(p for p in load_folder().parent.iterdir() if p.name == "elsewhere")
    names = {p.stem for p in load_folder().glob("*.pkl")} - {p.stem for p in load_folder().glob("*.b2nd")}
    elsewhere.rename(load_folder() / f"{names.pop()}.b2nd")
    assert go(iterations=8, continue_run=True).finished


def interrupted(source):
    def stop(engine):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        go(source, hooks=[After(stop)])


def test_an_image_whose_content_changed_between_two_starts(free):
    interrupted(902)
    file = free / "case_002_0000.nii.gz"
    before, image = file.read_bytes(), sitk.ReadImage(str(file))
    sitk.WriteImage(
        image + 3 * sitk.Cast(sitk.GridSource(image.GetPixelID(), image.GetSize()), image.GetPixelID()), str(file)
    )
    with pytest.raises(NnsslError) as error:
        go(902, continue_run=True)
    text = str(error.value)
    assert "now:\n  - Dataset902_Free/case_002 has another content\nPut them back as they were" in text
    assert "option" not in text and "configuration" not in text and "case_001" not in text
    with pytest.raises(NnsslError, match="case_002 has another content\nPut them back as they were and give --c"):
        go(902)
    file.write_bytes(before)
    os.link(file, free / "case_9_0000.nii.gz")
    with pytest.raises(NnsslError, match="  - Dataset902_Free/case_9 came\n.*--exclude"):
        go(902, continue_run=True)
    (free / "case_9_0000.nii.gz").unlink()
    assert go(902, continue_run=True).finished


def test_a_case_of_nnunets_that_was_preprocessed_anew_from_another_image(target):
    interrupted(901)
    one, other = sorted(f for f in load_folder().glob("*.b2nd") if "_seg" not in f.name)[:2]
    one.write_bytes(other.read_bytes())
    with pytest.raises(NnsslError, match=f"  - Dataset901_Tiny/{one.stem} has another content"):
        go(continue_run=True)


def test_what_the_message_on_a_bad_image_advises_works(target, tmp_path):
    """Repair it, or leave it out: the same command starts in the same folder, as nothing was saved there."""
    import blosc2

    file = sorted(f for f in load_folder().glob("*.b2nd") if "_seg" not in f.name)[0]
    content, voxels = file.read_bytes(), blosc2.open(str(file))[:]
    file.unlink()
    blosc2.asarray(voxels * float("nan"), urlpath=str(file))
    left_out = tmp_path / "left_out.txt"
    left_out.write_text(f"{file.stem}\n")
    for name in ("repaired", "left_out"):
        with pytest.raises(
            NnsslError, match=f"{file.stem} .*NaN or infinite voxels.*--exclude, or preprocess a repaired"
        ):
            go(name=name, iterations=8)
    assert go(name="left_out", iterations=8, exclude=left_out).finished
    file.write_bytes(content)
    assert same_weights(go(name="straight", iterations=8), go(name="repaired", iterations=8))


def load_folder():
    from nnssl.paths import preprocessed_folder

    plan = load_plan(901)
    return preprocessed_folder() / plan.dataset_name / plan.data_identifier


def test_a_loader_process_killed_during_the_run(target):
    import multiprocessing

    options = {"options": {**OPTIONS, "workers": 1}, "iterations": 8}
    straight = go(name="straight", **options)

    def kill(engine):
        children = multiprocessing.active_children()
        assert children, "the loader's process had ended before it was killed"
        for process in children:
            os.kill(process.pid, signal.SIGKILL)

    with pytest.raises(NnsslError, match=r"A loader process was killed \(SIGKILL\).*lower -o workers"):
        go(name="broken", hooks=[After(kill)], **options)
    assert same_weights(straight, go(name="broken", continue_run=True, **options))


# ---- two runs --------------------------------------------------------------------------------------------------------------


def test_a_second_run_for_the_same_folder_is_refused_while_the_first_lives(target):
    refused = []

    def again(engine):
        with pytest.raises(NnsslError, match=rf"in use by another process \(process {os.getpid()} on .*\).*--name"):
            go(continue_run="auto")
        refused.append(1)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        go(hooks=[After(again)])
    assert refused
    assert go(continue_run="auto").finished


def test_a_file_system_without_locks(target, monkeypatch, caplog):
    import fcntl

    def flock(handle, how):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", flock)
    assert go().finished
    assert "has no locks" in caplog.text


# ---- clocks and names ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("moment", [1, 4_000_000_000])
def test_images_from_before_and_after_this_time(free, nnunet_env, moment):
    """Files of 1970 and of 2096 are preprocessed once."""
    for file in free.iterdir():
        os.utime(file, (moment, moment))
    first = preprocess(902, target=901, processes=1)
    (own,) = first.folders
    times = {p.name: p.stat().st_mtime_ns for p in own.iterdir()}
    assert first.cases == 6 and len(times) == 18
    assert preprocess(902, target=901, processes=1) == first
    assert go(902, epochs=1).finished
    assert times == {p.name: p.stat().st_mtime_ns for p in own.iterdir()}


def test_a_clock_that_was_set_back(free, monkeypatch):
    """The files of the first start are of the future."""
    first = preprocess(902, target=901, processes=1)
    (own,) = first.folders
    later = time.time() + 10**7
    for path in [own, *own.iterdir(), *own.parent.glob("*_index.jsonl"), *own.parent.glob("*_manifest.json")]:
        os.utime(path, (later, later))
    assert preprocess(902, target=901, processes=1) == first
    assert go(902, epochs=1).finished


NAMES = ["mit Leerzeichen", "Größe 空", 'it\'s "quoted" & $HOME;', "x" * 240, "%s {0} [a-z]*"]


def test_odd_case_names_and_folders(target, free, nnunet_env, monkeypatch, tmp_path):
    for name, file in zip(NAMES, sorted(free.iterdir())):
        file.rename(free / f"{name}_0000.nii.gz")
    odd = tmp_path / "ein Ordner – ö 空" / ("y" * 200)
    odd.mkdir(parents=True)
    for kind in ("raw", "preprocessed", "results"):
        folder = odd / f"nnUNet {kind}"
        getattr(nnunet_env, kind).rename(folder)
        monkeypatch.setenv(f"nnUNet_{kind}", str(folder))
    made = preprocess(902, target=901, processes=1)
    assert made.cases == 6 and not made.bad
    assert preprocess(902, target=901, processes=1) == made
    left_out = odd / "left out.txt"
    left_out.write_text("Größe 空\n", encoding="utf-8")
    result = go(902, name="odd", exclude=left_out)
    assert result.finished and result.checkpoint.is_file()
    assert go(902, name="odd", exclude=left_out, continue_run=True).finished


def test_names_that_are_too_long(target, nnunet_env, monkeypatch):
    with pytest.raises(NnsslError, match="file systems allow 255: .*Choose a shorter --name"):
        go(name="n" * 250)
    plan = load_plan(901)
    many = output_folder(plan, "Mae", list(range(500, 600)))
    assert len(os.fsencode(many.name)) < 255 and "_d500to599n100x" in many.name
    assert many != output_folder(plan, "Mae", [*range(500, 599), 601])
    assert output_folder(plan, "Mae", [500, 502]).name.startswith("nnsslMae_d500_d502__")


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
def test_a_name_that_is_no_text(free):
    """Bytes that are not UTF-8 in a file name: such an image is named in the list of bad ones or used, never a crash."""
    sorted(free.iterdir())[0].rename(free / os.fsdecode(b"caf\xe9_0000.nii.gz"))
    made = preprocess(902, target=901, processes=1, skip_bad=True)
    assert made.cases + len(made.bad) == 6
    assert go(902, skip_bad=True, epochs=1).finished


@pytest.mark.slow
def test_a_killed_preprocessing_continues(free, nnunet_env):
    """SIGKILL to the main process in the middle; its workers end too, and nothing is made twice."""
    command = [sys.executable, "-m", "nnssl.pretrain.cli", "-d", "902", "-t", "901", "--preprocess-only", "-np", "2"]
    process = subprocess.Popen(command, start_new_session=True)
    source = nnunet_env.preprocessed / "Dataset902_Free"
    while process.poll() is None and not [p for p in source.glob("nnssl_*/*[0-9].b2nd") if "_tmp" not in str(p)]:
        time.sleep(0.01)
    process.kill()
    process.wait()
    (own,) = [p for p in source.iterdir() if p.is_dir() and not p.name.endswith("_tmp")]
    time.sleep(1.5)  # the workers notice that their parent is gone
    before = {p.name: p.stat().st_mtime_ns for p in own.glob("*.b2nd")}
    assert preprocess(902, target=901, processes=1).cases == 6
    after = {p.name: p.stat().st_mtime_ns for p in own.glob("*.b2nd")}
    assert {n: after[n] for n in before if not n.endswith("_seg.b2nd")} == {
        n: t for n, t in before.items() if not n.endswith("_seg.b2nd")
    }
    assert not list(source.glob("*_tmp"))


# ---- what --c means --------------------------------------------------------------------------------------------------------


def end(engine):
    raise KeyboardInterrupt


@pytest.fixture
def stopped(target):
    """A run of three epochs that ended in its second, with two checkpoints, and its folder."""
    from nnssl.pretrain.engine.loop import Engine

    save = Engine.save

    def save_and_end(self, **options):
        save(self, **options)
        if self.step == 4:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Engine, "save", save_and_end)
        go(name="broken")
    (latest,) = iter_latest()
    return latest.parent


@pytest.mark.parametrize("damage", [b"", b"garbage" * 999, None], ids=["empty", "garbage", "cut"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(stopped, damage, caplog):
    caplog.set_level("INFO", "nnssl")
    latest = stopped / "checkpoint_latest.pth"
    latest.write_bytes(latest.read_bytes()[:-999] if damage is None else damage)
    again = go(name="broken", continue_run=True)
    assert "Going on from the checkpoint before it" in caplog.text and "Continuing after step 2 of 6" in caplog.text
    assert same_weights(go(name="straight"), again)
    assert (stopped / "checkpoint_damaged.pth").is_file() and not (stopped / "checkpoint_previous.pth").exists()


def test_a_run_that_ended_before_its_first_checkpoint_starts(target, caplog):
    caplog.set_level("INFO", "nnssl")
    with pytest.raises(NnsslError, match="nothing to continue in"):
        go(name="broken", continue_run=True)
    with pytest.raises(NnsslError, match="nothing to continue in"):  # asking has left nothing behind
        go(name="broken", continue_run=True)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        from nnssl.pretrain import api

        patch.setattr(api, "prepare_sources", lambda *args, **options: end(None))
        go(name="broken")
    assert same_weights(go(name="straight"), go(name="broken", continue_run=True))
    assert "starts from the beginning" in caplog.text


def test_the_crop_of_a_continued_run_is_that_of_the_run(stopped, caplog):
    caplog.set_level("INFO", "nnssl")
    go(name="broken", continue_run=True)
    assert "as in the run that is continued" in caplog.text and "as asked for" not in caplog.text


def test_what_was_accepted_and_chosen_at_first_is_kept(free, tmp_path):
    left_out = tmp_path / "left_out.txt"
    left_out.write_text("case_001\n")
    info = free.parent / "dataset.json"
    info.write_text(info.read_text().replace('"MR"', '"T2"'))
    with pytest.raises(NnsslError, match="--allow-mismatch"):
        go(902)
    with pytest.raises(KeyboardInterrupt):
        go(902, allow_mismatch=True, exclude=left_out, hooks=[After(end)])
    assert go(902, continue_run=True).finished


def test_a_checkpoint_of_another_run_is_refused(stopped):
    other = go(name="other", seed=5)
    (stopped / "checkpoint_latest.pth").write_bytes((other.folder / "checkpoint_latest.pth").read_bytes())
    with pytest.raises(NnsslError, match=r"another configuration.*\n.*seed: 5 in the checkpoint, 0 now"):
        go(name="broken", continue_run=True)


@pytest.mark.parametrize("part", ["stepper", "rng", "history", "step", "method"])
def test_a_checkpoint_without_a_part_is_refused_by_the_part(stopped, part):
    file = stopped / "checkpoint_latest.pth"
    content = torch.load(file, weights_only=True)
    del content["nnssl_training"][part]
    torch.save(content, file)
    with pytest.raises(NnsslError, match=f"checkpoint_latest.pth cannot be continued: its part '{part}' is missing"):
        go(name="broken", continue_run=True)


# ---- pictures, signals, memory ---------------------------------------------------------------------------------------------


def test_pictures_that_cannot_be_written_end_no_run(target, monkeypatch, caplog):
    from nnssl.pretrain.engine import drawing, logs

    def fail(*args, **options):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    straight = go(name="straight", options={**OPTIONS, "picture_every": 0})
    monkeypatch.setattr(drawing, "save_picture", fail)
    monkeypatch.setattr(logs.RunLog, "draw", fail)
    other = go(name="blind", options={**OPTIONS, "picture_every": 1})
    assert other.finished and same_weights(straight, other)
    assert "progress.png could not be written" in caplog.text and "views_epoch_0003.png could not" in caplog.text


def test_a_second_interrupt_ends_a_save_and_leaves_the_checkpoint_before(target, monkeypatch, capsys):
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
    (latest,) = iter_latest()
    assert checkpoint.load(latest).training["step"] == 4
    assert not list(latest.parent.glob(".*.tmp"))


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


def test_what_dead_writers_left_is_removed(target):
    result = go(name="first", epochs=1)
    left = result.folder / ".checkpoint_latest.pth.abc123.tmp"
    left.write_bytes(b"half")
    (result.folder / "checkpoint_final.pth").unlink()
    assert go(name="first", epochs=1, continue_run=True).finished and not left.exists()


def test_a_batch_that_cannot_be_handed_over_ends_the_run(target, monkeypatch):
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


def test_memory_that_runs_out_on_a_processor(target, monkeypatch):
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


def test_weights_that_are_not_finite_after_the_last_step(target, monkeypatch):
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
