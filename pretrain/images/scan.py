"""Walks folders and tells images from everything else; DICOM by its content, other formats by their ending."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from nnssl.errors import NnsslError
from nnssl.pretrain.images.items import Item, Rejected

__all__ = ["Found", "scan"]

VOLUMES = (".nii.gz", ".nii", ".nrrd", ".nhdr", ".mha", ".mhd")
DICOM = (".dcm", ".dicom", ".ima")
ARCHIVES = (".zip", ".tar", ".tgz", ".tar.gz", ".rar", ".7z", ".tar.bz2", ".tar.xz")
DETACHED = {".raw": (".mhd", ".nhdr"), ".zraw": (".mhd",), ".raw.gz": (".nhdr",), ".gz": (".nhdr",)}
"""Endings of voxels whose header is a file of its own beside them, with the header's ending."""


@dataclass
class Found:
    """What lies in the folders.

    Attributes:
        images: files that hold an image each.
        dicom: (root, path) of DICOM files, which still have to be sorted into series.
        rejected: the rest.
    """

    images: list[Item] = field(default_factory=list)
    dicom: list[tuple[str, str]] = field(default_factory=list)
    rejected: list[Rejected] = field(default_factory=list)


def _walk(folder: str, seen: set[tuple[int, int]]) -> Iterator[str]:
    """All files below a folder, sorted; links to folders are followed, each folder once."""
    info = os.stat(folder)
    if (info.st_dev, info.st_ino) in seen:
        return
    seen.add((info.st_dev, info.st_ino))
    with os.scandir(folder) as entries:
        ordered = sorted(entries, key=lambda e: e.name)
    for entry in ordered:
        if entry.is_dir():
            yield from _walk(entry.path, seen)
        else:
            yield entry.path


def _starts_like_dicom(path: str) -> bool:
    with open(path, "rb") as file:
        return file.read(132)[128:] == b"DICM"


def _belongs_to_header(path: str) -> bool:
    for ending, headers in DETACHED.items():
        if path.lower().endswith(ending):
            stem = path[: -len(ending)]
            if any(os.path.exists(stem + h) for h in headers):
                return True
    return False


def _sort(path: str, root: str, found: Found) -> None:
    name = os.path.basename(path)
    lower = name.lower()
    if name.startswith("."):
        found.rejected.append(Rejected(path, "a hidden file"))
    elif not os.path.isfile(path):
        found.rejected.append(Rejected(path, "it cannot be reached (a dead link?)"))
    elif lower.endswith(VOLUMES):
        found.images.append(Item((os.path.abspath(path),), root, os.path.relpath(path, root)))
    elif lower.endswith(ARCHIVES):
        found.rejected.append(Rejected(path, "an archive, which has to be unpacked first"))
    elif lower == "dicomdir":
        found.rejected.append(Rejected(path, "an index of DICOM files"))
    elif lower.endswith(DICOM) or _starts_like_dicom(path):
        found.dicom.append((root, os.path.abspath(path)))
    elif not _belongs_to_header(path):
        found.rejected.append(Rejected(path, "no image format that is read", os.path.splitext(lower)[1]))


def scan(folders: Sequence[str | os.PathLike[str]]) -> Found:
    """Look through folders, recursively; single files may be named too. A file that is reached twice counts once.

    Raises:
        NnsslError: a folder does not exist or cannot be listed.
    """
    found, seen, files = Found(), set[tuple[int, int]](), set[str]()
    for given in folders:
        root = os.fspath(given)
        if not os.path.exists(root):
            raise NnsslError(f"{root} does not exist.")
        single = os.path.isfile(root)
        try:
            for path in [root] if single else _walk(root, seen):
                real = os.path.realpath(path)
                if real in files:
                    continue
                files.add(real)
                try:
                    _sort(path, os.path.dirname(root) if single else root, found)
                except OSError as error:
                    found.rejected.append(Rejected(path, "it cannot be opened", str(error.strerror)))
        except OSError as error:
            raise NnsslError(f"{error.filename or root} cannot be listed: {error.strerror}.") from error
    return found
