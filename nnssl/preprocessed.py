"""Preprocessed cases as nnU-Net writes them, ``<name>.b2nd``, ``<name>_seg.b2nd`` and ``<name>.pkl``: listed, opened and cut.

Opening reads a header; of a crop only the compressed blocks that it touches are unpacked.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import blosc2
import numpy as np

from nnssl.properties import read_properties

__all__ = ["IMAGE", "LABELS", "PROPERTIES", "CaseRef", "case_names", "complete", "list_cases", "open_array", "read_box"]

IMAGE, LABELS, PROPERTIES = ".b2nd", "_seg.b2nd", ".pkl"
"""Endings of a case's files."""
SPARE_MEMORY = 1 << 26
"""Bytes, more than the blocks that are unpacked at once: where they cannot be had, memory is why unpacking failed."""


@dataclass(frozen=True)
class CaseRef:
    """One preprocessed case: nnU-Net's identifier, the folder, and the name of the dataset that it comes from."""

    name: str
    folder: Path
    source: str

    @property
    def key(self) -> str:
        """``"<source>/<name>"``, unique in a case set."""
        return f"{self.source}/{self.name}"

    @property
    def image(self) -> Path:
        """The image's file."""
        return self.folder / f"{self.name}{IMAGE}"

    @property
    def labels(self) -> Path:
        """The label map's file, whether or not there is one."""
        return self.folder / f"{self.name}{LABELS}"

    @property
    def properties(self) -> Path:
        """The file of what preprocessing wrote down."""
        return self.folder / f"{self.name}{PROPERTIES}"


def case_names(files: Iterable[str]) -> list[str]:
    """The cases whose images are among the files of a folder, sorted."""
    return sorted(f[: -len(IMAGE)] for f in files if f.endswith(IMAGE) and not f.endswith(LABELS))


def list_cases(folder: Path) -> list[str]:
    """Names of the preprocessed cases of a folder, sorted; empty where the folder does not exist. Nothing is opened."""
    return case_names(os.listdir(folder)) if folder.is_dir() else []


def open_array(file: str | os.PathLike[str], *, mapped: bool = True) -> Any:
    """Open an image, a label map or a mask: a lazy array ``(C, Z, Y, X)``, mapped into memory as in nnU-Net; not on Windows.

    Raises:
        OSError: it is missing, or the disk is at fault.
        ValueError: it is damaged.
        MemoryError: memory is out.
    """
    mapping = {"mmap_mode": "r"} if mapped and os.name != "nt" else {}
    try:
        return blosc2.open(urlpath=str(file), mode="r", dparams={"nthreads": 1}, **mapping)
    except OSError:
        raise
    except Exception as error:  # blosc2 raises several kinds
        raise cause_of(error, file) from error


def read_box(
    array: Any,
    start: Sequence[int] | np.ndarray,
    size: Sequence[int] | np.ndarray,
    dtype: Any = np.float32,
    outside: int = 0,
) -> np.ndarray:
    """Read a box of a lazy array ``(C, Z, Y, X)``: ``(C, *size)``; of an array in memory it may share its memory.

    ``start`` is the first voxel (z, y, x), negative outside the image, which has the value ``outside`` there.

    Raises:
        OSError: the disk is at fault.
        ValueError: the file is damaged.
        MemoryError: memory is out.
    """
    box = [(int(s), int(s) + int(n)) for s, n in zip(start, size)]
    inside = [(min(max(low, 0), n), min(max(high, 0), n)) for (low, high), n in zip(box, array.shape[1:])]
    read = (slice(None), *[slice(low, high) for low, high in inside])
    try:
        part = np.asarray(array[read])
    except RuntimeError as error:
        raise cause_of(error, getattr(array, "urlpath", None)) from error
    if inside == box:
        return part.astype(dtype, copy=False)
    out = np.full((array.shape[0], *[high - low for low, high in box]), outside, dtype=dtype)
    there = (slice(None), *[slice(a - low, b - low) for (a, b), (low, _) in zip(inside, box)])
    out[there] = part
    return out


def cause_of(error: Exception, file: str | os.PathLike[str] | None) -> Exception:
    """What is at fault where blosc2 says only that it failed: memory, what the system says of the file, or else the file."""
    try:
        bytearray(SPARE_MEMORY)
        if file is not None:
            with open(file, "rb") as handle:
                handle.read(1)
    except (MemoryError, OSError) as cause:
        return cause
    return ValueError(str(error))


def complete(folder: Path, name: str) -> bool:
    """Whether all files of a preprocessed case can be read; looks at the properties and at the headers of the arrays."""
    try:
        read_properties(folder / f"{name}{PROPERTIES}")
        return all(len(open_array(folder / f"{name}{end}", mapped=False).shape) == 4 for end in (IMAGE, LABELS))
    except Exception:  # unpickling raises anything
        return False
