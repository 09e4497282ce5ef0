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

from nnssl.pretrain.images.dcm2niix import Unconverted, convert, joined
from nnssl.pretrain.images.items import Item, Task
from nnssl.pretrain.images.kinds import LABEL_MAP, looks_like_labels
from nnssl.pretrain.images.other import read_nibabel, read_tiff
from nnssl.pretrain.prepare.integrity import check_header, check_spacing, check_voxels, check_whole, is_nifti2
from nnssl.pretrain.prepare.worker import voxel_hash
from nnssl.words import size_text

LINKS = ("auto", "symbolic", "never")
"""Whether NIfTI files are linked: by hard link where their header tells nothing of a patient, as they are, or not at all."""

LEAST_SPACING, LARGEST_SPACING = 0.04, 20.0
"""Voxel sizes in mm that a clinical scanner makes."""

HARMLESS = ("", "fsl", "itk", "spm", "nifti")
"""Beginnings of the description in a NIfTI header that name software and no patient."""

SAME_GEOMETRY = 1e-3

REASONS = {
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
    """One case that is ready to be put into place.

    Attributes:
        sha256: hash of its voxels, see :func:`nnssl.pretrain.prepare.worker.voxel_hash`.
        drafts: its channels, in the temporary folder.
        linked: channels that are links.
    """

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
    texts = {k: bytes(header[k].tobytes()).rstrip(b"\0 ").decode("latin-1").lower() for k in ("descrip", "aux_file")}
    old = {k: bytes(header[k].tobytes()).strip(b"\0 ") for k in ("db_name", "data_type") if k in header}
    software = any(texts["descrip"].startswith(h) if h else not texts["descrip"] for h in HARMLESS)
    return software and texts["aux_file"] in ("", "none") and not any(old.values())


def _plain(image: sitk.Image) -> sitk.Image:
    """Voxels and geometry, nothing else of the header; in a type that every NIfTI reader knows."""
    voxels = sitk.GetArrayFromImage(image)
    if voxels.dtype in (np.float64, np.int64, np.uint64):
        voxels = voxels.astype(np.float32)
    plain = sitk.GetImageFromArray(voxels)
    plain.CopyInformation(image)  # spacing, origin and directions only
    return plain


def _volumes(image: sitk.Image, four_d: str) -> list[sitk.Image]:
    if image.GetNumberOfComponentsPerPixel() > 1:
        colour = image.GetNumberOfComponentsPerPixel() in (3, 4)
        raise _No(
            "colour (RGB)" if colour else "its voxels are vectors", f"{image.GetNumberOfComponentsPerPixel()} values"
        )
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


def _check(image: sitk.Image, least: int, limits: tuple[float, float], keep_labels: bool) -> None:
    size, spacing = image.GetSize(), image.GetSpacing()
    if min(size) == 1:
        raise _No("a single slice")
    if min(size) < least:
        raise _No(f"fewer than {least} slices", size_text(size))
    voxels = sitk.GetArrayViewFromImage(image)
    try:
        check_spacing(spacing, size, limits)
        check_voxels([voxels])
    except ValueError as error:
        raise _No(*_unreadable(str(error))) from None
    labels = "" if keep_labels else looks_like_labels(voxels)
    if labels:
        raise _No(LABEL_MAP, labels)


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
    """Makes the files of one case in a temporary folder. Pickles.

    Args:
        temporary: folder on the file system of the dataset.
        four_d: see :data:`nnssl.pretrain.images.items.FOUR_D`.
        least: slices that make a volume.
        link: see :data:`LINKS`.
        least_spacing: mm; smaller voxel sizes are taken for a damaged header.
        keep_labels: keep what looks like a label map.
    """

    temporary: Path
    four_d: str
    least: int
    link: str
    least_spacing: float = LEAST_SPACING
    keep_labels: bool = False

    @property
    def options(self) -> str:
        """What decides whether an image is used: one that was not is looked at again only under other options."""
        return f"2 {self.four_d} {self.least} {self.least_spacing:g} {self.keep_labels}"

    @property
    def _limits(self) -> tuple[float, float]:
        return self.least_spacing, LARGEST_SPACING

    def __call__(self, task: Task) -> Result:
        """Do one task; never raises but for Ctrl-C."""
        loud = sitk.ProcessObject.GetGlobalWarningDisplay()
        sitk.ProcessObject.SetGlobalWarningDisplay(False)
        try:
            return Result(task, tuple(self._cases(task)))
        except _No as error:
            reason, *detail = error.args
            return Result(task, reason=reason, detail="; ".join(detail))
        except MemoryError:
            return Result(task, fatal="memory")
        except OSError as error:
            return Result(task, fatal=self._why(error))
        except RuntimeError as error:  # ITK, while it wrote
            return Result(task, fatal=self._why(error))
        finally:
            sitk.ProcessObject.SetGlobalWarningDisplay(loud)

    def _why(self, error: Exception) -> str:
        full = shutil.disk_usage(self.temporary).free < 1 << 24
        return "disk" if full else f"{type(error).__name__}: {error}".strip().splitlines()[-1]

    def _cases(self, task: Task) -> list[Made]:
        read, pure = zip(*(self._read(item) for item in task.items))
        channels = [_volumes(image, self.four_d) for image in read]
        dimensions = [image.GetDimension() for image in read]
        if len(channels) > 1 and any(len(volumes) > 1 for volumes in channels):
            raise _No("4D, which cannot be a channel")
        made = []
        for i in range(len(channels[0])):
            images = [volumes[i] for volumes in channels]
            for image in images:
                _check(image, self.least, self._limits, self.keep_labels)
            _same_place(images)
            voxels = np.stack([sitk.GetArrayViewFromImage(image).astype(np.float32) for image in images])
            drafts, linked = [], 0
            for c, (item, image) in enumerate(zip(task.items, images)):
                draft = str(self.temporary / f"{task.key[:32]}_{i:04d}_{c:04d}.nii.gz")
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(draft)
                if image.GetDimension() == dimensions[c] and self._linked(item, draft, pure[c]):
                    linked += 1
                else:
                    sitk.WriteImage(_plain(image), draft, useCompression=True)
                    with open(draft, "rb+") as file:
                        os.fsync(file.fileno())
                drafts.append(draft)
            made.append(Made(voxel_hash(voxels), tuple(drafts), linked))
        return made

    def _linked(self, item: Item, draft: str, pure: bool) -> bool:
        """Link a file that nnU-Net reads as it is; False where it has to be written anew."""
        file = item.files[0]
        if item.dicom or not file.lower().endswith(".nii.gz") or self.link == "never" or is_nifti2(file):
            return False
        if self.link == "symbolic":
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
                return joined(convert(item, self.temporary)), False
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
            if isinstance(error, OSError) and item.dicom and shutil.disk_usage(self.temporary).free < 1 << 24:
                raise
            text = str(error).strip().splitlines() or [""]
            raise _No(*_unreadable(text[-1])) from None


def _unreadable(text: str) -> tuple[str, str]:
    """Reason and detail of a file that a reader or a check refused."""
    if "truncated" in text:
        return "it is truncated", text
    if "NaN or infinite" in text and "voxels" in text:
        return "voxels are NaN or infinite", text
    if "absurd voxel size" in text:
        hint = " (see --least-spacing)" if "taken for possible" in text else ""
        return "absurd voxel size", text.partition(": ")[2] + hint
    for known, reason in REASONS.items():
        if known in text:
            return reason, text
    return "it cannot be read", text
