"""What ``nnssl_add_images`` leaves out: label maps, test images, what is no volume or damaged; every file is accounted for."""

from __future__ import annotations

import csv
import os
import shutil

import numpy as np
import pytest
import SimpleITK as sitk
from exports import SHAPE, image_of, labels, nnunet_dataset, reasons, same, volume, write

from nnssl.errors import NnsslError
from nnssl.pretrain.images.kinds import label_path, looks_like_labels


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
    found = reasons(summary, e)
    twins = {"good.nrrd", "again.mha"} & set(found)
    assert len(twins) == 1 and found.pop(twins.pop()) == "duplicate"
    assert found == {
        "thin.nrrd": "fewer than 8 slices",
        "slice.nrrd": "a single slice",
        "flat.nii.gz": "a single slice",
        "four.nii.gz": "4D",
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
    assert ("four.nii.gz", "4D (see --four-d)") in {(os.path.basename(row[0]), row[1]) for row in table}
    assert summary.report == place.tmp / "Dataset500_Scans_not_added.csv"
    assert sorted(p.name for p in place.dataset.iterdir()) == ["dataset.json", "imagesTr", "nnssl_images.jsonl"]


@pytest.mark.parametrize("how, expected", [("split", [1, 2]), ("first", [1])])
def test_4d(place, how, expected):
    both = [volume(s) for s in (1, 2)]
    sitk.WriteImage(sitk.JoinSeries([image_of(v) for v in both]), str(place.export / "four.nii.gz"))
    summary = place.add(four_d=how)
    assert len(summary.added) == len(expected) and summary.rejected == [] and summary.linked == 0
    for case, seed in zip(summary.added, expected):
        same(place, case, volume(seed))


def test_nothing_usable_makes_no_dataset_and_the_table_names_files_by_whole_paths(place):
    (place.export / "a.txt").write_text("x")
    why = r"(?s)Nothing that can be added was found; why stands in .*csv.*1 file is not used"
    for folder in (place.export, os.path.relpath(place.export)):
        with pytest.raises(NnsslError, match=why):
            place.add(folder)
        assert not place.dataset.exists()
        with open(place.tmp / "Dataset500_Scans_not_added.csv", newline="") as file:
            rows = list(csv.reader(file))
        assert [row[:2] for row in rows[1:]] == [[str(place.export / "a.txt"), "no image format that is read"]]


def test_odd_paths_and_links_in_circles(place):
    folder = place.export / "ä ö ü (1)" / ("n" * 100)
    write(folder / "b ild.nii.gz", volume(1))
    (folder / "round").symlink_to(place.export)
    shutil.copy(folder / "b ild.nii.gz", place.tmp / "single.nii.gz")
    summary = place.add(place.export, place.export, place.tmp / "single.nii.gz")
    assert len(summary.added) == 1 and [r.reason for r in summary.rejected] == ["duplicate"]


def test_paths_that_are_no_text_are_lines_of_the_table(place):
    write(place.export / "ct.nii.gz")
    root = os.fsencode(place.export)
    os.mkdir(root + b"/M\xfcller")
    for name in (b"/M\xfcller/a.nii.gz", b"/M\xfcller/b.nii.gz", b"/M\xfcller.nii.gz"):
        with open(root + name, "wb") as file:
            file.write((place.export / "ct.nii.gz").read_bytes())
    summary = place.guess()
    assert len(summary.added) == 1
    assert sorted((r.reason, r.count) for r in summary.rejected) == [
        ("its path is no UTF-8 text: rename it", n) for n in (1, 2)
    ]
    assert "ller.nii.gz" in summary.report.read_text(encoding="utf-8") and not (place.dataset / "imagesTr_tmp").exists()
    with pytest.raises(NnsslError, match="is no UTF-8 text: rename the folder"):
        place.guess(os.fsdecode(root + b"/M\xfcller"))


# ---- label maps and test images --------------------------------------------------------------------------------------------


def test_a_totalsegmentator_folder_gives_its_images(place):
    for i in range(2):
        write(place.export / f"s{i:04d}" / "ct.nii.gz", volume(i))
        for k, organ in enumerate(("liver", "spleen")):
            write(place.export / f"s{i:04d}" / "segmentations" / f"{organ}.nii.gz", labels(1, 2 * i + k))
    summary = place.guess()
    assert len(summary.added) == 2 and place.told()["channel_names"] == {"0": "CT"}
    assert set(reasons(summary, place.export).values()) == {"looks like a label map"} and len(summary.rejected) == 4
    assert len(place.guess(keep=["label-maps"]).added) == 4 and place.guess(keep=["label-maps"]).known == 6


@pytest.mark.parametrize("names", [("CT",), ("T2",), ("T1", "FLAIR")])
def test_an_nnunet_dataset_gives_its_training_images(place, names):
    nnunet_dataset(place.export / "Dataset123_Other", names)
    summary = place.guess()
    assert len(summary.added) == 2 and list(place.told()["channel_names"].values()) == list(names)
    found = reasons(summary, place.export / "Dataset123_Other")
    assert {f.split(os.sep)[0]: r for f, r in found.items()} == {
        "dataset.json": "no image format that is read",
        "imagesTs": "test images of an nnU-Net dataset",
        "labelsTr": "looks like a label map",
        "labelsTs": "looks like a label map",
    }
    assert len(place.guess(keep=["test-images"]).added) == 2


def test_the_folder_of_labels_itself(place):
    nnunet_dataset(place.export / "Dataset123_Other", ("CT",))
    with pytest.raises(NnsslError, match="4 files are not used:\n +2 +looks like a label map.*\n +2 +test images"):
        place.guess(*(place.export / "Dataset123_Other" / f for f in ("labelsTr", "imagesTs")))


@pytest.mark.parametrize(
    "text, is_label",
    [
        ("a/ct.nii.gz", False),
        ("labels/a.nii.gz", True),
        ("labelsTr/a.nii.gz", True),
        ("s1/segmentations/liver.nii.gz", True),
        ("a_seg.nii.gz", True),
        ("a-label.nrrd", True),
        ("tumorMask.nii.gz", True),
        ("sub-01_desc-aseg_dseg.nii.gz", True),
        ("unlabelled/a.nii.gz", False),
        ("lung segmentation challenge/ct.nii.gz", False),
        ("a_masked.nii.gz", False),
        ("segmented_bold.nii.gz", False),
    ],
)
def test_paths_that_say_label(text, is_label):
    assert label_path(text) is is_label


def test_voxels_that_look_like_labels():
    many = np.kron(np.arange(216).reshape(6, 6, 6), np.ones((12, 12, 12), int))
    image = 300 + np.random.default_rng(0).normal(0, 40, SHAPE)
    assert looks_like_labels(labels(3)) and looks_like_labels(labels(3).astype(np.float64)) and looks_like_labels(many)
    assert not looks_like_labels(image.astype(np.int16)) and not looks_like_labels((image - 200).astype(np.uint8))
    assert not looks_like_labels(labels(3) * np.float32(0.3)) and not looks_like_labels(image.astype(np.float32) / 7)
    dark = np.zeros((24, 40, 40), np.uint8)  # an 8-bit image, most of it air
    dark[6:18, 8:32, 8:32] = np.random.default_rng(0).normal(90, 12, (12, 24, 24))
    assert not looks_like_labels(dark)


def test_a_label_map_without_a_name_is_known_by_its_voxels(place):
    write(place.export / "ct.nii.gz")
    write(place.export / "ct_a.nii.gz", labels())
    summary = place.guess()
    assert len(summary.added) == 1 and reasons(summary, place.export) == {"ct_a.nii.gz": "looks like a label map"}
