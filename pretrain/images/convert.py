"""One image in its own format -> checked, and as NIfTI without a header's stories; linked where the file is that already."""

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

from nnssl.pretrain.images.items import Item, Job
from nnssl.pretrain.prepare.whole import check_whole
from nnssl.pretrain.prepare.worker import voxel_hash

__all__ = ["LINKS", "Converter", "Made", "Reply", "tells_nothing"]

LINKS = ("auto", "symbolic", "never")
"""Whether NIfTI files are linked: by hard link where their header tells nothing of a patient, as they are, or not at all."""

SPACING = (0.04, 20.0)
"""Voxel sizes in mm that a scanner makes."""

HARMLESS = ("", "fsl", "itk", "spm", "nifti")
"""Beginnings of the description in a NIfTI header that name software and no patient."""

SAME_GEOMETRY = 1e-3


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
class Reply:
    """What became of a job: cases, or why there is none; ``fatal`` where nothing can be written at the moment."""

    job: Job
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


def _check(image: sitk.Image, least: int) -> None:
    size, spacing = image.GetSize(), image.GetSpacing()
    if min(size) == 1:
        raise _No("a single slice")
    if min(size) < least:
        raise _No(f"fewer than {least} slices", "x".join(map(str, size)))
    if not all(np.isfinite(s) and SPACING[0] <= s <= SPACING[1] for s in spacing):
        raise _No("absurd voxel size", " x ".join(f"{s:.3g}" for s in spacing) + " mm")
    voxels = sitk.GetArrayViewFromImage(image)
    if not np.isfinite(voxels).all():
        raise _No("voxels are NaN or infinite")
    if voxels.min() == voxels.max():
        raise _No("the image is constant")


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
    """

    temporary: Path
    four_d: str
    least: int
    link: str

    def __call__(self, job: Job) -> Reply:
        """Do one job; never raises but for Ctrl-C."""
        loud = sitk.ProcessObject.GetGlobalWarningDisplay()
        sitk.ProcessObject.SetGlobalWarningDisplay(False)
        try:
            return Reply(job, tuple(self._cases(job)))
        except _No as error:
            reason, *detail = error.args
            return Reply(job, reason=reason, detail="; ".join(detail))
        except MemoryError:
            return Reply(job, fatal="memory")
        except OSError as error:
            return Reply(job, fatal=self._why(error))
        except RuntimeError as error:  # ITK, while it wrote
            return Reply(job, fatal=self._why(error))
        finally:
            sitk.ProcessObject.SetGlobalWarningDisplay(loud)

    def _why(self, error: Exception) -> str:
        full = shutil.disk_usage(self.temporary).free < 1 << 24
        return "disk" if full else f"{type(error).__name__}: {error}".strip().splitlines()[-1]

    def _cases(self, job: Job) -> list[Made]:
        read = [self._read(item) for item in job.items]
        channels = [_volumes(image, self.four_d) for image in read]
        dimensions = [image.GetDimension() for image in read]
        if len(channels) > 1 and any(len(volumes) > 1 for volumes in channels):
            raise _No("4D, which cannot be a channel")
        made = []
        for i in range(len(channels[0])):
            images = [volumes[i] for volumes in channels]
            for image in images:
                _check(image, self.least)
            _same_place(images)
            voxels = np.stack([sitk.GetArrayViewFromImage(image).astype(np.float32) for image in images])
            drafts, linked = [], 0
            for c, (item, image) in enumerate(zip(job.items, images)):
                draft = str(self.temporary / f"{job.key[:32]}_{i:04d}_{c:04d}.nii.gz")
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(draft)
                if image.GetDimension() == dimensions[c] and self._linked(item, draft):
                    linked += 1
                else:
                    sitk.WriteImage(_plain(image), draft, useCompression=True)
                    with open(draft, "rb+") as file:
                        os.fsync(file.fileno())
                drafts.append(draft)
            made.append(Made(voxel_hash(voxels), tuple(drafts), linked))
        return made

    def _linked(self, item: Item, draft: str) -> bool:
        """Link a file that nnU-Net reads as it is; False where it has to be written anew."""
        file = item.files[0]
        if len(item.files) > 1 or not file.lower().endswith(".nii.gz") or self.link == "never":
            return False
        if self.link == "symbolic":
            os.symlink(file, draft)
            return True
        if not tells_nothing(file):
            return False
        try:
            os.link(os.path.realpath(file), draft)
        except OSError:  # another file system, or one without hard links
            return False
        return True

    def _read(self, item: Item) -> sitk.Image:
        try:
            if len(item.files) == 1:
                check_whole(item.files[0])
                return sitk.ReadImage(item.files[0])
            reader = sitk.ImageSeriesReader()
            reader.SetFileNames(item.files)
            image = reader.Execute()
            image.SetSpacing((*image.GetSpacing()[:2], item.step))
            return image
        except (RuntimeError, ValueError, OSError) as error:
            text = str(error).strip().splitlines() or [""]
            raise _No(*_unreadable(text[-1])) from None


def _unreadable(text: str) -> tuple[str, str]:
    """Reason and detail of a file that a reader refused."""
    if "truncated" in text:
        return "it is truncated", text
    if "NaN or infinite" in text:
        return "voxels are NaN or infinite", text
    return "it cannot be read", text
