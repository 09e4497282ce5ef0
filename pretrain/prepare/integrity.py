"""What ITK does not tell of a file, found out before voxels are read or memory is asked for.

It fills a truncated NIfTI file with zeros, puts zeros where voxels are NaN, takes 1 mm for a spacing of 0, NaN or infinity, and
asks for as much memory as a header tells, whatever the file holds.
"""

from __future__ import annotations

import gzip
import io
import math
import os
import warnings
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout

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

LONGEST_MM = 5000.0  # no patient is longer
SHEAR = math.sin(math.radians(1.0))  # axes may be this far from perpendicular: the cosine of the angle between two
PACKED = 1100  # deflate makes nothing smaller than to about a thousandth

FEW = 27
"""An image with fewer voxels that differ from all the others is empty: a cube of three is the least that is no defect."""

Stream = gzip.GzipFile | io.BufferedReader


class Unusable(ValueError):
    """Why an image cannot be used, and which file is to blame, where that is known."""

    def __init__(self, reason: str, file: str = "") -> None:
        super().__init__(reason)
        self.file = file


@contextmanager
def quiet() -> Iterator[io.StringIO]:
    """Readers neither warn nor print; what they would have printed is in the text that is given."""
    loud, printed = sitk.ProcessObject.GetGlobalWarningDisplay(), io.StringIO()
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    try:
        with redirect_stdout(printed), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield printed
    finally:
        sitk.ProcessObject.SetGlobalWarningDisplay(loud)


@contextmanager
def _unpacked(path: str) -> Iterator[Stream]:
    """A file's content, compressed or not whatever its name says."""
    with open(path, "rb") as file:
        if file.peek(2)[:2] == b"\x1f\x8b":
            with gzip.GzipFile(fileobj=file) as unpacked:
                yield unpacked
        else:
            yield file


def _nifti_header(stream: Stream) -> nibabel.Nifti1Header:
    """The header at the beginning of a stream, of NIfTI-1 or NIfTI-2, whatever is wrong in it."""
    start = stream.read(348)
    if not start:
        raise ValueError("the file is empty")
    if len(start) < 348:
        packed = isinstance(stream, gzip.GzipFile)
        raise ValueError(f"the file is {'truncated' if packed else 'damaged: it has no NIfTI header'}")
    sizes = int.from_bytes(start[:4], "little"), int.from_bytes(start[:4], "big")
    if 348 in sizes:
        return nibabel.Nifti1Header(start, check=False)
    if 540 in sizes:
        return nibabel.Nifti2Header(start + stream.read(540 - 348), check=False)
    raise ValueError("the file is damaged: it does not begin with a NIfTI header")


def _header_of(path: str) -> nibabel.Nifti1Header:
    try:
        with _unpacked(path) as stream:
            return _nifti_header(stream)
    except EOFError:
        raise ValueError("the file is truncated") from None
    except (zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"the file is damaged: {error}") from None


def is_nifti2(path: str) -> bool:
    """Whether a file's header is NIfTI-2, which ITK does not read."""
    try:
        return path.lower().endswith(NIFTI) and int(_header_of(path)["sizeof_hdr"]) == 540
    except ValueError:
        return False


def _scan(stream: Stream, skip: int, kind: np.dtype) -> tuple[int, int, int, bool]:
    """Bytes to the end, voxels that are not finite, voxels beyond float32, and whether bytes follow that are not compressed.

    Reading to the end checks the sums of gzip. ``skip`` bytes lie before the voxels.
    """
    size = wrong = beyond = 0
    rest, most = b"", float(np.finfo(np.float32).max)
    while True:
        try:
            piece = stream.read1(PIECE)
        except gzip.BadGzipFile as error:
            if "Not a gzipped file" not in str(error):
                raise
            return size, wrong, beyond, True
        if not piece:
            return size, wrong, beyond, False
        if kind.kind == "f" and kind.itemsize <= 8:
            rest += piece[max(0, skip - size) :]
            values = np.frombuffer(rest, kind, len(rest) // kind.itemsize)
            rest = rest[values.nbytes :]
            finite = np.isfinite(values)
            wrong += len(values) - int(np.count_nonzero(finite))
            if kind.itemsize == 8:
                beyond += int(np.count_nonzero(np.abs(values[finite]) > most))
        size += len(piece)


def check_whole(path: str) -> bool:
    """Read a ``.nii`` or ``.nii.gz`` file to its end; files of other formats pass, their readers notice by themselves.

    Returns:
        Whether other bytes follow the voxels, which readers leave out.

    Raises:
        ValueError: the file is empty, truncated or damaged, or holds voxels that are NaN, infinite or beyond float32.
    """
    if not path.lower().endswith(NIFTI):
        return False
    count, need, kind = 0, 0, np.dtype(np.int16)  # of a pair of files, whose voxels are elsewhere
    try:
        with _unpacked(path) as stream:
            header = _nifti_header(stream)
            start, offset = int(header["sizeof_hdr"]), int(header["vox_offset"])
            if header["magic"].tobytes()[:3] in (b"n+1", b"n+2"):
                count, kind = math.prod(max(0, int(n)) for n in header.get_data_shape()), header.get_data_dtype()
                need = offset + count * kind.itemsize
            size, wrong, beyond, rest = _scan(stream, offset - start, kind)
    except EOFError:
        raise ValueError("the file is truncated") from None
    except Exception as error:  # nibabel and zlib raise many kinds on damaged files
        text = str(error)
        raise ValueError(text if "the file is" in text else f"the file is damaged: {text}") from None
    if start + size < need:
        raise ValueError(f"the file is truncated: it holds {start + size} of {need} bytes")
    if wrong:
        raise ValueError(f"{wrong} of {count} voxels are NaN or infinite")
    if beyond:
        raise ValueError(f"{beyond} of {count} voxels are too large for 32-bit floating point")
    return rest or start + size > need


def check_spacing(spacing: Sequence[float], shape: Sequence[int], limits: tuple[float, float] = SPACING) -> None:
    """Raises ``ValueError`` where voxel sizes in mm cannot be those of an image of that shape."""
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
    """Raises ``ValueError`` where the columns of a matrix are no directions: zero, no numbers, or not perpendicular."""
    lengths = np.linalg.norm(matrix, axis=0)
    if not (np.isfinite(matrix).all() and (lengths > 0).all()):
        raise ValueError("its orientation is damaged: a direction of its axes is zero, NaN or infinite")
    cosines = np.abs((matrix / lengths).T @ (matrix / lengths) - np.eye(len(matrix)))
    if cosines.max() > SHEAR:
        angle = math.degrees(math.acos(min(1.0, float(cosines.max()))))
        raise ValueError(f"its matrix is sheared: two axes meet at {angle:.1f} degrees, not at 90; resample it")


def _check_size(path: str, reader: sitk.ImageFileReader) -> None:
    """A header must not ask for memory that the file cannot fill."""
    voxel = sitk.Image([1] * 3, reader.GetPixelID(), reader.GetNumberOfComponents())
    need = math.prod(reader.GetSize()) * voxel.GetSizeOfPixelComponent() * reader.GetNumberOfComponents()
    stem = os.path.splitext(path)[0]
    beside = [stem + e for e in (".raw", ".zraw", ".raw.gz", ".gz", ".img", ".img.gz", ".hdr")]
    held = sum(os.path.getsize(f) for f in {path, *beside} if os.path.isfile(f))
    if need > PACKED * held and not path.lower().endswith((".mhd", ".nhdr")):
        raise ValueError(f"its header tells {need / 1e9:.3g} GB of voxels, the file holds {held} bytes: it is damaged")


def itk_header(path: str) -> sitk.ImageFileReader:
    """What ITK reads of a file without its voxels. Raises ``RuntimeError``."""
    reader = sitk.ImageFileReader()
    reader.SetFileName(path)
    reader.ReadImageInformation()
    return reader


def check_header(path: str, limits: tuple[float, float] = SPACING, *, nnunet: bool = True) -> None:
    """Look at what a file's header tells, without reading voxels; formats that tell no voxel size pass.

    Raises ``ValueError`` for voxel sizes (``limits`` in mm), directions, type or size that no image has; with ``nnunet`` also for
    what nnU-Net's readers do not read and nibabel does (NIfTI-2).
    """
    if not path.lower().endswith(ITK_ENDINGS):
        return
    if path.lower().endswith(NIFTI):
        header = _header_of(path)
        second, n = header["sizeof_hdr"] == 540, min(3, int(header["dim"][0]))
        if second and nnunet:
            raise ValueError("it is NIfTI-2, which nnU-Net's reader does not read; nnssl_add_images converts it")
        check_spacing(header["pixdim"][1 : 1 + n].tolist(), header["dim"][1 : 1 + n].tolist(), limits)
        if n == 3 and header["sform_code"] > 0:
            check_axes(header.get_sform()[:3, :3])
        if second:
            return
    try:
        reader = itk_header(path)
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


def _check_same_size(files: Sequence[str]) -> None:
    """Whether the channels of a case have one size, by their headers."""
    if len(files) < 2 or not all(f.lower().endswith(ITK_ENDINGS) for f in files):
        return
    sizes = [itk_header(file).GetSize() for file in files]
    for channel, size in enumerate(sizes):
        if size != sizes[0]:
            one, other = size_text(sizes[0]), size_text(size)
            raise ValueError(f"channel 0 has {one} voxels, channel {channel} has {other}: resample it to the same grid")


def check_files(files: Sequence[str]) -> None:
    """Look at the files of a case, one per channel: headers, whether they are whole, and whether their sizes agree.

    Raises :class:`Unusable`, which names what is wrong, and with which file.
    """
    for file in files:
        try:
            check_header(file)
            check_whole(file)
        except (ValueError, OSError) as error:
            raise Unusable(str(error), file) from None
    try:
        _check_same_size(files)
    except ValueError as error:
        raise Unusable(str(error), files[-1]) from None


def check_voxels(channels: Sequence[np.ndarray] | np.ndarray) -> None:
    """Raises ``ValueError`` where the voxels of an image, an array per channel, are no numbers or nothing but emptiness."""
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
