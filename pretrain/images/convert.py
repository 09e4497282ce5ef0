"""One image in its own format -> checked, and as NIfTI with voxels and geometry only; linked where the file is that already."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import nibabel
import numpy as np
import SimpleITK as sitk

from nnssl.pretrain.images.dcm2niix import Unconverted, convert
from nnssl.pretrain.images.items import Item, Task
from nnssl.pretrain.images.kinds import LABEL_MAP, looks_like_labels
from nnssl.pretrain.images.options import AddOptions
from nnssl.pretrain.images.other import read_nibabel, read_tiff
from nnssl.pretrain.prepare.integrity import check_header, check_spacing, check_voxels, check_whole, is_nifti2, quiet
from nnssl.pretrain.prepare.worker import voxel_hash
from nnssl.words import size_text

LARGEST_SPACING = 20.0  # voxel size in mm; with ``--least-spacing`` what a clinical scanner makes

HARMLESS = ("fsl", "itk", "spm", "nifti")
"""Beginnings of the description in a NIfTI header that name software and no patient."""

SAME_GEOMETRY = 1e-3

REASONS = {
    "truncated": "it is truncated",
    "voxels are NaN or infinite": "voxels are NaN or infinite",
    "absurd voxel size": "absurd voxel size",
    "sheared": "its matrix is sheared",
    "too large for 32-bit": "voxels are too large for 32-bit floating point",
    "is constant": "the image is constant",
    "it is empty": "all but a few voxels have one value",
    "complex": "its voxels are complex numbers",
    "colour": "colour (RGB)",
    "its header tells": "its header tells more voxels than the file holds",
    "its orientation": "its orientation is damaged",
    "a TIFF tells": "a TIFF without a voxel size",
}
"""What checks say -> the reason under which it is counted."""


class _No(Exception):
    """This image is not used: reason, detail."""


@dataclass(frozen=True)
class Made:
    """One case that is ready to be put into place: hash of its voxels, files of its channels, and how many of them are links."""

    sha256: str
    drafts: tuple[str, ...]
    linked: int


@dataclass(frozen=True)
class Result:
    """What became of a task: cases, or why there is none; ``fatal`` where nothing can be written at the moment."""

    task: Task
    made: tuple[Made, ...] = ()
    reason: str = ""
    detail: str = ""
    fatal: str = ""


def tells_nothing(path: str) -> bool:
    """Whether a ``.nii.gz`` file holds voxels and geometry only: no extension, no text, no file name in its gzip header."""
    with open(path, "rb") as file:
        start = file.read(4)
    if start[:2] != b"\x1f\x8b" or start[3] & 0b11100:  # extra field, name, comment
        return False
    try:
        header = nibabel.load(path).header
    except Exception:  # nibabel raises many kinds on damaged files
        return False
    if not isinstance(header, nibabel.Nifti1Header) or len(header.extensions):
        return False

    def text(key: str) -> str:
        return str(header[key].tobytes().strip(b"\0 "), "latin-1").lower() if key in header else ""

    software = not text("descrip") or text("descrip").startswith(HARMLESS)
    return software and text("aux_file") in ("", "none") and not (text("db_name") or text("data_type"))


def _plain(image: sitk.Image) -> sitk.Image:
    """Voxels and geometry, nothing else of the header; in a type that every NIfTI reader knows."""
    voxels = sitk.GetArrayFromImage(image)
    if voxels.dtype in (np.float64, np.int64, np.uint64):
        voxels = voxels.astype(np.float32)
    plain = sitk.GetImageFromArray(voxels)
    plain.CopyInformation(image)  # spacing, origin and directions only
    return plain


def _volumes(image: sitk.Image, four_d: str) -> list[sitk.Image]:
    components = image.GetNumberOfComponentsPerPixel()
    if components > 1:
        raise _No("colour (RGB)" if components in (3, 4) else "its voxels are vectors", f"{components} values")
    if "complex" in image.GetPixelIDTypeAsString():
        raise _No("its voxels are complex numbers")
    size = image.GetSize()
    if len(size) == 3:
        return [image]
    if len(size) == 2:
        raise _No("a single slice")
    if len(size) > 4:
        raise _No("it has more than four axes")
    if size[3] > 1 and four_d == "reject":
        raise _No("4D (see --four-d)", f"{size[3]} volumes")
    return [image[..., i] for i in range(size[3] if four_d == "split" else 1)]


def _same_place(images: Sequence[sitk.Image]) -> None:
    first = images[0]
    for other in images[1:]:
        same = first.GetSize() == other.GetSize() and all(
            np.allclose(getattr(first, what)(), getattr(other, what)(), atol=SAME_GEOMETRY, rtol=SAME_GEOMETRY)
            for what in ("GetSpacing", "GetOrigin", "GetDirection")
        )
        if not same:
            raise _No("its channels differ in size or place: register and resample them first")


@dataclass(frozen=True)
class Converter:
    """Makes the files of one case in a temporary folder, on the file system of the dataset. Pickles."""

    asked: AddOptions
    temporary: Path

    @property
    def _limits(self) -> tuple[float, float]:
        return self.asked.least_spacing, LARGEST_SPACING

    def __call__(self, task: Task) -> Result:
        """Do one task; never raises but for Ctrl-C."""
        try:
            with quiet():
                return Result(task, tuple(self._cases(task)))
        except _No as error:
            reason, *detail = error.args
            return Result(task, reason=reason, detail="; ".join(detail))
        except MemoryError:
            return Result(task, fatal="memory")
        except (OSError, RuntimeError) as error:  # RuntimeError: ITK, while it wrote
            return Result(
                task, fatal="disk" if self._full() else f"{type(error).__name__}: {error}".strip().splitlines()[-1]
            )

    def _full(self) -> bool:
        return shutil.disk_usage(self.temporary).free < 1 << 24

    def _cases(self, task: Task) -> list[Made]:
        read, pure = zip(*(self._read(item) for item in task.items))
        channels = [_volumes(image, self.asked.four_d) for image in read]
        if len(channels) > 1 and any(len(volumes) > 1 for volumes in channels):
            raise _No("4D, which cannot be a channel")
        made = []
        for i, images in enumerate(zip(*channels)):
            for image in images:
                self._check(image)
            _same_place(images)
            voxels = np.stack([sitk.GetArrayViewFromImage(image).astype(np.float32) for image in images])
            drafts, linked = [], 0
            for c, (item, image) in enumerate(zip(task.items, images)):
                draft = str(self.temporary / f"{task.key[:32]}_{i:04d}_{c:04d}.nii.gz")
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(draft)
                if image.GetDimension() == read[c].GetDimension() and self._linked(item, draft, pure[c]):
                    linked += 1
                else:
                    sitk.WriteImage(_plain(image), draft, useCompression=True)
                    with open(draft, "rb+") as file:
                        os.fsync(file.fileno())
                drafts.append(draft)
            made.append(Made(voxel_hash(voxels), tuple(drafts), linked))
        return made

    def _check(self, image: sitk.Image) -> None:
        size, least = image.GetSize(), self.asked.least_slices
        if min(size) == 1:
            raise _No("a single slice")
        if min(size) < least:
            raise _No(f"fewer than {least} slices", size_text(size))
        voxels = sitk.GetArrayViewFromImage(image)
        try:
            check_spacing(image.GetSpacing(), size, self._limits)
            check_voxels([voxels])
        except ValueError as error:
            raise _unreadable(error) from None
        labels = "" if "label-maps" in self.asked.keep else looks_like_labels(voxels)
        if labels:
            raise _No(LABEL_MAP, labels)

    def _linked(self, item: Item, draft: str, pure: bool) -> bool:
        """Link a file that nnU-Net reads as it is; False where it has to be written anew."""
        file, link = item.files[0], self.asked.link
        if item.dicom or not file.lower().endswith(".nii.gz") or link == "never" or is_nifti2(file):
            return False
        if link == "symbolic":
            os.symlink(file, draft)
            return True
        if not (pure and tells_nothing(file)):
            return False
        try:
            os.link(os.path.realpath(file), draft)
        except OSError:  # another file system, or one without hard links
            return False
        return True

    def _read(self, item: Item) -> tuple[sitk.Image, bool]:
        """The image, and whether its file holds nothing beside it."""
        file = item.files[0]
        try:
            if item.dicom:
                return convert(item, self.temporary), False
            if file.lower().endswith((".tif", ".tiff")):
                return read_tiff(file), False
            if file.lower().endswith((".mgz", ".mgh")):
                return read_nibabel(file), False
            check_header(file, self._limits, nnunet=False)
            extra = check_whole(file)
            return (read_nibabel(file) if is_nifti2(file) else sitk.ReadImage(file)), not extra
        except Unconverted as error:
            raise _No("dcm2niix does not convert it as its headers tell", str(error)) from None
        except (RuntimeError, ValueError, OSError, nibabel.filebasedimages.ImageFileError) as error:
            if isinstance(error, OSError) and item.dicom and self._full():
                raise
            raise _unreadable(error) from None


def _unreadable(error: Exception) -> _No:
    """Why a reader or a check refused a file."""
    text = (str(error).strip().splitlines() or [""])[-1]
    hint = " (see --least-spacing)" if "taken for possible" in text else ""
    reason = next((reason for known, reason in REASONS.items() if known in text), "it cannot be read")
    return _No(reason, text + hint)
