"""DICOM as it comes from hospitals: what dcm2niix makes of it, and what is refused although it would make something."""

from __future__ import annotations

import csv
import os
import shutil
import sys
from functools import partial

import exports
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from exports import ORIGIN, SPACING, header, holds, image_of, same
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_dataset
from pydicom.uid import EnhancedMRImageStorage, RLELossless

from nnssl.errors import NnsslError
from nnssl.pretrain.images import headers

SHAPE, STEP = (20, 14, 12), SPACING[0]
volume = partial(exports.volume, shape=SHAPE)


def series(folder, array=None, **options):
    return exports.series(folder, volume() if array is None else array, **options)


def enhanced(file, frames, pixels):
    """A multi-frame file. ``frames``: (place, time point) of each, in the order in which they are stored."""
    d = header(EnhancedMRImageStorage, "MR", shape=SHAPE)
    shared, measures, plane = pydicom.Dataset(), pydicom.Dataset(), pydicom.Dataset()
    measures.PixelSpacing, measures.SliceThickness = list(SPACING[1:]), STEP
    plane.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    shared.PixelMeasuresSequence, shared.PlaneOrientationSequence = [measures], [plane]
    d.SharedFunctionalGroupsSequence = [shared]
    groups = []
    for place, time in frames:
        group, position, content = pydicom.Dataset(), pydicom.Dataset(), pydicom.Dataset()
        position.ImagePositionPatient, content.TemporalPositionIndex = [*ORIGIN[:2], ORIGIN[2] + STEP * place], time
        group.PlanePositionSequence, group.FrameContentSequence = [position], [content]
        groups.append(group)
    d.PerFrameFunctionalGroupsSequence, d.NumberOfFrames = groups, len(groups)
    d.PixelData = np.ascontiguousarray(pixels).tobytes()
    file.parent.mkdir(parents=True, exist_ok=True)
    d.save_as(file, enforce_file_format=True)
    return file


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
    summary = place.guess()
    image = place.read("Scans_0001")
    wanted = array * np.array([float(f"{s:.6g}") for s in slopes])[:, None, None]
    same(place, "Scans_0001", wanted.astype(np.float32))
    assert image.GetPixelID() == sitk.sitkFloat32 and summary.rejected == []
    assert sitk.GetArrayFromImage(image)[0].mean() == pytest.approx(1.0)


def test_frames_in_any_order_are_sorted_by_position(place):
    order, array = [*range(0, 20, 2), *range(1, 20, 2)], np.abs(volume())
    enhanced(place.export / "e", [(k, 1) for k in order], array[order])
    assert place.guess().added == ["Scans_0001"]
    same(place, "Scans_0001", array)


def test_missing_frames_are_refused_with_the_numbers(place):
    kept = [*range(9), *range(15, 20)]
    enhanced(place.export / "bad", [(k, 1) for k in kept], np.abs(volume())[kept])
    series(place.export / "series", edit=lambda d, i: i not in (7, 8), modality="MR")
    series(place.export / "good", volume(1), modality="MR")
    summary = place.guess()
    assert len(summary.added) == 1
    first, second = sorted(summary.rejected, key=lambda r: r.file)
    assert first.reason == second.reason == "slices are missing or unevenly spaced"
    assert first.detail == "6 of 20 slices are missing: 14 mm from slice 9 to the next, 2 mm elsewhere"
    assert second.detail.startswith("2 of 20 slices are missing: 6 mm from slice 7") and second.count == 18


@pytest.mark.parametrize("jitter", [2e-6, 1e-4, 2e-3])
def test_orientations_that_differ_a_little_are_one_volume(place, jitter):
    rng = np.random.default_rng(0)

    def edit(d, i):
        angle = 0.0125 + rng.uniform(-jitter, jitter)
        c, s = np.cos(angle), np.sin(angle)
        d.ImageOrientationPatient = [f"{v:.7f}" for v in (c, s, 0, -s, c, 0)]

    series(place.export, edit=edit)
    summary = place.guess()
    assert summary.added == ["Scans_0001"] and summary.rejected == []
    same(place, "Scans_0001", volume())


def same_instance(d, i):
    d.SOPInstanceUID = d.file_meta.MediaStorageSOPInstanceUID = "1.2.3.4"


@pytest.mark.parametrize("uid", ["", "1.2.3"])
def test_one_identifier_on_all_slices_of_two_patients(place, uid):
    series(place.export / "p1", volume(1), edit=same_instance, uid=uid, study=uid)
    series(place.export / "p2", volume(2), edit=same_instance, uid=uid, study=uid)
    summary = place.guess()
    assert len(summary.added) == 2 and summary.rejected == []
    holds(place, volume(1), volume(2))


def test_two_patients_in_one_folder_under_one_series(place):
    def other(d, i):
        d.PatientID = "4712"

    series(place.export, volume(1), uid="1.2.3", study="1.2", names="a{}")
    series(place.export, volume(2), uid="1.2.3", study="1.2", names="b{}", edit=other)
    assert len(place.guess().added) == 2
    holds(place, volume(1), volume(2))


def test_copies_are_duplicates_by_their_voxels(place):
    series(place.export / "a", volume(1), names="{:02d}")
    shutil.copytree(place.export / "a", place.export / "b")
    (place.export / "key").mkdir()
    for name in ("03", "04"):
        shutil.copy(place.export / "a" / name, place.export / "key" / name)
    shutil.copy(place.export / "a" / "05", place.export / "a" / "05copy")
    summary = place.guess()
    assert summary.added == ["Scans_0001"] and {r.reason for r in summary.rejected} == {"duplicate"}
    assert sum(r.count for r in summary.rejected) == 23 and summary.files == 20
    same(place, "Scans_0001", volume(1))


@pytest.mark.parametrize("part", [lambda i: i % 2, lambda i: i // 10])
def test_a_series_spread_over_folders_is_one_volume(place, part):
    series(place.export / "all", names="{:02d}")
    for i, file in enumerate(sorted((place.export / "all").iterdir())):
        (place.export / f"disk{part(i)}").mkdir(exist_ok=True)
        shutil.move(file, place.export / f"disk{part(i)}" / file.name)
    assert place.guess().added == ["Scans_0001"]
    same(place, "Scans_0001", volume())


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
    summary = place.guess()
    assert summary.added == ["Scans_0001"] and summary.rejected == []
    same(place, "Scans_0001", volume())


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
    summary = place.guess(four_d=how)
    holds(place, volume(5), *[volumes[t] for t in (1, 2)][:count])
    if how == "reject":
        assert (only(summary).reason, only(summary).detail) == ("4D (see --four-d)", "2 volumes")


def test_4d_series_over_folders_of_time_points(place):
    for t in (1, 2):

        def edit(d, i, t=t):
            d.TemporalPositionIdentifier = t

        series(place.export / f"t{t}", volume(t), uid="1.2.3", study="1.2", edit=edit, modality="MR")
    with pytest.raises(NnsslError, match="Nothing that can be added"):
        place.guess()
    assert len(place.guess(four_d="first").added) == 1
    holds(place, volume(1))


def test_headers_that_contradict_each_other(place):
    def edit(d, i):
        d.StudyTime, d.AcquisitionNumber, d.EchoTime = f"1010{i:02d}.5", i, i

    series(place.export, edit=edit)
    assert place.guess().added == ["Scans_0001"]
    same(place, "Scans_0001", volume())


def test_compressed_and_turned(place):
    def edit(d, i):
        d.ImageOrientationPatient, d.ImagePositionPatient = [0, 1, 0, 0, 0, -1], [STEP * i, 0, 0]
        d.compress(RLELossless)
        d.Manufacturer, d.MRAcquisitionType = "SIEMENS", "3D"  # dcm2niix would turn it

    series(place.export, edit=edit, modality="MR")
    place.guess()
    raw = sitk.ReadImage(str(place.dataset / "imagesTr" / "Scans_0001_0000.nii.gz"))
    assert raw.GetSize() == (12, 14, 20) and raw.GetSpacing() == pytest.approx((1.0, 1.5, STEP))
    direction = np.reshape(raw.GetDirection(), (3, 3))
    np.testing.assert_allclose(np.abs(direction @ np.eye(3)), [[0, 0, 1], [1, 0, 0], [0, 1, 0]], atol=1e-6)


def test_what_is_refused_and_named(place):
    e = place.export
    series(e / "good", volume(1))
    short = series(e / "short") / "IM0007"
    short.write_bytes(short.read_bytes()[:-100])
    packed = series(e / "packed", volume(3), edit=lambda d, i: d.compress(RLELossless)) / "IM0007"
    packed.write_bytes(packed.read_bytes()[:-100])
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
    summary = place.guess(modality="CT")
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
        place.guess()
    table = next(place.tmp.glob("*.csv")).read_text()
    assert "status 3" in table and "this vendor is not known" in table and not place.dataset.exists()


def test_without_dcm2niix_the_extra_is_named(place, monkeypatch):
    series(place.export / "a")
    monkeypatch.setattr(headers, "dcm2niix_program", lambda: None)
    with pytest.raises(NnsslError, match=r"20 of the files are DICOM.*\[dicom\].*pip install dcm2niix"):
        place.guess()
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(NnsslError, match="pip install dcm2niix pydicom"):
        place.guess()
    assert not place.dataset.exists()


def test_dcm2niix_of_the_system(monkeypatch):
    monkeypatch.setitem(sys.modules, "dcm2niix", None)
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    assert headers.dcm2niix_program() == "/usr/bin/dcm2niix"


# ---- sorting ---------------------------------------------------------------------------------------------------------------


def test_several_series_of_a_study_in_one_folder(place):
    series(place.export, volume(1), study="1.2", names="a{:03d}")
    series(place.export, volume(2), study="1.2", names="b{:03d}.dcm")
    summary = place.guess()
    assert len(summary.added) == 2 and summary.rejected == [] and summary.linked == 0
    holds(place, volume(1), volume(2))
    for case in summary.added:
        assert place.read(case).GetOrigin() == pytest.approx(ORIGIN)
    assert place.told()["channel_names"] == {"0": "CT"}


def test_orientations_of_one_series_are_several_volumes(place):
    series(place.export / "axial", volume(1), uid="1.2.3", study="1.2")
    places, turned = [(5.0, float(i), 11.0) for i in range(20)], [1, 0, 0, 0, 0, -1]
    named = {"uid": "1.2.3", "study": "1.2", "ImageOrientationPatient": turned}
    series(place.export / "coronal", volume(2), places=places, **named)
    summary = place.guess()
    assert len(summary.added) == 2 and summary.rejected == []


def test_series_whose_identifiers_were_wiped_out_are_told_apart_by_folder(place):
    for i in range(2):
        wiped = dict.fromkeys(("SeriesInstanceUID", "SOPInstanceUID", "StudyInstanceUID"), "")
        series(place.export / str(i), volume(i), **wiped)
    summary = place.guess()
    assert len(summary.added) == 2 and summary.rejected == []


def test_a_multi_frame_file_of_gdcm(place):
    writer, array = sitk.ImageFileWriter(), volume(3).clip(0)
    writer.SetFileName(str(place.export / "frames"))
    writer.SetImageIO("GDCMImageIO")
    writer.Execute(image_of(array.astype(np.uint16)))  # of modality OT, which says nothing
    assert place.add().added == ["Scans_0001"]
    image = place.read("Scans_0001")
    np.testing.assert_array_equal(sitk.GetArrayFromImage(image), array)
    assert image.GetSpacing() == pytest.approx(SPACING[::-1])


def test_rejected_series(place):
    e = place.export
    series(e / "scout", volume(1), ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    series(e / "one", volume(1)[:1])
    series(e / "few", volume(1)[:4])
    series(e / "gap", volume(1), places=[2.0 * i + (4 if i > 5 else 0) for i in range(20)])
    series(e / "tilt", volume(1), places=[(5.0, 0.5 * i, 2.0 * i) for i in range(20)])
    series(e / "uneven", volume(1), places=[0.0, 0.0, *[2.0 * i for i in range(1, 19)]])
    both = np.concatenate([volume(1), volume(2)])
    series(e / "time", both, places=[2.0 * (i % 20) for i in range(40)])
    series(e / "good", volume(3))
    (e / "broken").mkdir()
    (e / "broken" / "x.dcm").write_bytes(b"\0" * 128 + b"DICM" + b"rest")
    shutil.copytree(e / "good", e / "copy")
    summary = place.guess()
    found = {os.path.basename(os.path.dirname(r.file)): r.reason for r in summary.rejected}
    assert len(summary.added) == 1
    twin = {"good", "copy"} & set(found)
    assert len(twin) == 1 and found.pop(twin.pop()) == "duplicate"
    assert found == {
        "scout": "a scout",
        "one": "a single slice",
        "few": "fewer than 8 slices",
        "gap": "slices are missing or unevenly spaced",
        "tilt": "its gantry is tilted",
        "uneven": "some positions have more slices than others",
        "time": "4D (see --four-d)",
        "broken": "DICOM without a readable image (a report, a plan, or damaged)",
    }
    same(place, "Scans_0001", volume(3))


@pytest.mark.parametrize("how, expected", [("split", [1, 2]), ("first", [1])])
def test_4d_in_one_series(place, how, expected):
    both = np.concatenate([volume(1), volume(2)])
    series(place.export, both, places=[11 + 2.0 * (i % 20) for i in range(40)])
    assert len(place.add(four_d=how).added) == len(expected)
    holds(place, *[volume(s) for s in expected])
