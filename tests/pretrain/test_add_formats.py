"""What formats and headers ``nnssl_add_images`` reads, and which headers it refuses."""

from __future__ import annotations

import gzip

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
import tifffile
from exports import SHAPE, SPACING, reasons, same, volume, write

from nnssl.errors import NnsslError
from nnssl.pretrain.prepare.integrity import check_header, check_voxels, check_whole

AFFINE = np.diag([1.0, 1.5, 2.0, 1.0])


@pytest.mark.parametrize("ending", ["nii.gz", "nii", "nrrd", "mha", "mhd", "nhdr"])
def test_each_format_keeps_voxels_and_place(place, ending):
    write(place.export / f"a.{ending}")
    summary = place.add()
    assert summary.added == ["Scans_0001"] and summary.rejected == [] and place.files() == ["Scans_0001_0000.nii.gz"]
    same(place, "Scans_0001", volume())
    assert place.told() == {
        "channel_names": {"0": "CT"},
        "labels": {"background": 0},
        "numTraining": 1,
        "file_ending": ".nii.gz",
    }


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
        nibabel.save(nibabel.AnalyzeImage(array.T, np.diag([-1.0, 1.5, 2.0, 1.0])), str(e / "ct.img"))
    elif kind == "tiff":
        tifffile.imwrite(e / "ct.tif", array)
        (e / "ct.json").write_text('{"spacing": [2.0, 1.5, 1.0]}')
    elif kind == "imagej":
        metadata = {"spacing": 2000.0, "unit": "um", "axes": "ZYX"}
        tifffile.imwrite(e / "ct.tif", array, imagej=True, metadata=metadata, resolution=(1e-3, 1 / 1500))
    else:
        write(e / "ct.gipl", array)
    summary = place.guess()
    assert summary.added == ["Scans_0001"] and summary.rejected == []
    image = sitk.ReadImage(str(place.dataset / "imagesTr" / "Scans_0001_0000.nii.gz"))
    np.testing.assert_array_equal(sitk.GetArrayFromImage(image), array)
    assert image.GetSpacing() == pytest.approx(SPACING[::-1])


def test_a_tiff_without_a_voxel_size_says_what_to_write(place):
    tifffile.imwrite(place.export / "ct.tif", volume())
    with pytest.raises(NnsslError, match="a TIFF without a voxel size"):
        place.guess()
    assert "write it into ct.json" in (place.tmp / "Dataset500_Scans_not_added.csv").read_text()


def test_a_fourth_axis_of_one_volume_is_no_4d(place):
    affine = np.diag([-1.0, -1.5, 2.0, 1.0])
    affine[:3, 3] = -5, 7, 11
    data = volume(1).transpose(2, 1, 0)[..., None]
    nibabel.save(nibabel.Nifti1Image(data, affine), str(place.export / "a.nii.gz"))
    assert place.add().added == ["Scans_0001"]
    same(place, "Scans_0001", volume(1))


def test_files_that_itk_reads_are_accepted_and_cleaned(place):
    plain = write(place.export / "ct_plain.nii", volume(1))
    plain.rename(place.export / "ct_plain.nii.gz")
    trailing = write(place.export / "ct_trailing.nii.gz", volume(2))
    with open(trailing, "ab") as file:
        file.write(b"Mueller^Hans" * 20)
    two = write(place.export / "ct_two.nii.gz", volume(3))  # a stream of several members
    content = gzip.decompress(two.read_bytes())
    two.write_bytes(gzip.compress(content[:999]) + gzip.compress(content[999:]))
    summary = place.guess()
    assert len(summary.added) == 3 and summary.rejected == [] and summary.linked == 1
    for file in (place.dataset / "imagesTr").iterdir():
        assert b"Mueller" not in file.read_bytes() and not check_whole(str(file))


@pytest.mark.parametrize("ending", [".nii.gz", ".nii"])
@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_voxels_are_counted_however_large_and_packed(tmp_path, ending, kind):
    """Larger than what is read at once, and of an odd number of bytes before the voxels."""
    array = np.random.default_rng(0).normal(size=(70, 80, 90)).astype(kind)
    array[3, 4, 5:8], array[-1, -1, -1] = np.nan, np.inf
    content = bytearray(nibabel.Nifti1Image(array.T, np.eye(4)).to_bytes())
    content[108:112] = np.float32(359).tobytes()
    content[352:352] = bytes(7)
    pack = gzip.compress if ending == ".nii.gz" else bytes
    file = tmp_path / f"a{ending}"
    file.write_bytes(pack(bytes(content)))
    with pytest.raises(ValueError, match=f"^4 of {array.size} voxels are NaN or infinite$"):
        check_whole(str(file))
    content[359:] = np.nan_to_num(array, posinf=0).tobytes()
    file.write_bytes(pack(bytes(content)))
    assert check_whole(str(file)) is False
    file.write_bytes(pack(bytes(content)) + b"more")
    assert check_whole(str(file)) is True


# ---- headers ---------------------------------------------------------------------------------------------------------------


def nifti(path, *, pixdim=None, sform=None, data=None):
    nibabel.save(nibabel.Nifti1Image(volume().T if data is None else data, AFFINE), str(path))
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
    summary = place.guess()
    assert len(summary.added) == 1 and reasons(summary, place.export) == {"odd_ct.nii.gz": reason}
    with pytest.raises(ValueError, match="absurd|sheared|complex|too large"):
        check_header(str(bad))
        check_whole(str(bad))


def nrrd(path, directions="(1,0,0) (0,1,0) (0,0,1)", sizes="12 14 10"):
    head = f"NRRD0004\ntype: short\ndimension: 3\nsizes: {sizes}\nencoding: raw\nendian: little\nspace: left-posterior-superior\n"
    path.write_bytes(f"{head}space directions: {directions}\nspace origin: (0,0,0)\n\n".encode() + volume().tobytes())


def test_odd_nrrd_and_metaimage(place):
    write(place.export / "ct.nii.gz", volume(1))
    nrrd(place.export / "ct_big.nrrd", "(1e6,0,0) (0,1,0) (0,0,1)")
    nrrd(place.export / "ct_zero.nrrd", "(1,0,0) (0,0,0) (0,0,1)")
    nrrd(place.export / "ct_sheared.nrrd", "(1,0,0) (0.5,1,0) (0,0,1)")
    nrrd(place.export / "ct_huge.nrrd", "(0.05,0,0) (0,0.05,0) (0,0,0.05)", "90000 90000 90000")
    head = "ObjectType = Image\nNDims = 3\nBinaryData = True\nElementSpacing = 1 -1 1\nDimSize = 12 14 10\n"
    head += "ElementType = MET_SHORT\nElementDataFile = LOCAL\n"
    (place.export / "ct.mha").write_bytes(head.encode() + volume().tobytes())
    summary = place.guess()
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
        place.guess()
    with pytest.raises(ValueError, match="it is empty: all but 1 of its voxels have one value"):
        check_voxels([array])
    check_voxels([array, volume()])


def test_micro_ct_is_an_option(place):
    write(place.export / "ct.nii.gz", spacing=(0.02, 0.02, 0.02))
    with pytest.raises(NnsslError, match="absurd voxel size"):
        place.guess()
    assert "--least-spacing" in (place.tmp / "Dataset500_Scans_not_added.csv").read_text()
    assert len(place.guess(least_spacing=0.001).added) == 1
    check_header(str(place.dataset / "imagesTr" / "Scans_0001_0000.nii.gz"))
