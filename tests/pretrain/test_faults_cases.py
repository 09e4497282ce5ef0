"""Images that change, go or have odd names and times, and processes that die: a run says so, and goes on from there."""

import os
import signal
import subprocess
import sys
import time

import pytest
import SimpleITK as sitk

from nnssl.errors import NnsslError
from nnssl.paths import preprocessed_folder
from nnssl.plans import load_plan
from nnssl.pretrain import preprocess
from nnssl.results import output_folder

OPTIONS = {"workers": 0, "held_out_batches": 1, "picture_every": 0}
pytestmark = pytest.mark.usefixtures("no_drawing")


# ---- cases -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 1])
def test_a_case_deleted_during_the_run(free, workers, go, same_weights, after_two):
    """Of our own folder: the second start makes it anew and goes on."""
    options = {"options": {**OPTIONS, "workers": workers}, "iterations": 4}
    straight = go(902, name="straight", **options)

    def delete(engine):
        for ref in engine.spec.case_set.train:
            (ref.folder / f"{ref.name}.b2nd").unlink()

    with pytest.raises(NnsslError, match="is gone: .* does not exist. Start again, and it is made anew"):
        go(902, name="broken", hooks=[after_two(delete)], **options)
    assert same_weights(straight, go(902, name="broken", continue_run=True, **options))


def test_a_case_of_nnunets_own_folder_deleted_during_the_run(small_target, go, after_two):
    """It is nnU-Net's to make again; until then the run is told what is missing."""

    def delete(engine):
        ref = engine.spec.case_set.train[0]
        (ref.folder / f"{ref.name}.b2nd").rename(ref.folder.parent / "elsewhere")

    with pytest.raises(NnsslError, match="Preprocess the dataset again"):
        go(iterations=8, hooks=[after_two(delete)])
    with pytest.raises(
        NnsslError, match=r"with other images than there are now:\n  - Dataset901_Tiny/case_00\d is gone\n"
    ):
        go(iterations=8, continue_run=True)
    elsewhere = next(p for p in load_folder().parent.iterdir() if p.name == "elsewhere")
    names = {p.stem for p in load_folder().glob("*.pkl")} - {p.stem for p in load_folder().glob("*.b2nd")}
    elsewhere.rename(load_folder() / f"{names.pop()}.b2nd")
    assert go(iterations=8, continue_run=True).finished


def interrupted(source, go, after_two):
    def stop(engine):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        go(source, hooks=[after_two(stop)])


def test_an_image_whose_content_changed_between_two_starts(free, go, after_two):
    interrupted(902, go, after_two)
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


def test_a_case_of_nnunets_that_was_preprocessed_anew_from_another_image(small_target, go, after_two):
    interrupted(901, go, after_two)
    one, other = sorted(f for f in load_folder().glob("*.b2nd") if "_seg" not in f.name)[:2]
    one.write_bytes(other.read_bytes())
    with pytest.raises(NnsslError, match=f"  - Dataset901_Tiny/{one.stem} has another content"):
        go(continue_run=True)


def test_what_the_message_on_a_bad_image_advises_works(small_target, tmp_path, go, same_weights):
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
    plan = load_plan(901)
    return preprocessed_folder() / plan.dataset_name / plan.data_identifier


def test_a_loader_process_killed_during_the_run(small_target, go, same_weights, after_two):
    import multiprocessing

    options = {"options": {**OPTIONS, "workers": 1}, "iterations": 8}
    straight = go(name="straight", **options)

    def kill(engine):
        children = multiprocessing.active_children()
        assert children, "the loader's process had ended before it was killed"
        for process in children:
            os.kill(process.pid, signal.SIGKILL)

    with pytest.raises(NnsslError, match=r"A loader process was killed \(SIGKILL\).*lower -o workers"):
        go(name="broken", hooks=[after_two(kill)], **options)
    assert same_weights(straight, go(name="broken", continue_run=True, **options))


# ---- clocks and names ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("moment", [1, 4_000_000_000])
def test_images_from_before_and_after_this_time(free, nnunet_env, moment, go):
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


def test_a_clock_that_was_set_back(free, monkeypatch, go):
    """The files of the first start are of the future."""
    first = preprocess(902, target=901, processes=1)
    (own,) = first.folders
    later = time.time() + 10**7
    for path in [own, *own.iterdir(), *own.parent.glob("*_index.jsonl"), *own.parent.glob("*_manifest.json")]:
        os.utime(path, (later, later))
    assert preprocess(902, target=901, processes=1) == first
    assert go(902, epochs=1).finished


NAMES = ["mit Leerzeichen", "Größe 空", 'it\'s "quoted" & $HOME;', "x" * 240, "%s {0} [a-z]*"]


def test_odd_case_names_and_folders(small_target, free, nnunet_env, monkeypatch, tmp_path, go):
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


def test_names_that_are_too_long(small_target, nnunet_env, monkeypatch, go):
    with pytest.raises(NnsslError, match="file systems allow 255: .*Choose a shorter --name"):
        go(name="n" * 250)
    plan = load_plan(901)
    many = output_folder(plan, "Mae", list(range(500, 600)))
    assert len(os.fsencode(many.name)) < 255 and "_d500to599n100x" in many.name
    assert many != output_folder(plan, "Mae", [*range(500, 599), 601])
    assert output_folder(plan, "Mae", [500, 502]).name.startswith("nnsslMae_d500_d502__")


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
def test_a_name_that_is_no_text(free, go):
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
