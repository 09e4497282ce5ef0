"""Headers of DICOM files: what sorting them into volumes takes, and whether their voxels are all there.

Who the patient is enters a digest that tells two patients apart within one call; it is not kept, and no name, number or date is.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import struct
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

from nnssl.errors import NnsslError
from nnssl.files import hash_of, sha256_of
from nnssl.pretrain.images.items import Rejected

GROUPS = (0x0002, 0x0008)  # what a DICOM file without preamble begins with
ELEMENTS = (
    "SpecificCharacterSet", "TransferSyntaxUID", "ImageType", "SOPInstanceUID", "Modality", "SeriesDescription",
    "PatientName", "PatientID", "PatientBirthDate", "StudyInstanceUID", "SeriesInstanceUID", "AcquisitionNumber",
    "InstanceNumber", "ImagePositionPatient", "ImageOrientationPatient", "TemporalPositionIdentifier", "SamplesPerPixel",
    "NumberOfFrames", "Rows", "Columns", "PixelSpacing", "BitsAllocated", "SharedFunctionalGroupsSequence",
    "PerFrameFunctionalGroupsSequence",
)  # fmt: skip

UNREADABLE = "DICOM without a readable image (a report, a plan, or damaged)"
DEFLATED = "1.2.840.10008.1.2.1.99"
BIG_ENDIAN = "1.2.840.10008.1.2.2"
UNDEFINED = 0xFFFFFFFF


@dataclass(frozen=True)
class Frame:
    """Place of one slice, three and six numbers (mm) or none, and what tells slices at one place apart, such as a time point."""

    position: tuple[float, ...]
    orientation: tuple[float, ...]
    order: tuple[float, ...]


@dataclass(frozen=True, eq=False)
class Header:
    """What sorting takes of a file."""

    file: str
    root: str  # the folder that it was found under
    patient: str  # digest of who it is
    series: str
    study: str
    instance: str
    description: str
    modality: str
    kind: str  # DICOM's ImageType, upper case
    samples: int
    size: tuple[int, int]  # columns and rows
    spacing: tuple[float, ...]  # between rows and between columns in mm, or none
    frames: tuple[Frame, ...]  # one of a single slice; none of a multi-frame file that does not tell each one's place
    n_frames: int
    voxels_at: int  # where the voxels begin in the file

    @property
    def folder(self) -> str:
        """Where the file lies."""
        return os.path.dirname(self.file)

    def voxel_hash(self) -> str:
        """Of the voxels as the file holds them. Raises ``OSError``."""
        return sha256_of(self.file, self.voxels_at)


def dcm2niix_program() -> str | None:
    """Path of dcm2niix: PyPI's package, else one that is installed otherwise; None where there is neither."""
    with contextlib.suppress(ImportError):
        import dcm2niix

        if os.path.exists(dcm2niix.bin):
            return str(dcm2niix.bin)
    return shutil.which("dcm2niix")


def require_dicom(n_files: int) -> None:
    """Raises :class:`NnsslError` where what reads DICOM is not installed."""
    missing = [] if dcm2niix_program() else ["dcm2niix"]
    try:
        import pydicom  # noqa: F401
    except ImportError:
        missing.append("pydicom")
    if missing:
        raise NnsslError(
            f"{n_files} of the files are DICOM, which is read with dcm2niix and pydicom. They are the extra [dicom] of this "
            f"package: pip install {' '.join(missing)}"
        )


def is_dicom(start: bytes) -> bool:
    """Whether a file's first 132 bytes are those of DICOM, with or without the preamble."""
    if start[128:132] == b"DICM":
        return True
    if len(start) < 132:
        return False
    group, element, kind, length = struct.unpack("<HH2sH", start[:8])
    if group not in GROUPS or element > 0x0070:
        return False
    explicit = kind.isalpha() and kind.isupper()
    return explicit or struct.unpack("<I", start[4:8])[0] <= 256


def _numbers(data: Any, name: str, count: int) -> tuple[float, ...]:
    """The numbers of an element; none where it is missing, damaged, or of another length."""
    try:
        value = data.get(name)
        found = tuple(float(v) for v in value) if value is not None else ()
    except (TypeError, ValueError, OverflowError):
        return ()
    return found if len(found) == count else ()


def _number(data: Any, name: str, default: float) -> float:
    try:
        value = data.get(name)
        return default if value in (None, "") else float(value)
    except (TypeError, ValueError):
        return default


def _text(data: Any, name: str) -> str:
    value = data.get(name)
    return "" if value is None else str(value).strip()


def _first(data: Any, *names: str) -> Any:
    """Items of nested sequences, the first of each; an empty mapping where one is missing."""
    for name in names:
        sequence = data.get(name)
        if not sequence:
            return {}
        data = sequence[0]
    return data


def _frames(data: Any) -> tuple[Frame, ...]:
    """Place of each frame where the file tells it, from the groups of each frame or those that all share."""
    shared = _first(data, "SharedFunctionalGroupsSequence")
    found = []
    for group in data.get("PerFrameFunctionalGroupsSequence") or ():
        place, plane, content = (
            _first(group, name) or _first(shared, name)
            for name in ("PlanePositionSequence", "PlaneOrientationSequence", "FrameContentSequence")
        )
        index = content.get("DimensionIndexValues") or ()
        index = tuple(map(float, index if hasattr(index, "__iter__") else (index,)))
        found.append(
            Frame(
                _numbers(place, "ImagePositionPatient", 3),
                _numbers(plane, "ImageOrientationPatient", 6),
                (_number(content, "TemporalPositionIndex", 0.0), *index),
            )
        )
    return tuple(found)


def _voxels(stream: BinaryIO, data: Any, n_frames: int, samples: int) -> int | str:
    """Where the voxels begin, or why they are not all there. The stream stands before them."""
    syntax = str(getattr(data.file_meta, "TransferSyntaxUID", ""))
    if syntax == DEFLATED:
        return 0
    begin, size = stream.tell(), os.fstat(stream.fileno()).st_size
    head = stream.read(12)
    if len(head) < 12:
        return UNREADABLE
    order = ">" if syntax == BIG_ENDIAN else "<"
    group, element = struct.unpack(f"{order}HH", head[:4])
    if (group, element) not in ((0x7FE0, 0x0010), (0x7FE0, 0x0008), (0x7FE0, 0x0009)):
        return UNREADABLE
    explicit = head[4:6].isalpha()
    length = struct.unpack(f"{order}I", head[8:12] if explicit else head[4:8])[0]
    stream.seek(begin + (12 if explicit else 8))
    if length == UNDEFINED:
        return begin if _ends(stream, size) else "it is truncated"
    bits = int(_number(data, "BitsAllocated", 16))
    expected = int(data.Rows) * int(data.Columns) * n_frames * samples * bits // 8
    return begin if min(length, size - stream.tell()) >= expected else "it is truncated"


def _ends(stream: BinaryIO, size: int) -> bool:
    """Whether the fragments of compressed voxels go on to their end."""
    while len(head := stream.read(8)) == 8:
        group, element, length = struct.unpack("<HHI", head)
        if (group, element) == (0xFFFE, 0xE0DD):
            return True
        if (group, element) != (0xFFFE, 0xE000) or stream.tell() + length > size:
            return False
        stream.seek(length, os.SEEK_CUR)
    return False


def _read(root: str, file: str) -> Header | Rejected:
    import pydicom

    with open(file, "rb") as stream:
        if not is_dicom(stream.read(132)):
            return Rejected(file, UNREADABLE, "it does not begin like DICOM")
        stream.seek(0)
        data = pydicom.dcmread(stream, stop_before_pixels=True, force=True, specific_tags=list(ELEMENTS))
        if not (data.get("Rows") and data.get("Columns")):
            return Rejected(file, UNREADABLE)
        n_frames, samples = int(_number(data, "NumberOfFrames", 1)), int(_number(data, "SamplesPerPixel", 1))
        voxels = _voxels(stream, data, n_frames, samples)
    if isinstance(voxels, str):
        return Rejected(file, voxels)
    who = "\0".join(_text(data, name) for name in ("PatientName", "PatientID", "PatientBirthDate"))
    measures = _first(data, "SharedFunctionalGroupsSequence", "PixelMeasuresSequence")
    position, orientation = _numbers(data, "ImagePositionPatient", 3), _numbers(data, "ImageOrientationPatient", 6)
    order = tuple(_number(data, n, 0.0) for n in ("AcquisitionNumber", "TemporalPositionIdentifier", "InstanceNumber"))
    kind, modality = data.get("ImageType") or "", _text(data, "Modality")
    return Header(
        file,
        root,
        hash_of(who),
        series=_text(data, "SeriesInstanceUID"),
        study=_text(data, "StudyInstanceUID"),
        instance=_text(data, "SOPInstanceUID"),
        description=_text(data, "SeriesDescription"),
        modality="" if modality == "OT" else modality,  # other: says nothing
        kind=(kind if isinstance(kind, str) else "\\".join(map(str, kind))).upper(),
        samples=samples,
        size=(int(data.Columns), int(data.Rows)),
        spacing=_numbers(data, "PixelSpacing", 2) or _numbers(measures, "PixelSpacing", 2),
        frames=_frames(data) if n_frames > 1 else (Frame(position, orientation, order),),
        n_frames=n_frames,
        voxels_at=voxels,
    )


def _read_or_why(root: str, file: str) -> Header | Rejected:
    try:
        return _read(root, file)
    except OSError as error:
        return Rejected(file, "it cannot be opened", str(error.strerror))
    except Exception as error:  # pydicom raises many kinds on damaged files
        return Rejected(file, UNREADABLE, type(error).__name__)


def read_headers(files: Sequence[tuple[str, str]]) -> list[Header | Rejected]:
    """Headers of (root, path) pairs; pickles as a task of :func:`nnssl.pretrain.prepare.processes.run_tasks`."""
    import pydicom

    logger = logging.getLogger("pydicom")
    before, logger.disabled = logger.disabled, True
    try:
        with pydicom.config.disable_value_validation(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return [_read_or_why(root, file) for root, file in files]
    finally:
        logger.disabled = before
