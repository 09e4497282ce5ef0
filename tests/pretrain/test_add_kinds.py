"""What ``nnssl_add_images`` keeps out: label maps, test images, odd headers and names; and which channels it finds by itself."""

from __future__ import annotations

import gzip
import json
import os
from types import SimpleNamespace

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
import tifffile

from nnssl.errors import NnsslError
from nnssl.pretrain.images import add_images
from nnssl.pretrain.images import cli as command
from nnssl.pretrain.images.kinds import label_path, looks_like_labels, modality_of_path
from nnssl.pretrain.prepare.channels import modality_of, same_name
from nnssl.pretrain.prepare.integrity import check_header, check_voxels, check_whole

SHAPE = (12, 14, 16)  # (z, y, x)
AFFINE = np.diag([1.0, 1.5, 2.0, 1.0])


def volume(seed=0, dtype=np.int16):
    return (300 + np.random.default_rng(seed).normal(0, 40, SHAPE)).astype(dtype)


def labels(n=3, seed=0):
    out = np.zeros(SHAPE, np.uint8)
    for i in range(1, n + 1):
        z, y, x = np.random.default_rng((seed, i)).integers(0, 9, 3)
        out[z : z + 3, y : y + 5, x : x + 6] = i
    return out


def write(path, array=None, spacing=(1.0, 1.5, 2.0)):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = sitk.GetImageFromArray(volume() if array is None else array)
    image.SetSpacing(spacing)
    sitk.WriteImage(image, str(path))
    return path


@pytest.fixture
def place(nnunet_env, tmp_path, monkeypatch) -> SimpleNamespace:
    monkeypatch.chdir(tmp_path)
    export, dataset = tmp_path / "export", nnunet_env.raw / "Dataset500_Scans"
    export.mkdir()

    def add(*folders, **options):
        return add_images(500, list(folders) or [export], **{"name": "Scans", "n_processes": 0, **options})

    def told():
        return json.loads((dataset / "dataset.json").read_text())["channel_names"]

    return SimpleNamespace(export=export, dataset=dataset, add=add, told=told, tmp=tmp_path, env=nnunet_env)


def reasons(summary, root):
    return {os.path.relpath(r.file, root): r.reason.partition(" (see")[0] for r in summary.rejected}


# ---- label maps and test images ----------------------------------------------------------------------------------------------


def test_a_totalsegmentator_folder_gives_its_images(place):
    for i in range(2):
        write(place.export / f"s{i:04d}" / "ct.nii.gz", volume(i))
        for k, organ in enumerate(("liver", "spleen")):
            write(place.export / f"s{i:04d}" / "segmentations" / f"{organ}.nii.gz", labels(1, 2 * i + k))
    summary = place.add()
    assert len(summary.added) == 2 and place.told() == {"0": "CT"}
    assert set(reasons(summary, place.export).values()) == {"looks like a label map"} and len(summary.rejected) == 4
    assert len(place.add(keep=["label-maps"]).added) == 4 and place.add(keep=["label-maps"]).known == 6


def brats(folder, i, channels=("t1", "t1ce", "t2", "flair")):
    for c, name in enumerate(channels):
        write(folder / f"BraTS_{i:03d}" / f"BraTS_{i:03d}_{name}.nii.gz", volume(10 * i + c))
    write(folder / f"BraTS_{i:03d}" / f"BraTS_{i:03d}_seg.nii.gz", labels(3, i))


def test_a_brats_folder_gives_its_images_and_the_longest_match_counts(place):
    for i in range(2):
        brats(place.export, i)
    summary = place.add(channels={"T1": "_t1", "T1CE": "_t1ce", "T2": "_t2", "FLAIR": "_flair"})
    assert len(summary.added) == 2 and set(reasons(summary, place.export).values()) == {"looks like a label map"}
    wanted = {(10 * i, 10 * i + 1, 10 * i + 2, 10 * i + 3) for i in range(2)}
    found = set()
    for case in summary.added:
        files = [place.dataset / "imagesTr" / f"{case}_{c:04d}.nii.gz" for c in range(4)]
        arrays = [sitk.GetArrayFromImage(sitk.ReadImage(str(f))) for f in files]
        found.add(tuple(next(s for s in range(20) if np.array_equal(a, volume(s))) for a in arrays))
    assert found == wanted


def nnunet_dataset(folder, names, cases=2):
    for i in range(cases):
        for c in range(len(names)):
            write(folder / "imagesTr" / f"c{i}_{c:04d}.nii.gz", volume(10 * i + c))
            write(folder / "imagesTs" / f"t{i}_{c:04d}.nii.gz", volume(100 + 10 * i + c))
        write(folder / "labelsTr" / f"c{i}.nii.gz", labels(2, i))
        write(folder / "labelsTs" / f"t{i}.nii.gz", labels(2, i))
    told = {str(c): n for c, n in enumerate(names)}
    content = {
        "channel_names": told,
        "labels": {"background": 0, "a": 1},
        "numTraining": cases,
        "file_ending": ".nii.gz",
    }
    (folder / "dataset.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize("names", [("CT",), ("T2",), ("T1", "FLAIR")])
def test_an_nnunet_dataset_gives_its_training_images(place, names):
    nnunet_dataset(place.export / "Dataset123_Other", names)
    summary = place.add()
    assert len(summary.added) == 2 and list(place.told().values()) == list(names)
    found = reasons(summary, place.export / "Dataset123_Other")
    assert {f.split(os.sep)[0]: r for f, r in found.items()} == {
        "dataset.json": "no image format that is read",
        "imagesTs": "test images of an nnU-Net dataset",
        "labelsTr": "looks like a label map",
        "labelsTs": "looks like a label map",
    }
    assert len(place.add(keep=["test-images"]).added) == 2


def test_the_folder_of_labels_itself(place):
    nnunet_dataset(place.export / "Dataset123_Other", ("CT",))
    with pytest.raises(NnsslError, match="4 files are not used:\n +2 +looks like a label map.*\n +2 +test images"):
        place.add(*(place.export / "Dataset123_Other" / f for f in ("labelsTr", "imagesTs")))


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
    assert looks_like_labels(labels(3)) and looks_like_labels(labels(3).astype(np.float64)) and looks_like_labels(many)
    assert not looks_like_labels(volume()) and not looks_like_labels(volume(dtype=np.uint8))
    assert not looks_like_labels(labels(3) * np.float32(0.3)) and not looks_like_labels(volume().astype(np.float32) / 7)
    dark = np.zeros((24, 40, 40), np.uint8)  # an 8-bit image, most of it air
    dark[6:18, 8:32, 8:32] = np.random.default_rng(0).normal(90, 12, (12, 24, 24))
    assert not looks_like_labels(dark)


def test_a_label_map_without_a_name_is_known_by_its_voxels(place):
    write(place.export / "ct.nii.gz")
    write(place.export / "ct_a.nii.gz", labels())
    summary = place.add()
    assert len(summary.added) == 1 and reasons(summary, place.export) == {"ct_a.nii.gz": "looks like a label map"}


# ---- names -----------------------------------------------------------------------------------------------------------------


def test_paths_that_are_no_text_are_lines_of_the_table(place):
    write(place.export / "ct.nii.gz")
    root = os.fsencode(place.export)
    os.mkdir(root + b"/M\xfcller")
    for name in (b"/M\xfcller/a.nii.gz", b"/M\xfcller/b.nii.gz", b"/M\xfcller.nii.gz"):
        with open(root + name, "wb") as file:
            file.write((place.export / "ct.nii.gz").read_bytes())
    summary = place.add()
    assert len(summary.added) == 1
    assert sorted((r.reason, r.count) for r in summary.rejected) == [
        ("its path is no UTF-8 text: rename it", n) for n in (1, 2)
    ]
    assert "ller.nii.gz" in summary.report.read_text(encoding="utf-8") and not (place.dataset / "imagesTr_tmp").exists()
    with pytest.raises(NnsslError, match="is no UTF-8 text: rename the folder"):
        place.add(os.fsdecode(root + b"/M\xfcller"))


# ---- headers ---------------------------------------------------------------------------------------------------------------


def nifti(path, *, pixdim=None, sform=None, data=None, cls=nibabel.Nifti1Image):
    image = cls(volume().T if data is None else data, AFFINE)
    nibabel.save(image, str(path))
    content = bytearray(gzip.decompress(path.read_bytes()))
    if pixdim is not None:
        content[80:92] = np.array(pixdim, np.float32).tobytes()
        content[252:256] = bytes(4)
    if sform is not None:
        content[280:328] = np.array(sform, np.float32).tobytes()
    path.write_bytes(gzip.compress(bytes(content)))
    return path


SHEARED = [[1, 0.5, 0, 0], [0, 1.5, 0, 0], [0, 0, 2, 0]]
ODD = {
    "absurd voxel size": [
        {"pixdim": p} for p in ([1e6] * 3, [1e-7] * 3, [1, 0, 1], [1, -1, 1], [1, np.inf, 1], [1, np.nan, 1])
    ],
    "its matrix is sheared": [{"sform": SHEARED}],
    "its voxels are complex numbers": [{"data": volume().T.astype(np.complex64)}],
    "voxels are too large for 32-bit floating point": [{"data": volume().T * 1e300}],
}


@pytest.mark.parametrize("reason, options", [(r, o) for r, several in ODD.items() for o in several])
def test_odd_headers(place, reason, options):
    write(place.export / "ct.nii.gz", volume(1))
    bad = nifti(place.export / "odd_ct.nii.gz", **options)
    summary = place.add()
    assert len(summary.added) == 1 and reasons(summary, place.export) == {"odd_ct.nii.gz": reason}
    with pytest.raises(ValueError, match="absurd|sheared|complex|too large"):
        check_header(str(bad))
        check_whole(str(bad))


def nrrd(path, directions="(1,0,0) (0,1,0) (0,0,1)", sizes="16 14 12"):
    head = f"NRRD0004\ntype: short\ndimension: 3\nsizes: {sizes}\nencoding: raw\nendian: little\nspace: left-posterior-superior\n"
    path.write_bytes(f"{head}space directions: {directions}\nspace origin: (0,0,0)\n\n".encode() + volume().tobytes())
    return path


def test_odd_nrrd_and_metaimage(place):
    write(place.export / "ct.nii.gz", volume(1))
    nrrd(place.export / "ct_big.nrrd", "(1e6,0,0) (0,1,0) (0,0,1)")
    nrrd(place.export / "ct_zero.nrrd", "(1,0,0) (0,0,0) (0,0,1)")
    nrrd(place.export / "ct_sheared.nrrd", "(1,0,0) (0.5,1,0) (0,0,1)")
    nrrd(place.export / "ct_huge.nrrd", "(0.05,0,0) (0,0.05,0) (0,0,0.05)", "90000 90000 90000")
    head = "ObjectType = Image\nNDims = 3\nBinaryData = True\nElementSpacing = 1 -1 1\nDimSize = 16 14 12\n"
    head += "ElementType = MET_SHORT\nElementDataFile = LOCAL\n"
    (place.export / "ct.mha").write_bytes(
        f"{head}ElementType = MET_SHORT\nElementDataFile = LOCAL\n".encode() + volume().tobytes()
    )
    summary = place.add()
    assert len(summary.added) == 1
    assert reasons(summary, place.export) == {
        "ct_big.nrrd": "absurd voxel size",
        "ct_zero.nrrd": "absurd voxel size",
        "ct_sheared.nrrd": "its matrix is sheared",
        "ct_huge.nrrd": "its header tells more voxels than the file holds",
        "ct.mha": "absurd voxel size",
    }


def test_one_voxel_is_no_image(place):
    array = np.zeros(SHAPE, np.int16)
    array[5, 6, 7] = 1000
    write(place.export / "ct.nii.gz", array)
    with pytest.raises(NnsslError, match="all but a few voxels have one value"):
        place.add()
    with pytest.raises(ValueError, match="it is empty: all but 1 of its voxels have one value"):
        check_voxels([array])
    check_voxels([array, volume()])


def test_micro_ct_is_an_option(place):
    write(place.export / "ct.nii.gz", spacing=(0.02, 0.02, 0.02))
    with pytest.raises(NnsslError, match="absurd voxel size"):
        place.add()
    assert "--least-spacing" in (place.tmp / "Dataset500_Scans_not_added.csv").read_text()
    assert len(place.add(least_spacing=0.001).added) == 1
    check_header(str(place.dataset / "imagesTr" / "Scans_0001_0000.nii.gz"))


def same(place, array, case="Scans_0001"):
    image = sitk.ReadImage(str(place.dataset / "imagesTr" / f"{case}_0000.nii.gz"))
    np.testing.assert_array_equal(sitk.GetArrayFromImage(image), array)
    assert image.GetSpacing() == pytest.approx((1.0, 1.5, 2.0))


def test_files_that_itk_reads_are_accepted_and_cleaned(place):
    plain = write(place.export / "ct_plain.nii", volume(1))
    plain.rename(place.export / "ct_plain.nii.gz")
    trailing = write(place.export / "ct_trailing.nii.gz", volume(2))
    with open(trailing, "ab") as file:
        file.write(b"Mueller^Hans" * 20)
    two = write(place.export / "ct_two.nii.gz", volume(3))  # a stream of several members
    content = gzip.decompress(two.read_bytes())
    two.write_bytes(gzip.compress(content[:999]) + gzip.compress(content[999:]))
    summary = place.add()
    assert len(summary.added) == 3 and summary.rejected == [] and summary.linked == 1
    for file in (place.dataset / "imagesTr").iterdir():
        assert b"Mueller" not in file.read_bytes() and not check_whole(str(file))


@pytest.mark.parametrize("kind", ["nifti2", "nifti2.gz", "mgz", "pair", "analyze", "tiff", "imagej", "gipl"])
def test_other_formats(place, kind):
    array, e = volume(4), place.export
    if kind.startswith("nifti2"):
        nibabel.save(nibabel.Nifti2Image(array.T, AFFINE), str(e / ("ct.nii.gz" if kind.endswith("gz") else "ct.nii")))
    elif kind == "mgz":
        nibabel.save(nibabel.MGHImage(array.T, AFFINE), str(e / "ct.mgz"))
    elif kind == "pair":
        nibabel.save(nibabel.Nifti1Pair(array.T, AFFINE), str(e / "ct.img"))
    elif kind == "analyze":
        write(e / "ct.nii", array)
        nibabel.save(nibabel.AnalyzeImage(array.T, np.diag([-1.0, 1.5, 2.0, 1.0])), str(e / "ct.img"))
        (e / "ct.nii").unlink()
    elif kind == "tiff":
        tifffile.imwrite(e / "ct.tif", array)
        (e / "ct.json").write_text('{"spacing": [2.0, 1.5, 1.0]}')
    elif kind == "imagej":
        metadata = {"spacing": 2000.0, "unit": "um", "axes": "ZYX"}
        tifffile.imwrite(e / "ct.tif", array, imagej=True, metadata=metadata, resolution=(1e-3, 1 / 1500))
    else:
        write(e / "ct.gipl", array)
    summary = place.add()
    assert summary.added == ["Scans_0001"] and summary.rejected == []
    same(place, array)


def test_a_tiff_without_a_voxel_size_says_what_to_write(place):
    tifffile.imwrite(place.export / "ct.tif", volume())
    with pytest.raises(NnsslError, match="a TIFF without a voxel size"):
        place.add()
    assert "write it into ct.json" in (place.tmp / "Dataset500_Scans_not_added.csv").read_text()


# ---- channels --------------------------------------------------------------------------------------------------------------


def test_spellings():
    assert same_name("MR", "MRI") and same_name("T1w", "t1") and same_name("T1-CE", "T1Gd") and same_name("PT", "PET")
    assert not same_name("T1", "T2") and not same_name("CT", "MR") and same_name("my channel", "My_Channel")
    assert [modality_of(n) for n in ("MRI", "FLAIR", "ct", "PET", "other")] == ["MR", "MR", "CT", "PT", ""]
    assert [
        modality_of_path(p) for p in ("s/ct.nii.gz", "a_t1ce.nii", "a_flair.nii.gz", "a_ct_t1.nii", "act.nii.gz")
    ] == [
        *("CT", "MR", "MR", "", ""),
    ]


@pytest.mark.parametrize("channel, files", [("MRI", "mr"), ("CT", "ct"), ("T2w", "a")])
def test_the_target_names_the_channel(place, channel, files):
    nnunet_dataset(place.env.raw / "Dataset501_Target", (channel,))
    write(place.export / f"{files}.nii.gz", volume(7))
    summary = place.add(target=501)
    assert len(summary.added) == 1 and place.told() == {"0": channel}
    assert summary.report is None and not list(place.tmp.glob("*.csv"))  # nothing to list, no table


def test_images_of_another_kind_than_the_target(place):
    nnunet_dataset(place.env.raw / "Dataset501_Target", ("MRI",))
    write(place.export / "ct.nii.gz", volume(7))
    write(place.export / "b_t1.nii.gz", volume(8))
    summary = place.add(target=501)
    assert len(summary.added) == 1 and reasons(summary, place.export) == {"ct.nii.gz": "another modality"}
    with pytest.raises(NnsslError, match="has the channel MRI, not CT"):
        place.add(target=501, modality="CT")


def test_a_target_with_several_channels(place):
    nnunet_dataset(place.env.raw / "Dataset501_Target", ("FLAIR", "T1w", "T1Gd"))
    for i in range(2):
        brats(place.export, i)
    with pytest.raises(
        NnsslError, match="Dataset501_Target has 3 channels: give a pattern for each, --channels FLAIR=_flair"
    ):
        place.add(target=501)
    with pytest.raises(NnsslError, match="has 3 channels .FLAIR, T1w, T1Gd., not T1, T2"):
        place.add(target=501, channels={"T1": "_t1", "T2": "_t2"})
    summary = place.add(target=501, channels={"T1": "_t1", "T1CE": "_t1ce", "FLAIR": "_flair"})
    assert len(summary.added) == 2 and list(place.told().values()) == ["FLAIR", "T1w", "T1Gd"]


def test_files_that_do_not_tell(place):
    write(place.export / "a.nii.gz")
    with pytest.raises(NnsslError, match="do not tell what kind of images they are.*-t"):
        place.add()
    assert not place.dataset.exists()


def test_the_command_says_what_it_did(place, capsys):
    nnunet_dataset(place.env.raw / "Dataset501_Target", ("MRI",))
    write(place.export / "a.nii.gz", volume(1))
    write(place.export / "b_mask.nii.gz", labels())
    assert command.main(["-d", "500", "--name", "Scans", "-t", "501", "-np", "1", str(place.export)]) == 0
    told = capsys.readouterr().out
    assert "1 case added (Scans_0001)" in told and "links to your files" in told and "1 file is in these cases" in told
    assert "1 file is not used:\n       1  looks like a label map (see --keep label-maps)" in told
    assert command.main(["-d", "500", "-np", "1", "--keep", "label-maps", str(place.export)]) == 0
    told = capsys.readouterr().out
    assert "added before" in told and "not used" not in told and not list(place.tmp.glob("*.csv"))
