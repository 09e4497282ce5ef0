"""What ITK does not tell of a NIfTI file: it fills a truncated one with zeros, and puts zeros where voxels are NaN."""

from __future__ import annotations

import gzip
import math
import os
from io import BufferedIOBase

import nibabel
import numpy as np

__all__ = ["check_whole"]

PIECE = 1 << 20


def _header(path: str) -> tuple[int, int, np.dtype | None]:
    """Offset of the voxels, bytes of the whole file, and the type of floating-point voxels (None for others)."""
    image = nibabel.load(path)
    if not isinstance(image, nibabel.Nifti1Image):
        return 0, 0, None
    kind, offset = image.get_data_dtype(), int(image.dataobj.offset)  # type: ignore[attr-defined]
    floats = kind if kind.kind == "f" and kind.itemsize <= 8 else None
    return offset, offset + math.prod(int(n) for n in image.shape) * kind.itemsize, floats


def _read(stream: BufferedIOBase, count: int) -> bytes:
    """Exactly ``count`` bytes unless the stream ends."""
    parts = []
    while count > 0 and (part := stream.read(count)):
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def _scan(stream: BufferedIOBase, offset: int, kind: np.dtype | None) -> tuple[int, int]:
    """Read to the end, which checks the sum of a gzip stream: bytes in all, and voxels that are not finite."""
    size, wrong = len(_read(stream, offset)), 0
    while piece := _read(stream, PIECE):
        size += len(piece)
        if kind is not None:
            values = np.frombuffer(piece, kind, len(piece) // kind.itemsize)
            wrong += len(values) - int(np.count_nonzero(np.isfinite(values)))
    return size, wrong


def check_whole(path: str) -> None:
    """Read a ``.nii`` or ``.nii.gz`` file to its end; files of other formats pass, their readers notice by themselves.

    Raises:
        ValueError: the file is empty, truncated or damaged, or holds voxels that are NaN or infinite.
    """
    if not path.lower().endswith((".nii", ".nii.gz")):
        return
    if os.path.getsize(path) == 0:
        raise ValueError("the file is empty")
    try:
        offset, expected, kind = _header(path)
        with open(path, "rb") as file:
            packed = file.read(2) == b"\x1f\x8b"
        with gzip.open(path) if packed else open(path, "rb") as stream:
            size, wrong = _scan(stream, offset, kind)
    except EOFError:
        raise ValueError("the file is truncated") from None
    except Exception as error:  # nibabel and zlib raise many kinds on damaged files
        raise ValueError(f"the file is damaged: {error}") from None
    if size < expected:
        raise ValueError(f"the file is truncated: it holds {size} of {expected} bytes")
    if wrong and kind is not None:
        raise ValueError(f"{wrong} of {(expected - offset) // kind.itemsize} voxels are NaN or infinite")
