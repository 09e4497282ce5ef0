"""DICOM as it comes from hospitals: what dcm2niix makes of it, and what is refused although it would make something."""

from __future__ import annotations

import csv
import gzip
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_dataset
from pydicom.uid import CTImageStorage, EnhancedMRImageStorage, ExplicitVRLittleEndian, RLELossless, generate_uid

from nnssl.errors import NnsslError
from nnssl.pretrain.images import add_images, headers

SHAPE, STEP = (20, 40, 44), 2.5  # (z, y, x)
SECRET = "Mueller^Hans"


def volume(seed=0, shape=SHAPE) -> np.ndarray:
    body = np.zeros(shape)
    body[:, 6:-6, 6:-6] = 300
    return (body + np.random.default_rng(seed).normal(0, 30, shape)).astype(np.int16)


def header(kind=CTImageStorage, modality="CT", *, series="", study="", patient="4711") -> pydicom.Dataset:
    d = pydicom.Dataset()
    d.file_meta = pydicom.dataset.FileMetaDataset()
    d.file_meta.MediaStorageSOPClassUID, d.file_meta.TransferSyntaxUID = kind, ExplicitVRLittleEndian
    d.file_meta.MediaStorageSOPInstanceUID = d.SOPInstanceUID = generate_uid()
    d.SOPClassUID, d.Modality, d.ImageType = kind, modality, ["ORIGINAL", "PRIMARY", "AXIAL"]
    d.PatientName, d.PatientID, d.StudyDate, d.StudyTime = SECRET, patient, "20260101", "101010"
    d.SeriesInstanceUID, d.StudyInstanceUID = series or generate_uid(), study or generate_uid()
    d.SamplesPerPixel, d.PhotometricInterpretation = 1, "MONOCHROME2"
    d.Rows, d.Columns = SHAPE[1:]
    d.BitsAllocated = d.BitsStored = 16
    d.HighBit, d.PixelRepresentation = 15, 1
    return d


def series(folder, array=None, *, edit=lambda d, i: None, modality="CT", uid="", study="", names="IM{:04d}", save=True):
    """One file a slice; ``edit(header, i)`` changes it, and leaves it out by returning False."""
    folder.mkdir(parents=True, exist_ok=True)
    array = volume() if array is None else array
    uid, study = uid or generate_uid(), study or generate_uid()
    for i, plane in enumerate(array):
        d = header(modality=modality, series=uid, study=study)
        d.InstanceNumber, d.PixelSpacing, d.SliceThickness = i + 1, [1.5, 1.5], STEP
        d.ImagePositionPatient, d.ImageOrientationPatient = [0, 0, STEP * i], [1, 0, 0, 0, 1, 0]
        d.RescaleSlope, d.RescaleIntercept = 1, 0
        d.Rows, d.Columns = plane.shape
        d.PixelData = plane.tobytes()
        if edit(d, i) is not False:
            d.save_as(folder / names.format(len(array) - i), enforce_file_format=True)
    return folder


def enhanced(file, frames, pixels):
    """A multi-frame file. ``frames``: (place, time point) of each, in the order in which they are stored."""
    d = header(EnhancedMRImageStorage, "MR")
    shared, measures, plane = pydicom.Dataset(), pydicom.Dataset(), pydicom.Dataset()
    measures.PixelSpacing, measures.SliceThickness = [1.5, 1.5], STEP
    plane.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    shared.PixelMeasuresSequence, shared.PlaneOrientationSequence = [measures], [plane]
    d.SharedFunctionalGroupsSequence = [shared]
    groups = []
    for place, time in frames:
        group, position, content = pydicom.Dataset(), pydicom.Dataset(), pydicom.Dataset()
        position.ImagePositionPatient, content.TemporalPositionIndex = [0, 0, STEP * place], time
        group.PlanePositionSequence, group.FrameContentSequence = [position], [content]
        groups.append(group)
    d.PerFrameFunctionalGroupsSequence, d.NumberOfFrames = groups, len(groups)
    d.PixelData = np.ascontiguousarray(pixels).tobytes()
    file.parent.mkdir(parents=True, exist_ok=True)
    d.save_as(file, enforce_file_format=True)
    return file


@pytest.fixture
def place(nnunet_env, tmp_path, monkeypatch) -> SimpleNamespace:
    monkeypatch.chdir(tmp_path)
    export, dataset = tmp_path / "export", nnunet_env.raw / "Dataset500_Scans"
    export.mkdir()

    def add(*folders, **options):
        return add_images(500, list(folders) or [export], **{"name": "Scans", "n_processes": 0, **options})

    def read(case):
        return sitk.DICOMOrient(sitk.ReadImage(str(dataset / "imagesTr" / f"{case}_0000.nii.gz")), "LPS")

    def voxels():
        return [sitk.GetArrayFromImage(read(f.name[:-12])) for f in sorted((dataset / "imagesTr").iterdir())]

    return SimpleNamespace(
        export=export, dataset=dataset, add=add, read=read, voxels=voxels, tmp=tmp_path, env=nnunet_env
    )


def is_volume(place, case, array):
    image = place.read(case)
    np.testing.assert_allclose(sitk.GetArrayFromImage(image), array, rtol=1e-6)
    assert image.GetSpacing() == pytest.approx((1.5, 1.5, STEP))


def holds(place, *arrays):
    """The cases are these arrays, in any order."""
    found = place.voxels()
    assert len(found) == len(arrays)
    for array in arrays:
        assert any(f.shape == array.shape and np.array_equal(f, array) for f in found)


def only(summary):
    assert len(summary.rejected) == 1
    return summary.rejected[0]


def test_a_slope_for_each_slice(place):
    slopes = [1.0, *np.linspace(1.1e-4, 2.9e-4, 19)]

    def edit(d, i):
        d.RescaleSlope = f"{slopes[i]:.6g}"

    array = np.abs(volume()) + 1
    array[0] = 1
    array[1:, 0, 0] = 900
    series(place.export, array, edit=edit, modality="PT")
    summary = place.add()
    image = place.read("Scans_0001")
    wanted = array * np.array([float(f"{s:.6g}") for s in slopes])[:, None, None]
    is_volume(place, "Scans_0001", wanted.astype(np.float32))
    assert image.GetPixelID() == sitk.sitkFloat32 and summary.rejected == []
    assert sitk.GetArrayFromImage(image)[0].mean() == pytest.approx(1.0)


def test_frames_in_any_order_are_sorted_by_position(place):
    order, array = [*range(0, 20, 2), *range(1, 20, 2)], np.abs(volume())
    enhanced(place.export / "e", [(k, 1) for k in order], array[order])
    assert place.add().added == ["Scans_0001"]
    is_volume(place, "Scans_0001", array)


def test_missing_frames_are_refused_with_the_numbers(place):
    kept = [*range(9), *range(15, 20)]
    enhanced(place.export / "bad", [(k, 1) for k in kept], np.abs(volume())[kept])
    series(place.export / "series", edit=lambda d, i: i not in (7, 8), modality="MR")
    series(place.export / "good", volume(1), modality="MR")
    summary = place.add()
    assert len(summary.added) == 1
    first, second = sorted(summary.rejected, key=lambda r: r.file)
    assert first.reason == second.reason == "slices are missing or unevenly spaced"
    assert first.detail == "6 of 20 slices are missing: 17.5 mm from slice 9 to the next, 2.5 mm elsewhere"
    assert second.detail.startswith("2 of 20 slices are missing: 7.5 mm from slice 7") and second.count == 18


@pytest.mark.parametrize("jitter", [2e-6, 1e-4, 2e-3])
def test_orientations_that_differ_a_little_are_one_volume(place, jitter):
    rng = np.random.default_rng(0)

    def edit(d, i):
        angle = 0.0125 + rng.uniform(-jitter, jitter)
        c, s = np.cos(angle), np.sin(angle)
        d.ImageOrientationPatient = [f"{v:.7f}" for v in (c, s, 0, -s, c, 0)]

    series(place.export, edit=edit)
    summary = place.add()
    assert summary.added == ["Scans_0001"] and summary.rejected == []
    is_volume(place, "Scans_0001", volume())


def same_instance(d, i):
    d.SOPInstanceUID = d.file_meta.MediaStorageSOPInstanceUID = "1.2.3.4"


@pytest.mark.parametrize("uid", ["", "1.2.3"])
def test_one_identifier_on_all_slices_of_two_patients(place, uid):
    series(place.export / "p1", volume(1), edit=same_instance, uid=uid, study=uid)
    series(place.export / "p2", volume(2), edit=same_instance, uid=uid, study=uid)
    summary = place.add()
    assert len(summary.added) == 2 and summary.rejected == []
    holds(place, volume(1), volume(2))


def test_two_patients_in_one_folder_under_one_series(place):
    def other(d, i):
        d.PatientID = "4712"

    series(place.export, volume(1), uid="1.2.3", study="1.2", names="a{}")
    series(place.export, volume(2), uid="1.2.3", study="1.2", names="b{}", edit=other)
    assert len(place.add().added) == 2
    holds(place, volume(1), volume(2))


def test_copies_are_duplicates_by_their_voxels(place):
    series(place.export / "a", volume(1), names="{:02d}")
    shutil.copytree(place.export / "a", place.export / "b")
    (place.export / "key").mkdir()
    for name in ("03", "04"):
        shutil.copy(place.export / "a" / name, place.export / "key" / name)
    shutil.copy(place.export / "a" / "05", place.export / "a" / "05copy")
    summary = place.add()
    assert summary.added == ["Scans_0001"] and {r.reason for r in summary.rejected} == {"duplicate"}
    assert sum(r.count for r in summary.rejected) == 23 and summary.files == 20
    is_volume(place, "Scans_0001", volume(1))


@pytest.mark.parametrize("part", [lambda i: i % 2, lambda i: i // 10])
def test_a_series_spread_over_folders_is_one_volume(place, part):
    series(place.export / "all", names="{:02d}")
    for i, file in enumerate(sorted((place.export / "all").iterdir())):
        (place.export / f"disk{part(i)}").mkdir(exist_ok=True)
        shutil.move(file, place.export / f"disk{part(i)}" / file.name)
    assert place.add().added == ["Scans_0001"]
    is_volume(place, "Scans_0001", volume())


def bare(file, *, meta):
    """Take the preamble away, and with ``meta`` False the file's own header too."""
    if meta:
        file.write_bytes(file.read_bytes()[132:])
        return
    stream = DicomBytesIO()
    stream.is_little_endian = stream.is_implicit_VR = True
    write_dataset(stream, pydicom.Dataset(pydicom.dcmread(file)))
    file.write_bytes(stream.getvalue())


@pytest.mark.parametrize("meta", [True, False])
def test_files_without_preamble_and_ending(place, meta):
    for file in series(place.export).iterdir():
        bare(file, meta=meta)
    summary = place.add()
    assert summary.added == ["Scans_0001"] and summary.rejected == []
    is_volume(place, "Scans_0001", volume())


@pytest.mark.parametrize("how, count", [("reject", 0), ("first", 1), ("split", 2)])
@pytest.mark.parametrize("packed", [False, True])
def test_4d_multi_frame(place, how, count, packed):
    frames = [(k, t) for k in range(20) for t in (2, 1)]
    volumes = {t: np.abs(volume(t)) + 1000 * t for t in (1, 2)}
    file = enhanced(place.export / "e", frames, np.stack([volumes[t][k] for k, t in frames]).astype(np.int16))
    if packed:
        d = pydicom.dcmread(file)
        d.compress(RLELossless)
        d.save_as(file, enforce_file_format=True)
    series(place.export / "good", volume(5), modality="MR")
    summary = place.add(four_d=how)
    holds(place, volume(5), *[volumes[t] for t in (1, 2)][:count])
    if how == "reject":
        assert (only(summary).reason, only(summary).detail) == ("4D (see --four-d)", "2 volumes")


def test_4d_series_over_folders_of_time_points(place):
    for t in (1, 2):

        def edit(d, i, t=t):
            d.TemporalPositionIdentifier = t

        series(place.export / f"t{t}", volume(t), uid="1.2.3", study="1.2", edit=edit, modality="MR")
    with pytest.raises(NnsslError, match="Nothing that can be added"):
        place.add()
    assert len(place.add(four_d="first").added) == 1
    holds(place, volume(1))


def test_headers_that_contradict_each_other(place):
    def edit(d, i):
        d.StudyTime, d.AcquisitionNumber, d.EchoTime = f"1010{i:02d}.5", i, i

    series(place.export, edit=edit)
    assert place.add().added == ["Scans_0001"]
    is_volume(place, "Scans_0001", volume())


def test_compressed_and_turned(place):
    def edit(d, i):
        d.ImageOrientationPatient, d.ImagePositionPatient = [0, 1, 0, 0, 0, -1], [STEP * i, 0, 0]
        d.compress(RLELossless)
        d.Manufacturer, d.MRAcquisitionType = "SIEMENS", "3D"  # dcm2niix would turn it

    series(place.export, edit=edit, modality="MR")
    place.add()
    raw = sitk.ReadImage(str(place.dataset / "imagesTr" / "Scans_0001_0000.nii.gz"))
    assert raw.GetSize() == (44, 40, 20) and raw.GetSpacing() == pytest.approx((1.5, 1.5, STEP))
    direction = np.reshape(raw.GetDirection(), (3, 3))
    np.testing.assert_allclose(np.abs(direction @ np.eye(3)), [[0, 0, 1], [1, 0, 0], [0, 1, 0]], atol=1e-6)


def test_what_is_refused_and_named(place):
    e = place.export
    series(e / "good", volume(1))
    short = series(e / "short") / "IM0007"
    short.write_bytes(short.read_bytes()[:-1000])
    packed = series(e / "packed", volume(3), edit=lambda d, i: d.compress(RLELossless)) / "IM0007"
    packed.write_bytes(packed.read_bytes()[:-1000])
    (e / "noise.dcm").write_bytes(os.urandom(4000))
    (e / "letters").write_bytes(b"\x08\x00\x05\x00CS" + b"x" * 500)

    def seg(d, i):
        d.Modality = "SEG"

    series(e / "seg", np.zeros(SHAPE, np.int16)[:1], edit=seg)
    no = enhanced(e / "frames" / "f", [(k, 1) for k in range(20)], np.abs(volume()))
    d = pydicom.dcmread(no)
    del d.PerFrameFunctionalGroupsSequence
    d.save_as(no)

    def nowhere(d, i):
        del d.ImagePositionPatient

    series(e / "nowhere", edit=nowhere)
    summary = place.add(modality="CT")
    assert len(summary.added) == 1
    by_place = {(os.path.relpath(r.file, e).split(os.sep)[0], r.reason): r for r in summary.rejected}
    unreadable = "DICOM without a readable image (a report, a plan, or damaged)"
    assert {
        ("short", "it is truncated"),
        ("short", "slices are missing or unevenly spaced"),
        ("packed", "it is truncated"),
        ("packed", "slices are missing or unevenly spaced"),
        ("noise.dcm", unreadable),
        ("letters", unreadable),
        ("seg", "a DICOM segmentation"),
        ("frames", "its frames have no positions"),
        ("nowhere", "its slices have no positions"),
    } == set(by_place)
    total = sum(len(files) for _, _, files in os.walk(e))
    assert sum(r.count for r in summary.rejected) + summary.files == total  # every file is accounted for
    with open(summary.report, newline="") as file:
        assert sum(int(row["files"]) for row in csv.DictReader(file)) == total - 20


def test_what_dcm2niix_cannot_convert_is_told_in_its_words(place, monkeypatch):
    series(place.export / "a", volume(1))
    script = place.tmp / "dcm2niix"
    script.write_text("#!/bin/sh\necho 'Error: this vendor is not known'\nexit 3\n")
    script.chmod(0o755)
    monkeypatch.setattr("nnssl.pretrain.images.dcm2niix.dcm2niix_program", lambda: str(script))
    with pytest.raises(NnsslError, match="20  dcm2niix does not convert it as its headers tell"):
        place.add()
    table = next(place.tmp.glob("*.csv")).read_text()
    assert "status 3" in table and "this vendor is not known" in table and not place.dataset.exists()


def test_without_dcm2niix_the_extra_is_named(place, monkeypatch):
    series(place.export / "a")
    monkeypatch.setattr(headers, "dcm2niix_program", lambda: None)
    with pytest.raises(NnsslError, match=r"20 of the files are DICOM.*\[dicom\].*pip install dcm2niix"):
        place.add()
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(NnsslError, match="pip install dcm2niix pydicom"):
        place.add()
    assert not place.dataset.exists()


def test_dcm2niix_of_the_system(monkeypatch):
    monkeypatch.setitem(sys.modules, "dcm2niix", None)
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    assert headers.dcm2niix_program() == "/usr/bin/dcm2niix"


def test_nothing_of_a_patient_is_written(place, monkeypatch, caplog, capfd):
    temporary = place.tmp / "temporary"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    caplog.set_level("INFO")
    series(place.export / SECRET / "4711", volume(1), modality="MR")
    series(
        place.export / SECRET / "uneven",
        volume(2),
        edit=lambda d, i: setattr(d, "StudyTime", f"1010{i:02d}.5"),
        modality="MR",
    )
    order = [(k, t) for k in range(20) for t in (1, 2)]
    enhanced(place.export / SECRET / "e", order, np.abs(np.stack([volume(10 + t)[k] for k, t in order])))
    summary = place.add(modality="MR", four_d="split")
    assert len(summary.added) == 4 and summary.rejected == []
    for folder, folders, files in os.walk(place.env.raw):
        for name in (*folders, *files):
            assert "Mueller" not in name and "4711" not in name
        for name in files:
            content = Path(folder, name).read_bytes()
            content += gzip.decompress(content) if name.endswith(".gz") else b""
            assert b"Mueller" not in content and b"20260101" not in content
    assert list(temporary.iterdir()) == []
    told = caplog.text + "".join(capfd.readouterr())
    assert "Mueller" not in told and "4711" not in told


def test_many_series_at_once_and_again(place):
    for i in range(3):
        series(place.export / str(i), volume(i))
    assert len(place.add(n_processes=2).added) == 3
    again = place.add(n_processes=2)
    assert again.known == 3 and again.added == again.rejected == [] and again.files == 60 and again.report is None
