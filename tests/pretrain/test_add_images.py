"""``nnssl_add_images``: what hospitals export becomes a raw dataset, and every file is accounted for."""

from __future__ import annotations

import csv
import gzip
import json
import os
import shutil
from types import SimpleNamespace

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner

from nnssl.errors import NnsslError
from nnssl.pretrain.images import add_images, dataset
from nnssl.pretrain.images import cli as command
from nnssl.pretrain.images.convert import Converter, tells_nothing
from nnssl.pretrain.images.dataset import find_dataset
from nnssl.pretrain.prepare import prepare_sources
from nnssl.pretrain.prepare.planning import planned

SHAPE, SPACING = (10, 14, 12), (2.0, 1.5, 1.0)  # (z, y, x)
SECRET = "Mueller^Hans"


def volume(seed=0, shape=SHAPE, dtype=np.int16) -> np.ndarray:
    rng = np.random.default_rng(seed)
    body = np.zeros(shape)
    body[..., 2:-2, 2:-2] = 400
    return (body + rng.normal(0, 30, shape)).astype(dtype)


def image_of(array, spacing=SPACING) -> sitk.Image:
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(spacing[::-1])
    image.SetOrigin((5.0, -7.0, 11.0))
    return image


def write(path, array=None, spacing=SPACING, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(image_of(volume() if array is None else array, spacing), str(path), **options)
    return path


def write_series(
    folder, array=None, *, uid="1.2.3", study="1.2", modality="CT", positions=None, names="IM{:04d}", salt="0", **tags
):
    """One DICOM file a slice, without ending, with a patient's name."""
    folder.mkdir(parents=True, exist_ok=True)
    array = volume() if array is None else array
    image = image_of(array)
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    writer.SetImageIO("GDCMImageIO")
    for i in range(len(array)):
        z = positions[i] if positions is not None else 11.0 + 2.0 * i
        place = z if isinstance(z, tuple) else (5.0, -7.0, z)
        told = {
            "0010|0010": SECRET, "0010|0020": "4711", "0008|0060": modality, "0020|000d": study, "0020|000e": uid,
            "0008|0018": f"{uid}.{i}.{study}.{salt}", "0020|0013": str(i), "0020|0032": "\\".join(map(str, place)),
            "0020|0037": "1\\0\\0\\0\\1\\0", "0028|0030": "1.5\\1.0", "0008|103e": "abdomen", **tags,
        }  # fmt: skip
        slice_ = image[:, :, i]
        for key, value in told.items():
            slice_.SetMetaData(key, value)
        writer.SetFileName(str(folder / names.format(len(array) - 1 - i)))  # the order of names is not that of places
        writer.Execute(slice_)
    return folder


@pytest.fixture
def place(nnunet_env, tmp_path, monkeypatch) -> SimpleNamespace:
    """An export to fill, and ``place.add(...)``."""
    export = tmp_path / "export" / "Mueller_Hans"
    export.mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    dataset = nnunet_env.raw / "Dataset500_Scans"

    def add(*folders, **options):
        options = {"name": "Scans", "modality": "CT", "n_processes": 0, **options}
        return add_images(options.pop("dataset", 500), list(folders) or [export.parent], **options)

    def cases():
        return sorted(p.name for p in (dataset / "imagesTr").iterdir())

    def read(case, channel=0):
        image = sitk.ReadImage(str(dataset / "imagesTr" / f"{case}_{channel:04d}.nii.gz"))
        return sitk.DICOMOrient(image, "LPS")  # dcm2niix stores rows from the back to the front

    return SimpleNamespace(
        export=export, dataset=dataset, add=add, cases=cases, read=read, env=nnunet_env, tmp=tmp_path
    )


def reasons(summary):
    return {os.path.basename(r.file): r.reason for r in summary.rejected}


def same(image, array, spacing=SPACING, origin=(5.0, -7.0, 11.0)):
    np.testing.assert_array_equal(sitk.GetArrayFromImage(image), array)
    assert image.GetSpacing() == pytest.approx(spacing[::-1]) and image.GetOrigin() == pytest.approx(origin)


@pytest.mark.parametrize("ending", ["nii.gz", "nii", "nrrd", "mha", "mhd", "nhdr"])
def test_each_format_keeps_voxels_and_place(place, ending):
    write(place.export / f"a.{ending}")
    summary = place.add()
    assert summary.added == ["Scans_0001"] and summary.rejected == [] and place.cases() == ["Scans_0001_0000.nii.gz"]
    same(place.read("Scans_0001"), volume())
    assert json.loads((place.dataset / "dataset.json").read_text()) == {
        "channel_names": {"0": "CT"},
        "labels": {"background": 0},
        "numTraining": 1,
        "file_ending": ".nii.gz",
    }


def test_several_series_of_a_study_in_one_folder(place):
    write_series(place.export, volume(1), uid="1.1", names="a{:03d}")
    write_series(place.export, volume(2), uid="1.2", names="b{:03d}.dcm")
    summary = place.add(modality=None)
    assert len(summary.added) == 2 and summary.rejected == [] and summary.linked == 0
    found = sorted(int(sitk.GetArrayFromImage(place.read(c)).astype(int).sum()) for c in summary.added)
    assert found == sorted(int(volume(s).astype(int).sum()) for s in (1, 2))
    for case in summary.added:
        array = sitk.GetArrayFromImage(place.read(case))
        same(place.read(case), volume(1) if np.array_equal(array, volume(1)) else volume(2))
    assert json.loads((place.dataset / "dataset.json").read_text())["channel_names"] == {"0": "CT"}


def test_a_series_over_several_folders_and_orientations_of_one_series(place):
    write_series(place.export / "all", volume(1))
    for i, file in enumerate(sorted((place.export / "all").iterdir())):
        (place.export / f"disk{i % 2}").mkdir(exist_ok=True)
        shutil.move(file, place.export / f"disk{i % 2}" / file.name)
    other = {"0020|0037": "1\\0\\0\\0\\0\\-1"}
    write_series(
        place.export / "coronal",
        volume(2),
        uid="1.2.3",
        positions=[(5.0, float(i), 11.0) for i in range(10)],
        salt="1",
        **other,
    )
    summary = place.add()
    assert len(summary.added) == 2 and summary.rejected == []


def test_multi_frame(place):
    writer = sitk.ImageFileWriter()
    writer.SetFileName(str(place.export / "frames"))
    writer.SetImageIO("GDCMImageIO")
    image = image_of(volume(3).clip(0).astype(np.uint16))
    writer.Execute(image)  # of modality OT, which says nothing
    summary = place.add()
    assert summary.added == ["Scans_0001"]
    np.testing.assert_array_equal(sitk.GetArrayFromImage(place.read("Scans_0001")), volume(3).clip(0))
    assert place.read("Scans_0001").GetSpacing() == pytest.approx(SPACING[::-1])


def test_every_reject_is_named_and_the_rest_goes_on(place):
    e = place.export
    write(e / "good.nrrd", volume(1))
    write(e / "again.mha", volume(1))
    write(e / "thin.nrrd", volume(2, (3, 14, 12)))
    write(e / "slice.nrrd", volume(2, (1, 14, 12)))
    write(e / "flat.nii.gz", volume(2)[0], (1.5, 1.0))
    sitk.WriteImage(sitk.JoinSeries([image_of(volume(s)) for s in (1, 2)]), str(e / "four.nii.gz"))
    rgb = sitk.Compose([image_of(volume(2, dtype=np.uint8))] * 3)
    sitk.WriteImage(rgb, str(e / "rgb.nrrd"))
    sitk.WriteImage(sitk.Compose([image_of(volume(2))] * 2), str(e / "vector.nrrd"))
    broken = volume(3, dtype=np.float32)
    broken[2, 3, 4] = np.nan
    write(e / "nan.nrrd", broken)
    write(e / "nan.nii.gz", broken)
    write(e / "constant.mha", np.full(SHAPE, 7, np.int16))
    write(e / "micro.nrrd", volume(4), (0.001, 0.001, 0.001))
    for name in ("cut.nii.gz", "cut.nrrd", "cut.mha", "cut.nii"):
        write(e / name, volume(5))
        (e / name).write_bytes((e / name).read_bytes()[: (e / name).stat().st_size // 2])
    (e / "empty.nii.gz").write_bytes(b"")
    (e / "report.pdf").write_bytes(b"%PDF")
    (e / "all.zip").write_bytes(b"PK")
    (e / ".DS_Store").write_bytes(b"x")
    (e / "dead.nii.gz").symlink_to(e / "nowhere.nii.gz")
    summary = place.add()
    assert summary.added == ["Scans_0001"]
    found = reasons(summary)
    twins = {"good.nrrd", "again.mha"} & set(found)
    assert len(twins) == 1 and found.pop(twins.pop()) == "duplicate"
    assert found == {
        "thin.nrrd": "fewer than 8 slices",
        "slice.nrrd": "a single slice",
        "flat.nii.gz": "a single slice",
        "four.nii.gz": "4D (see --four-d)",
        "rgb.nrrd": "colour (RGB)",
        "vector.nrrd": "its voxels are vectors",
        "nan.nrrd": "voxels are NaN or infinite",
        "nan.nii.gz": "voxels are NaN or infinite",
        "constant.mha": "the image is constant",
        "micro.nrrd": "absurd voxel size",
        "cut.nii.gz": "it is truncated",
        "cut.nii": "it is truncated",
        "cut.nrrd": "it cannot be read",
        "cut.mha": "it cannot be read",
        "empty.nii.gz": "it cannot be read",
        "report.pdf": "no image format that is read",
        "all.zip": "an archive, which has to be unpacked first",
        ".DS_Store": "a hidden file",
        "dead.nii.gz": "it cannot be reached (a dead link?)",
    }
    with open(summary.report, newline="") as file:
        table = list(csv.reader(file))
    assert table[0] == ["file", "reason", "detail", "files"]
    assert {(row[0], row[1]) for row in table[1:]} == {(r.file, r.reason) for r in summary.rejected}
    assert summary.report == place.tmp / "Dataset500_Scans_not_added.csv"
    assert sorted(p.name for p in place.dataset.iterdir()) == ["dataset.json", "imagesTr", "nnssl_images.jsonl"]


def test_rejected_series(place):
    e = place.export
    write_series(e / "scout", volume(1), uid="1", **{"0008|0008": "ORIGINAL\\PRIMARY\\LOCALIZER"})
    write_series(e / "one", volume(1)[:1], uid="2")
    write_series(e / "few", volume(1)[:4], uid="3")
    write_series(e / "gap", volume(1), uid="4", positions=[2.0 * i + (4 if i > 5 else 0) for i in range(10)])
    write_series(e / "tilt", volume(1), uid="5", positions=[(5.0, 0.5 * i, 2.0 * i) for i in range(10)])
    write_series(e / "uneven", volume(1), uid="6", positions=[0.0, 0.0, *[2.0 * i for i in range(1, 9)]])
    write_series(
        e / "time", np.concatenate([volume(1), volume(2)]), uid="7", positions=[2.0 * (i % 10) for i in range(20)]
    )
    write_series(e / "good", volume(3), uid="8")
    (e / "broken").mkdir()
    (e / "broken" / "x.dcm").write_bytes(b"\0" * 128 + b"DICM" + b"rest")
    shutil.copytree(e / "good", e / "copy")
    summary = place.add(modality=None)
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
    same(place.read("Scans_0001"), volume(3))


@pytest.mark.parametrize("how, expected", [("split", [1, 2]), ("first", [1])])
def test_4d(place, how, expected):
    both = [volume(s) for s in (1, 2)]
    sitk.WriteImage(sitk.JoinSeries([image_of(v) for v in both]), str(place.export / "four.nii.gz"))
    summary = place.add(four_d=how)
    assert len(summary.added) == len(expected) and summary.rejected == [] and summary.linked == 0
    for case, seed in zip(summary.added, expected):
        same(place.read(case), volume(seed))
    write_series(
        place.tmp / "time", np.concatenate(both) + 1, uid="7", positions=[11 + 2.0 * (i % 10) for i in range(20)]
    )
    summary = place.add(place.tmp / "time", four_d=how)
    arrays = [sitk.GetArrayFromImage(place.read(c)) for c in summary.added]
    assert len(arrays) == len(expected)
    assert all(any(np.array_equal(a, volume(s) + 1) for a in arrays) for s in expected)


def test_channels_by_name_in_one_folder_and_by_folder(place):
    e = place.export
    for i in range(2):
        write(e / f"p{i}_T1.nii.gz", volume(10 * i + 1))
        write(e / f"p{i}_t2.nrrd", volume(10 * i + 2))
        write(e / f"sub{i}" / "t1.mha", volume(10 * i + 3))
        write(e / f"sub{i}" / "t2.mha", volume(10 * i + 4))
    write(e / "p2_t1.nii.gz", volume(50))
    write(e / "flair.nii.gz", volume(51))
    write(e / "p3_t1_t2.nii.gz", volume(52))
    write(e / "p4_t1.nii.gz", volume(53))
    write(e / "p4_t2.nii.gz", volume(54), (2.0, 1.5, 1.2))
    summary = place.add(modality=None, channels={"T1": r"t1\b", "T2": r"t2\b"})
    assert len(summary.added) == 4
    pairs = set()
    for case in summary.added:
        arrays = [sitk.GetArrayFromImage(place.read(case, c)) for c in (0, 1)]
        seeds = [next(s for s in range(20) if np.array_equal(a, volume(s))) for a in arrays]
        pairs.add(tuple(seeds))
    assert pairs == {(1, 2), (11, 12), (3, 4), (13, 14)}
    assert reasons(summary) == {
        "p2_t1.nii.gz": "a channel of its case is missing",
        "flair.nii.gz": "it matches no channel",
        "p3_t1_t2.nii.gz": "it matches no channel",
        "p4_t1.nii.gz": "its channels differ in size or place: register and resample them first",
    } | {"p3_t1_t2.nii.gz": "a channel of its case is missing"}
    told = json.loads((place.dataset / "dataset.json").read_text())
    assert told["channel_names"] == {"0": "T1", "1": "T2"} and told["numTraining"] == 4


def test_channels_of_dicom_studies_by_description(place):
    for i in range(2):
        for c, kind in enumerate(("ax T1", "ax T2 fs")):
            write_series(
                place.export / f"{i}{c}",
                volume(10 * i + c),
                uid=f"9.{i}.{c}",
                study=f"8.{i}",
                modality="MR",
                **{"0008|103e": kind},
            )
    summary = place.add(modality=None, channels={"T1": "T1", "T2": "T2"})
    assert len(summary.added) == 2
    write_series(place.tmp / "more" / "a", volume(40), uid="9.5.0", study="8.5", **{"0008|103e": "T1"})
    write_series(place.tmp / "more" / "b", volume(41), uid="9.5.1", study="8.5", **{"0008|103e": "T1 late"})
    write_series(place.tmp / "more" / "c", volume(42), uid="9.5.2", study="8.5", **{"0008|103e": "T2"})
    again = place.add(place.tmp / "more", modality=None, channels={"T1": "T1", "T2": "T2"})
    assert again.added == [] and {r.reason for r in again.rejected} == {"its case has several images for a channel"}


def test_modality(place):
    write_series(place.export / "ct", volume(1), uid="1", modality="CT")
    write_series(place.export / "mr", volume(2), uid="2", modality="MR")
    with pytest.raises(NnsslError, match=r"several kinds \(1 CT, 1 MR images\): choose one with --modality"):
        place.add(modality=None)
    assert not place.dataset.exists()
    summary = place.add(modality="MRI")
    assert len(summary.added) == 1 and [r.reason for r in summary.rejected] == ["another modality"]
    assert json.loads((place.dataset / "dataset.json").read_text())["channel_names"] == {"0": "MRI"}
    with pytest.raises(NnsslError, match="has the channel MRI, not CT"):
        place.add(modality="CT")
    assert place.add(modality=None).known == 1


def test_files_that_do_not_tell_their_modality(place):
    write(place.export / "a.nii.gz")
    with pytest.raises(NnsslError, match="say it, for example --modality CT"):
        place.add(modality=None)


def everything_written(folder):
    """Names and contents of all files, gzip unpacked, links by their target."""
    for path in folder.rglob("*"):
        yield str(path.relative_to(folder)).encode()
        if path.is_symlink():
            yield os.readlink(path).encode()
        if path.is_file():
            content = path.read_bytes()
            yield content
            if content[:2] == b"\x1f\x8b":
                yield gzip.decompress(content)


def test_nothing_of_the_patient_is_kept(place, caplog, capfd):
    caplog.set_level("DEBUG")
    write_series(place.export / "dicom", volume(1))
    header = nibabel.Nifti1Header()
    header["descrip"] = b"Mueller Hans"
    header.extensions.append(nibabel.nifti1.Nifti1Extension("comment", b"Mueller"))
    data = volume(2).transpose(2, 1, 0)
    nibabel.save(nibabel.Nifti1Image(data, np.diag([1, 1.5, 2, 1]), header), str(place.export / "named.nii.gz"))
    named = write(place.export / "Mueller.nii", volume(3))
    with gzip.open(place.export / "Mueller_gz.nii.gz", "wb") as file:  # keeps the file's name in its header
        file.write(named.read_bytes())
    named.unlink()
    write(place.export / "Mueller.mha", volume(4))
    (place.export / "Mueller_bad.nii.gz").write_bytes(b"x" * 30)
    summary = place.add(modality=None)
    assert len(summary.added) == 4
    for content in everything_written(place.env.raw):
        assert b"mueller" not in content.lower() and b"4711" not in content
    told = caplog.text + "".join(capfd.readouterr())
    assert "Mueller" not in told and "4711" not in told and "Scans_0001 to Scans_0004" in told
    assert not list(place.tmp.glob("*mapping*"))
    assert "Mueller" in summary.report.read_text()  # the user's own file, outside of nnU-Net's folders


@pytest.mark.parametrize(
    "key, text, quiet",
    [
        ("descrip", b"", True),
        ("descrip", b"FSL5.0", True),
        ("descrip", b"Mueller", False),
        ("aux_file", b"none", True),
        ("aux_file", b"Mueller.hdr", False),
        ("db_name", b"Mueller", False),
        ("extension", b"Mueller", False),
        ("gzip", b"Mueller.nii", False),
    ],
)
def test_what_a_header_may_hold(tmp_path, key, text, quiet):
    header = nibabel.Nifti1Header()
    if key == "extension":
        header.extensions.append(nibabel.nifti1.Nifti1Extension("comment", text))
    elif key != "gzip":
        header[key] = text
    file = tmp_path / "a.nii.gz"
    nibabel.save(nibabel.Nifti1Image(volume(2), np.eye(4), header), str(file))
    if key == "gzip":
        content = gzip.decompress(file.read_bytes())
        with open(file, "wb") as raw, gzip.GzipFile(text.decode(), "wb", fileobj=raw) as packed:
            packed.write(content)
    assert tells_nothing(str(file)) is quiet


def test_the_mapping_is_written_only_when_asked_and_is_kept_up(place):
    write(place.export / "a.nrrd", volume(1))
    place.add()
    write_series(place.export / "series", volume(2))
    place.add(mapping=place.tmp / "map.csv")
    write(place.tmp / "other" / "c.nrrd", volume(3))
    place.add(place.tmp / "other", mapping=place.tmp / "map.csv")
    with open(place.tmp / "map.csv", newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["case", "channel", "file", "files"]
    assert [(r[0], r[1], os.path.basename(r[2]), r[3]) for r in rows[1:]] == [
        ("Scans_0001", "CT", "a.nrrd", "1"),
        ("Scans_0002", "CT", "IM0009", "10"),
        ("Scans_0003", "CT", "c.nrrd", "1"),
    ]


def test_clean_files_are_linked(place):
    source = write(place.export / "a.nii.gz", volume(1))
    assert tells_nothing(str(source))
    summary = place.add()
    made = place.dataset / "imagesTr" / "Scans_0001_0000.nii.gz"
    assert summary.linked == 1 and made.samefile(source) and not made.is_symlink()
    write(place.tmp / "b" / "b.nii.gz", volume(2))
    assert place.add(place.tmp / "b", link="never").linked == 0
    write(place.tmp / "c" / "c.nii.gz", volume(3))
    assert place.add(place.tmp / "c", link="symbolic").linked == 1
    link = place.dataset / "imagesTr" / "Scans_0003_0000.nii.gz"
    assert link.is_symlink() and os.readlink(link) == str(place.tmp / "c" / "c.nii.gz")
    same(place.read("Scans_0003"), volume(3))


def test_another_file_system_gets_a_copy(place, monkeypatch):
    write(place.export / "a.nii.gz", volume(1))
    real = os.link

    def link(source, target, **options):
        if "export" in os.fspath(source):
            raise OSError(18, "Invalid cross-device link")
        real(source, target, **options)

    monkeypatch.setattr(os, "link", link)
    assert place.add().linked == 0
    same(place.read("Scans_0001"), volume(1))


def test_a_fourth_axis_of_one_volume_is_no_4d(place):
    affine = np.diag([-1.0, -1.5, 2.0, 1.0])
    affine[:3, 3] = -5, 7, 11
    data = volume(1).transpose(2, 1, 0)[..., None]
    nibabel.save(nibabel.Nifti1Image(data, affine), str(place.export / "a.nii.gz"))
    assert place.add().added == ["Scans_0001"]
    same(place.read("Scans_0001"), volume(1))


def test_series_whose_identifiers_were_wiped_out_are_told_apart_by_folder(place):
    for i in range(2):
        write_series(place.export / str(i), volume(i), **{"0020|000e": "", "0008|0018": "", "0020|000d": ""})
    summary = place.add(modality=None)
    assert len(summary.added) == 2 and summary.rejected == []


def test_again_adds_only_what_is_new(place):
    write(place.export / "a.nrrd", volume(1))
    write(place.export / "thin.nrrd", volume(2, (3, 14, 12)))
    place.add()
    stamp = (place.dataset / "imagesTr" / "Scans_0001_0000.nii.gz").stat().st_mtime_ns
    write(place.export / "b.nrrd", volume(3))
    summary = place.add()
    assert summary.added == ["Scans_0002"] and summary.known == 1
    assert reasons(summary) == {"thin.nrrd": "fewer than 8 slices"} and summary.rejected[0].detail == "as before"
    assert (place.dataset / "imagesTr" / "Scans_0001_0000.nii.gz").stat().st_mtime_ns == stamp
    assert place.add(least_slices=3).added == ["Scans_0003"]  # other options: looked at again
    (place.dataset / "imagesTr" / "Scans_0002_0000.nii.gz").unlink()
    assert place.add(name=None, modality=None).added == ["Scans_0004"]  # numbers are not used twice
    assert json.loads((place.dataset / "dataset.json").read_text())["numTraining"] == 3


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

    def stop(self, job):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(job.key)
        return real(self, job)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Converter, "_cases", stop)
        place.add()
    assert json.loads((place.dataset / "dataset.json").read_text())["numTraining"] == 2
    with open(place.dataset / "nnssl_images.jsonl", "a") as file:
        file.write('\n{"key": "half')
    summary = place.add()
    assert summary.known == 2 and summary.added == ["Scans_0003", "Scans_0004"]
    assert place.add().known == 4
    assert len(place.cases()) == 4 and not (place.dataset / "imagesTr_tmp").exists()


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
        same(place.read(case), volume(seed))


def test_a_case_that_lacks_a_channel_is_named(place):
    write(place.export / "a_t1.nrrd", volume(1))
    write(place.export / "a_t2.nrrd", volume(2))
    options = {"modality": None, "channels": {"T1": "_t1", "T2": "_t2"}}
    place.add(**options)
    (place.dataset / "imagesTr" / "Scans_0001_0001.nii.gz").unlink()
    with pytest.raises(NnsslError, match="Scans_0001 has fewer than 2 channels.*Delete its files"):
        place.add(**options)
    (place.dataset / "imagesTr" / "Scans_0001_0000.nii.gz").unlink()
    assert place.add(**options).added == ["Scans_0001"]


def test_a_full_disk_says_so_and_nothing_half_is_left(place, monkeypatch):
    write(place.export / "a.nrrd", volume(1))
    monkeypatch.setattr(sitk, "WriteImage", lambda *a, **k: (_ for _ in ()).throw(RuntimeError("cannot write")))
    with monkeypatch.context() as patch, pytest.raises(NnsslError, match="No space left in .*What is added is kept"):
        patch.setattr("shutil.disk_usage", lambda p: SimpleNamespace(free=0))
        place.add()
    with pytest.raises(NnsslError, match="could not be written into .*cannot write"):
        place.add()
    assert place.cases() == []


def test_another_call_takes_a_number_meanwhile(place, monkeypatch):
    write(place.export / "a.nrrd", volume(1))
    real = Converter.__call__

    def slow(self, job):
        reply = real(self, job)
        (place.dataset / "imagesTr" / "Scans_0001_0000.nii.gz").write_bytes(b"of another call")
        return reply

    monkeypatch.setattr(Converter, "__call__", slow)
    assert place.add().added == ["Scans_0002"]
    assert (place.dataset / "imagesTr" / "Scans_0001_0000.nii.gz").read_bytes() == b"of another call"


def test_datasets_that_cannot_take_images(place, tiny_raw_dataset):
    write(place.export / "a.nrrd", volume(1))
    tiny_raw_dataset(501, "Labelled", 1)
    with pytest.raises(NnsslError, match="Dataset501_Labelled has labels"):
        place.add(dataset=501, name=None)
    with pytest.raises(NnsslError, match="exists and is called Dataset501_Labelled"):
        place.add(dataset=501, name="Other")
    with pytest.raises(NnsslError, match="no dataset 502 yet: name it with --name"):
        place.add(dataset=502, name=None)
    with pytest.raises(NnsslError, match="letters, digits"):
        place.add(name="Hans Mueller")
    with pytest.raises(NnsslError, match="is no regular expression"):
        place.add(modality=None, channels={"T1": "("})
    with pytest.raises(NnsslError, match="--four-d is one of"):
        place.add(four_d="maybe")
    with pytest.raises(NnsslError, match="nowhere does not exist"):
        place.add("nowhere")
    free = tiny_raw_dataset(503, "Png", 1, labelled=False)
    told = json.loads((free / "dataset.json").read_text())
    (free / "dataset.json").write_text(json.dumps({**told, "file_ending": ".png"}))
    with pytest.raises(NnsslError, match="holds .png files"):
        place.add(dataset=503, name=None)
    assert find_dataset("Dataset007_X", None) == find_dataset(7, "X") == "Dataset007_X"


def test_nothing_usable_makes_no_dataset(place):
    (place.export / "a.txt").write_text("x")
    with pytest.raises(
        NnsslError, match=r"(?s)Nothing that can be added was found; why stands in .*csv.*1 file is not used"
    ):
        place.add()
    assert not place.dataset.exists()
    assert "no image format that is read" in (place.tmp / "Dataset500_Scans_not_added.csv").read_text()


def test_both_tables_name_files_by_whole_paths(place):
    """As the folder was typed or not: mapping.csv and not_added.csv are looked through side by side."""
    (place.export / "a.txt").write_text("x")
    with pytest.raises(NnsslError):
        place.add(os.path.relpath(place.export))
    with open(place.tmp / "Dataset500_Scans_not_added.csv", newline="") as file:
        assert [row[0] for row in csv.reader(file)][1:] == [str(place.export / "a.txt")]


def test_images_are_added_to_what_the_user_made(place, tiny_raw_dataset):
    folder = tiny_raw_dataset(500, "Scans", 2, labelled=False, modality="CT", prefix="mine")
    (folder / "dataset.json").write_text(
        json.dumps({**json.loads((folder / "dataset.json").read_text()), "licence": "x"})
    )
    write(place.export / "a.nrrd", volume(1))
    assert place.add(name=None, modality=None).added == ["Scans_0001"]
    told = json.loads((folder / "dataset.json").read_text())
    assert told["numTraining"] == 3 and told["licence"] == "x" and told["channel_names"] == {"0": "CT"}


def test_odd_paths_and_links_in_circles(place):
    folder = place.export / "ä ö ü (1)" / ("n" * 100)
    write(folder / "b ild.nii.gz", volume(1))
    (folder / "round").symlink_to(place.export)
    shutil.copy(folder / "b ild.nii.gz", place.tmp / "single.nii.gz")
    summary = place.add(place.export, place.export, place.tmp / "single.nii.gz")
    assert len(summary.added) == 1 and [r.reason for r in summary.rejected] == ["duplicate"]


def test_what_was_added_can_be_planned_and_preprocessed(place, monkeypatch):
    monkeypatch.setattr(ExperimentPlanner, "static_estimate_VRAM_usage", staticmethod(lambda *args: 2e7))
    for i in range(3):
        write_series(
            place.export / str(i), volume(i, (12, 20, 18)) - 1000, uid=f"1.{i}", study=f"2.{i}", names="{:03d}.dcm"
        )
    place.add(modality=None)
    plan = planned(["Dataset500_Scans"], n_processes=0)
    assert plan.normalization_schemes == ("CTNormalization",)
    pool = prepare_sources(plan, ["Dataset500_Scans"], n_processes=0)
    assert [r.name for r in pool.cases] == ["Scans_0001", "Scans_0002", "Scans_0003"]


def test_the_command(place, capsys):
    write(place.export / "a_t1.nrrd", volume(1))
    write(place.export / "a_t2.nrrd", volume(2))
    arguments = ["-d", "500", "--name", "Scans", str(place.export), "--channels", "T1=_t1", "T2=_t2", "-np", "1"]
    assert command.main([*arguments, "--report", str(place.tmp / "r.csv")]) == 0
    out = capsys.readouterr().out
    assert out.endswith("Next, which trains nothing yet: nnssl_pretrain -d 500 -m mae --dry-run\n")
    assert "1 case added (Scans_0001)" in out and not (place.tmp / "r.csv").exists()
    assert command.main(["-d", "500", str(place.tmp / "nowhere")]) == 1
    assert "does not exist" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        command.main(["-d", "500", str(place.export), "--channels", "T1"])
    assert "not of the form NAME=PATTERN" in capsys.readouterr().err


@pytest.mark.slow
def test_in_processes(place):
    for i in range(3):
        write_series(place.export / str(i), volume(i), uid=f"1.{i}", study=f"2.{i}")
        write(place.export / f"{i}.nrrd", volume(10 + i))
    (place.export / "bad.nrrd").write_bytes(b"x")
    summary = place.add(n_processes=2)
    assert len(summary.added) == 6 and reasons(summary) == {"bad.nrrd": "it cannot be read"}
