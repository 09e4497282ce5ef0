"""What ITK does not tell of a file, found out before voxels are read or memory is asked for.

It fills a truncated NIfTI file with zeros, puts zeros where voxels are NaN, takes 1 mm for a spacing of 0, NaN or infinity, and
asks for as much memory as a header tells, whatever the file holds.
"""

from __future__ import annotations

import math
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import BinaryIO

import nibabel
import numpy as np
import SimpleITK as sitk

from nnssl.words import size_text

PIECE = 1 << 20
NIFTI = (".nii", ".nii.gz")
ITK_ENDINGS = (*NIFTI, ".nrrd", ".nhdr", ".mha", ".mhd", ".gipl", ".gipl.gz", ".hdr", ".img")
"""Formats whose headers tell a voxel size in mm."""

SPACING = (1e-4, 50.0)
"""Voxel sizes in mm that an image can have: from a tenth of a micrometre to a slice distance that no scanner uses."""

LONGEST_MM = 5000.0
"""No patient is longer."""

SHEAR = math.sin(math.radians(1.0))
"""Axes may be this far from perpendicular: the cosine of the angle between two."""

PACKED = 1100
"""Deflate makes nothing smaller than to about a thousandth."""

FEW = 27
"""An image with fewer voxels that differ from all the others is empty: a cube of three is the least that is no defect."""


class NiftiStream:
    """Reads a NIfTI file from its beginning, compressed or not whatever its name says; bytes after the gzip stream are left out.

    Attributes:
        packed: whether the file is compressed.
        rest: whether other bytes follow the compressed ones; known at the end.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._pending = file.read(PIECE)
        self.packed = self._pending[:2] == b"\x1f\x8b"
        self.rest = False
        self._inflate = zlib.decompressobj(31) if self.packed else None
        self._ready = b""

    def read(self, count: int) -> bytes:
        """Exactly ``count`` bytes unless the stream ends.

        Raises:
            EOFError: the compressed stream is cut off.
            zlib.error: it is damaged.
        """
        parts = []
        while count > 0 and (piece := self._piece(count)):
            parts.append(piece)
            count -= len(piece)
        return b"".join(parts)

    def _piece(self, count: int) -> bytes:
        if self._inflate is None:
            if not self._pending:
                self._pending = self._file.read(PIECE)
            piece, self._pending = self._pending[:count], self._pending[count:]
            return piece
        while not self.rest:
            if self._inflate.eof:
                self._pending += self._file.read(PIECE) if len(self._pending) < 2 else b""
                self.rest = bool(self._pending) and self._pending[:2] != b"\x1f\x8b"
                if not self._pending or self.rest:
                    return b""
                self._inflate = zlib.decompressobj(31)
            if not self._pending:
                self._pending = self._file.read(PIECE)
            last = not self._pending
            piece = self._inflate.decompress(self._pending, count)
            self._pending = self._inflate.unused_data if self._inflate.eof else self._inflate.unconsumed_tail
            if piece:
                return piece
            if last and not self._inflate.eof:
                raise EOFError
        return b""


@dataclass(frozen=True)
class _Nifti:
    """A NIfTI header and where the voxels of the file are."""

    header: nibabel.Nifti1Header
    offset: int
    nbytes: int
    kind: np.dtype


def nifti_header(stream: NiftiStream) -> nibabel.Nifti1Header:
    """The header at the beginning of a stream, of NIfTI-1 or NIfTI-2, whatever is wrong in it.

    Raises:
        ValueError: there is none.
    """
    start = stream.read(348)
    if not start:
        raise ValueError("the file is empty")
    if len(start) < 348:
        raise ValueError(f"the file is {'truncated' if stream.packed else 'damaged: it has no NIfTI header'}")
    sizes = {int.from_bytes(start[:4], order) for order in ("little", "big")}  # type: ignore[arg-type]
    if 348 in sizes:
        return nibabel.Nifti1Header(start, check=False)
    if 540 in sizes:
        return nibabel.Nifti2Header(start + stream.read(540 - 348), check=False)
    raise ValueError("the file is damaged: it does not begin with a NIfTI header")


def _nifti(stream: NiftiStream) -> _Nifti:
    header = nifti_header(stream)
    if header["magic"].tobytes()[:3] not in (b"n+1", b"n+2"):
        return _Nifti(header, 0, 0, np.dtype(np.int16))
    kind, shape = header.get_data_dtype(), [max(0, int(n)) for n in header.get_data_shape()]
    size, offset = math.prod(shape) * kind.itemsize, int(header["vox_offset"])
    return _Nifti(header, offset, offset + size, kind)


def _scan(stream: NiftiStream, size: int, nifti: _Nifti) -> tuple[int, int, int]:
    """Read to the end, which checks the sum of a gzip stream: bytes in all, voxels that are not finite, and beyond float32."""
    wrong = beyond = 0
    size += len(stream.read(nifti.offset - size))
    most = float(np.finfo(np.float32).max)
    while piece := stream.read(PIECE):
        size += len(piece)
        if nifti.kind.kind == "f" and nifti.kind.itemsize <= 8:
            values = np.frombuffer(piece, nifti.kind, len(piece) // nifti.kind.itemsize)
            finite = np.isfinite(values)
            wrong += len(values) - int(np.count_nonzero(finite))
            if nifti.kind.itemsize == 8:
                beyond += int(np.count_nonzero(np.abs(values[finite]) > most))
    return size, wrong, beyond


def check_whole(path: str) -> bool:
    """Read a ``.nii`` or ``.nii.gz`` file to its end; files of other formats pass, their readers notice by themselves.

    Returns:
        Whether other bytes follow the voxels, which readers leave out.

    Raises:
        ValueError: the file is empty, truncated or damaged, or holds voxels that are NaN, infinite or beyond float32.
    """
    if not path.lower().endswith(NIFTI):
        return False
    if os.path.getsize(path) == 0:
        raise ValueError("the file is empty")
    try:
        with open(path, "rb") as file:
            stream = NiftiStream(file)
            nifti = _nifti(stream)
            size, wrong, beyond = _scan(stream, int(nifti.header["sizeof_hdr"]), nifti)
    except EOFError:
        raise ValueError("the file is truncated") from None
    except Exception as error:  # nibabel and zlib raise many kinds on damaged files
        text = str(error)
        raise ValueError(text if "the file is" in text else f"the file is damaged: {text}") from None
    if size < nifti.nbytes:
        raise ValueError(f"the file is truncated: it holds {size} of {nifti.nbytes} bytes")
    count = (nifti.nbytes - nifti.offset) // nifti.kind.itemsize
    if wrong:
        raise ValueError(f"{wrong} of {count} voxels are NaN or infinite")
    if beyond:
        raise ValueError(f"{beyond} of {count} voxels are too large for 32-bit floating point")
    return stream.rest or size > nifti.nbytes


def is_nifti2(path: str) -> bool:
    """Whether a file's header is NIfTI-2, which ITK does not read."""
    if not path.lower().endswith(NIFTI):
        return False
    with open(path, "rb") as file:
        try:
            return int(nifti_header(NiftiStream(file))["sizeof_hdr"]) == 540
        except (ValueError, EOFError, zlib.error):
            return False


def check_spacing(spacing: Sequence[float], shape: Sequence[int], limits: tuple[float, float] = SPACING) -> None:
    """Whether voxel sizes in mm can be those of an image of that shape.

    Raises:
        ValueError: they cannot.
    """
    text = " x ".join(f"{s:.4g}" for s in spacing) + " mm"
    if not all(math.isfinite(s) and s > 0 for s in spacing):
        raise ValueError(f"absurd voxel size: {text}")
    if not all(limits[0] <= s <= limits[1] for s in spacing):
        raise ValueError(
            f"absurd voxel size: {text}; between {limits[0]:g} and {limits[1]:g} mm are taken for possible"
        )
    longest = max(s * n for s, n in zip(spacing, shape))
    if longest > LONGEST_MM:
        raise ValueError(f"absurd voxel size: at {text} the image is {longest / 1000:.3g} m long")


def check_axes(matrix: np.ndarray) -> None:
    """Whether the columns of a matrix can be the directions of an image's axes.

    Raises:
        ValueError: one is zero or no number, or two are not perpendicular.
    """
    lengths = np.linalg.norm(matrix, axis=0)
    if not (np.isfinite(matrix).all() and (lengths > 0).all()):
        raise ValueError("its orientation is damaged: a direction of its axes is zero, NaN or infinite")
    cosines = np.abs((matrix / lengths).T @ (matrix / lengths) - np.eye(len(matrix)))
    if cosines.max() > SHEAR:
        angle = math.degrees(math.acos(min(1.0, float(cosines.max()))))
        raise ValueError(f"its matrix is sheared: two axes meet at {angle:.1f} degrees, not at 90; resample it")


def _check_nifti(path: str, limits: tuple[float, float], nnunet: bool) -> None:
    with open(path, "rb") as file:
        header = nifti_header(NiftiStream(file))
    if nnunet and header["sizeof_hdr"] == 540:
        raise ValueError("it is NIfTI-2, which nnU-Net's reader does not read; nnssl_add_images converts it")
    n = min(3, int(header["dim"][0]))
    spacing, shape = [float(s) for s in header["pixdim"][1 : 1 + n]], [int(s) for s in header["dim"][1 : 1 + n]]
    check_spacing(spacing, shape, limits)
    if n == 3 and header["sform_code"] > 0:
        check_axes(np.array([[float(v) for v in header[f"srow_{a}"][:3]] for a in "xyz"]))


def _check_size(path: str, reader: sitk.ImageFileReader) -> None:
    """A header must not ask for memory that the file cannot fill."""
    kind = (
        sitk.Image([1] * 3, reader.GetPixelID())
        if "vector" not in sitk.GetPixelIDValueAsString(reader.GetPixelID())
        else None
    )
    itemsize = kind.GetSizeOfPixelComponent() if kind is not None else 1
    need = math.prod(reader.GetSize()) * itemsize * reader.GetNumberOfComponents()
    stem = os.path.splitext(path)[0]
    beside = [stem + e for e in (".raw", ".zraw", ".raw.gz", ".gz", ".img", ".img.gz", ".hdr")]
    held = sum(os.path.getsize(f) for f in {path, *beside} if os.path.isfile(f))
    if need > PACKED * held and not path.lower().endswith((".mhd", ".nhdr")):
        raise ValueError(f"its header tells {need / 1e9:.3g} GB of voxels, the file holds {held} bytes: it is damaged")


def check_header(path: str, limits: tuple[float, float] = SPACING, *, nnunet: bool = True) -> None:
    """Look at what a file's header tells, without reading voxels; formats that tell no voxel size pass.

    Args:
        path: of the file.
        limits: smallest and largest voxel size in mm.
        nnunet: refuse what nnU-Net's readers do not read and nibabel does (NIfTI-2).

    Raises:
        ValueError: voxel sizes, directions, type or size that no image for nnU-Net has.
    """
    lower = path.lower()
    if not lower.endswith(ITK_ENDINGS):
        return
    try:
        if lower.endswith(NIFTI):
            _check_nifti(path, limits, nnunet)
    except EOFError:
        raise ValueError("the file is truncated") from None
    except zlib.error as error:
        raise ValueError(f"the file is damaged: {error}") from None
    if not nnunet and is_nifti2(path):
        return
    reader = sitk.ImageFileReader()
    reader.SetFileName(path)
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        raise ValueError(str(error).strip().splitlines()[-1]) from None
    size, n = reader.GetSize(), min(3, reader.GetDimension())
    check_spacing(reader.GetSpacing()[:n], size[:n], limits)
    check_axes(np.reshape(reader.GetDirection(), (reader.GetDimension(),) * 2)[:n, :n])
    if reader.GetNumberOfComponents() in (3, 4):
        raise ValueError(f"colour (RGB): {reader.GetNumberOfComponents()} values a voxel")
    kind = sitk.GetPixelIDValueAsString(reader.GetPixelID())
    if "complex" in kind:
        raise ValueError(f"its voxels are complex numbers ({kind}): save their magnitude")
    _check_size(path, reader)


def check_same_size(files: Sequence[str]) -> None:
    """Whether the channels of a case have one size, by their headers.

    Raises:
        ValueError: they differ; it tells which and both sizes.
    """
    sizes = []
    for file in files if len(files) > 1 and all(f.lower().endswith(ITK_ENDINGS) for f in files) else ():
        reader = sitk.ImageFileReader()
        reader.SetFileName(file)
        reader.ReadImageInformation()
        sizes.append(reader.GetSize())
    for channel, size in enumerate(sizes):
        if size != sizes[0]:
            one, other = (size_text(s) for s in (sizes[0], size))
            raise ValueError(f"channel 0 has {one} voxels, channel {channel} has {other}: resample it to the same grid")


def check_voxels(channels: Sequence[np.ndarray] | np.ndarray) -> None:
    """Whether an image's voxels are numbers and more than emptiness.

    Args:
        channels: one array each.

    Raises:
        ValueError: they are not.
    """
    total = sum(c.size for c in channels)
    wrong = sum(int(c.size - np.count_nonzero(np.isfinite(c))) for c in channels)
    if wrong:
        raise ValueError(f"{wrong} of {total} voxels are NaN or infinite")
    if any(c.dtype == np.float64 and np.abs(c).max() > np.finfo(np.float32).max for c in channels):
        raise ValueError("voxels are too large for 32-bit floating point")
    if all(c.min() == c.max() for c in channels):
        raise ValueError("the image is constant")
    odd = [int(np.count_nonzero(c != np.median(c[(slice(None, None, 2),) * c.ndim]))) for c in channels]
    if max(odd) < FEW:
        raise ValueError(f"it is empty: all but {max(odd)} of its voxels have one value")
