"""Images as hospitals export them, and ``add_images`` on them: what the tests of ``nnssl_add_images`` share."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

from nnssl.pretrain.images import add_images

SHAPE, SPACING, ORIGIN = (10, 14, 12), (2.0, 1.5, 1.0), (5.0, -7.0, 11.0)
"""(z, y, x); the origin (x, y, z)."""
SECRET = "Mueller^Hans"


def volume(seed=0, shape=SHAPE, dtype=np.int16) -> np.ndarray:
    body = np.zeros(shape)
    body[..., 2:-2, 2:-2] = 400
    return (body + np.random.default_rng(seed).normal(0, 30, shape)).astype(dtype)


def labels(n=3, seed=0) -> np.ndarray:
    """A label map with ``n`` boxes."""
    out = np.zeros(SHAPE, np.uint8)
    for i in range(1, n + 1):
        z, y, x = np.random.default_rng((seed, i)).integers(0, 7, 3)
        out[z : z + 3, y : y + 5, x : x + 5] = i
    return out


def image_of(array, spacing=SPACING) -> sitk.Image:
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(spacing[::-1])
    image.SetOrigin(ORIGIN[: array.ndim])
    return image


def write(path, array=None, spacing=SPACING, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(image_of(volume() if array is None else array, spacing), str(path), **options)
    return path


def header(kind=CTImageStorage, modality="CT", *, series="", study="", shape=SHAPE) -> pydicom.Dataset:
    """A DICOM header with a patient's name in it."""
    d = pydicom.Dataset()
    d.file_meta = pydicom.dataset.FileMetaDataset()
    d.file_meta.MediaStorageSOPClassUID, d.file_meta.TransferSyntaxUID = kind, ExplicitVRLittleEndian
    d.file_meta.MediaStorageSOPInstanceUID = d.SOPInstanceUID = generate_uid()
    d.SOPClassUID, d.Modality, d.ImageType = kind, modality, ["ORIGINAL", "PRIMARY", "AXIAL"]
    d.PatientName, d.PatientID, d.StudyDate, d.StudyTime = SECRET, "4711", "20260101", "101010"
    d.SeriesInstanceUID, d.StudyInstanceUID = series or generate_uid(), study or generate_uid()
    d.SeriesDescription = "abdomen"
    d.SamplesPerPixel, d.PhotometricInterpretation = 1, "MONOCHROME2"
    d.Rows, d.Columns = shape[1:]
    d.BitsAllocated = d.BitsStored = 16
    d.HighBit, d.PixelRepresentation = 15, 1
    return d


def series(
    folder,
    array=None,
    *,
    edit=lambda d, i: None,
    places=None,
    modality="CT",
    uid="",
    study="",
    names="IM{:04d}",
    **tags,
) -> Path:
    """One DICOM file a slice; the order of names is not that of places.

    ``places``: z or (x, y, z) of each slice in mm. ``tags``: elements of all headers. ``edit(header, i)`` changes one, and leaves
    it out by returning False.
    """
    folder.mkdir(parents=True, exist_ok=True)
    array = volume() if array is None else array
    uid, study = uid or generate_uid(), study or generate_uid()
    for i, plane in enumerate(array):
        place = ORIGIN[2] + SPACING[0] * i if places is None else places[i]
        d = header(modality=modality, series=uid, study=study, shape=array.shape)
        d.InstanceNumber, d.PixelSpacing, d.SliceThickness = i + 1, list(SPACING[1:]), SPACING[0]
        d.ImagePositionPatient = list(place if isinstance(place, tuple) else (*ORIGIN[:2], place))
        d.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
        d.RescaleSlope, d.RescaleIntercept = 1, 0
        d.PixelData = np.ascontiguousarray(plane).tobytes()
        d.update(tags)
        if edit(d, i) is not False:
            d.save_as(folder / names.format(len(array) - i), enforce_file_format=True)
    return folder


def place_of(env, tmp) -> SimpleNamespace:
    """A folder to fill with an export, the dataset that it becomes, ``add(...)``, and ``guess(...)`` without a modality."""
    export, dataset = tmp / "export" / "Mueller_Hans", env.raw / "Dataset500_Scans"
    export.mkdir(parents=True)

    def guess(*folders, **options):
        options = {"dataset": 500, "name": "Scans", "n_processes": 0, **options}
        return add_images(options.pop("dataset"), list(folders) or [export], **options)

    def add(*folders, **options):
        return guess(*folders, **{"modality": "CT", **options})

    def files():
        return sorted(p.name for p in (dataset / "imagesTr").iterdir())

    def read(case, channel=0):
        image = sitk.ReadImage(str(dataset / "imagesTr" / f"{case}_{channel:04d}.nii.gz"))
        return sitk.DICOMOrient(image, "LPS")  # dcm2niix stores rows from the back to the front

    def told():
        return json.loads((dataset / "dataset.json").read_text())

    return SimpleNamespace(
        export=export, dataset=dataset, add=add, guess=guess, files=files, read=read, told=told, env=env, tmp=tmp
    )


def reasons(summary, root) -> dict[str, str]:
    """File below ``root`` -> why it is not used, without the advice."""
    return {os.path.relpath(r.file, root): r.reason.partition(" (see")[0] for r in summary.rejected}


def same(place, case, array, channel=0, spacing=SPACING, origin=ORIGIN) -> None:
    """A case holds this array at its place."""
    image = place.read(case, channel)
    np.testing.assert_allclose(sitk.GetArrayFromImage(image), array, rtol=1e-6)
    assert image.GetSpacing() == pytest.approx(spacing[::-1]) and image.GetOrigin() == pytest.approx(origin)


def holds(place, *arrays) -> None:
    """The cases are these arrays, in any order."""
    found = [sitk.GetArrayFromImage(place.read(name[:-12])) for name in place.files()]
    assert len(found) == len(arrays)
    for array in arrays:
        assert any(np.array_equal(f, array) for f in found)


def nnunet_dataset(folder, names, cases=2) -> Path:
    """A labelled dataset of nnU-Net with test images."""
    for i in range(cases):
        for c in range(len(names)):
            write(folder / "imagesTr" / f"c{i}_{c:04d}.nii.gz", volume(10 * i + c))
            write(folder / "imagesTs" / f"t{i}_{c:04d}.nii.gz", volume(100 + 10 * i + c))
        write(folder / "labelsTr" / f"c{i}.nii.gz", labels(2, i))
        write(folder / "labelsTs" / f"t{i}.nii.gz", labels(2, i))
    channels = {str(c): n for c, n in enumerate(names)}
    known = {"labels": {"background": 0, "a": 1}, "numTraining": cases, "file_ending": ".nii.gz"}
    (folder / "dataset.json").write_text(json.dumps({"channel_names": channels, **known}))
    return folder


def brats(folder, i, channels=("t1", "t1ce", "t2", "flair")) -> None:
    for c, name in enumerate(channels):
        write(folder / f"BraTS_{i:03d}" / f"BraTS_{i:03d}_{name}.nii.gz", volume(10 * i + c))
    write(folder / f"BraTS_{i:03d}" / f"BraTS_{i:03d}_seg.nii.gz", labels(3, i))
