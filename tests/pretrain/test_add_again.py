"""``nnssl_add_images`` called again, interrupted, beside another call, on a full disk, and on datasets that are there."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import SimpleITK as sitk
from exports import image_of, reasons, same, series, volume, write

from nnssl.errors import NnsslError
from nnssl.pretrain.images import dataset
from nnssl.pretrain.images.convert import Converter
from nnssl.pretrain.images.dataset import find_dataset


def test_again_adds_only_what_is_new(place):
    write(place.export / "a.nrrd", volume(1))
    write(place.export / "thin.nrrd", volume(2, (3, 14, 12)))
    place.add()
    stamp = (place.dataset / "imagesTr" / "Scans_0001_0000.nii.gz").stat().st_mtime_ns
    write(place.export / "b.nrrd", volume(3))
    summary = place.add()
    assert summary.added == ["Scans_0002"] and summary.known == 1
    assert reasons(summary, place.export) == {"thin.nrrd": "fewer than 8 slices"}
    assert summary.rejected[0].detail == "as before"
    assert (place.dataset / "imagesTr" / "Scans_0001_0000.nii.gz").stat().st_mtime_ns == stamp
    assert place.add(least_slices=3).added == ["Scans_0003"]  # other options: looked at again
    (place.dataset / "imagesTr" / "Scans_0002_0000.nii.gz").unlink()
    assert place.guess(name=None).added == ["Scans_0004"]  # numbers are not used twice
    assert place.told()["numTraining"] == 3


def test_known_images_are_not_read_again(place, monkeypatch):
    write(place.export / "a.nrrd", volume(1))
    write(place.export / "thin.nrrd", volume(2, (3, 14, 12)))
    place.add()
    monkeypatch.setattr(Converter, "_read", lambda *args: pytest.fail("read again"))
    assert place.add().known == 1


def test_an_interrupted_call_is_continued(place, monkeypatch):
    for i in range(4):
        write(place.export / f"{i}.nrrd", volume(i))
    done = []
    real = Converter._cases

    def stop(self, task):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(task.key)
        return real(self, task)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Converter, "_cases", stop)
        place.add()
    assert place.told()["numTraining"] == 2
    with open(place.dataset / "nnssl_images.jsonl", "a") as file:
        file.write('\n{"key": "half')
    summary = place.add()
    assert summary.known == 2 and summary.added == ["Scans_0003", "Scans_0004"]
    assert place.add().known == 4
    assert len(place.files()) == 4 and not (place.dataset / "imagesTr_tmp").exists()


def test_a_kill_while_a_case_is_put_into_place(place, monkeypatch):
    sitk.WriteImage(sitk.JoinSeries([image_of(volume(s)) for s in (1, 2)]), str(place.export / "four.nii.gz"))
    real, moved = dataset._move, []

    def move(draft, final):
        if moved:
            raise KeyboardInterrupt
        moved.append(final)
        real(draft, final)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(dataset, "_move", move)
        place.add(four_d="split")
    summary = place.add(four_d="split")
    assert summary.added == ["Scans_0002"] and [r.reason for r in summary.rejected] == ["duplicate"]
    for case, seed in (("Scans_0001", 1), ("Scans_0002", 2)):
        same(place, case, volume(seed))


def test_a_case_that_lacks_a_channel_is_named(place):
    write(place.export / "a_t1.nrrd", volume(1))
    write(place.export / "a_t2.nrrd", volume(2))
    channels = {"T1": "_t1", "T2": "_t2"}
    place.guess(channels=channels)
    (place.dataset / "imagesTr" / "Scans_0001_0001.nii.gz").unlink()
    with pytest.raises(NnsslError, match="Scans_0001 has fewer than 2 channels.*Delete its files"):
        place.guess(channels=channels)
    (place.dataset / "imagesTr" / "Scans_0001_0000.nii.gz").unlink()
    assert place.guess(channels=channels).added == ["Scans_0001"]


def test_a_full_disk_says_so_and_nothing_half_is_left(place, monkeypatch):
    write(place.export / "a.nrrd", volume(1))
    monkeypatch.setattr(sitk, "WriteImage", lambda *a, **k: (_ for _ in ()).throw(RuntimeError("cannot write")))
    with monkeypatch.context() as patch, pytest.raises(NnsslError, match="No space left in .*What is added is kept"):
        patch.setattr("shutil.disk_usage", lambda p: SimpleNamespace(free=0))
        place.add()
    with pytest.raises(NnsslError, match="could not be written into .*cannot write"):
        place.add()
    assert place.files() == []


def test_another_call_takes_a_number_meanwhile(place, monkeypatch):
    write(place.export / "a.nrrd", volume(1))
    real = Converter.__call__

    def slow(self, task):
        result = real(self, task)
        (place.dataset / "imagesTr" / "Scans_0001_0000.nii.gz").write_bytes(b"of another call")
        return result

    monkeypatch.setattr(Converter, "__call__", slow)
    assert place.add().added == ["Scans_0002"]
    assert (place.dataset / "imagesTr" / "Scans_0001_0000.nii.gz").read_bytes() == b"of another call"


def test_datasets_that_cannot_take_images(place, tiny_raw_dataset):
    write(place.export / "a.nrrd", volume(1))
    tiny_raw_dataset(501, "Labelled", 1)
    free = tiny_raw_dataset(503, "Png", 1, labelled=False)
    told = json.loads((free / "dataset.json").read_text())
    (free / "dataset.json").write_text(json.dumps({**told, "file_ending": ".png"}))
    for options, words in (
        ({"dataset": 501, "name": None}, "Dataset501_Labelled has labels"),
        ({"dataset": 501, "name": "Other"}, "exists and is called Dataset501_Labelled"),
        ({"dataset": 502, "name": None}, "no dataset 502 yet: name it with --name"),
        ({"dataset": 503, "name": None}, "holds .png files"),
        ({"name": "Hans Mueller"}, "letters, digits"),
        ({"modality": None, "channels": {"T1": "("}}, "is no regular expression"),
        ({"channels": {"T1": "t1"}}, "leave out --modality"),
        ({"four_d": "maybe"}, "--four-d is one of"),
        ({"least_spacing": 2.0}, "--least-spacing is in mm"),
    ):
        with pytest.raises(NnsslError, match=words):
            place.add(**options)
    with pytest.raises(NnsslError, match="nowhere does not exist"):
        place.add("nowhere")
    with pytest.raises(TypeError, match="no argument 'modalty'. Did you mean 'modality'"):
        place.add(modalty="CT")
    assert find_dataset("Dataset007_X", None) == find_dataset(7, "X") == "Dataset007_X"


def test_images_are_added_to_what_the_user_made(place, tiny_raw_dataset):
    folder = tiny_raw_dataset(500, "Scans", 2, labelled=False, modality="CT", prefix="mine")
    (folder / "dataset.json").write_text(json.dumps({**place.told(), "licence": "x"}))
    write(place.export / "a.nrrd", volume(1))
    assert place.guess(name=None).added == ["Scans_0001"]
    told = place.told()
    assert told["numTraining"] == 3 and told["licence"] == "x" and told["channel_names"] == {"0": "CT"}


def test_in_processes_and_again(place):
    for i in range(3):
        series(place.export / str(i), volume(i))
        write(place.export / f"{i}.nrrd", volume(10 + i))
    summary = place.add(n_processes=2)
    assert len(summary.added) == 6 and summary.rejected == []
    (place.export / "bad.nrrd").write_bytes(b"x")
    again = place.add(n_processes=2)
    assert again.known == 6 and again.added == [] and again.files == 33
    assert reasons(again, place.export) == {"bad.nrrd": "it cannot be read"}
