"""Walks folders and tells images from everything else; DICOM by its content, other formats by their ending."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from nnssl.errors import NnsslError
from nnssl.files import is_text, read_json
from nnssl.pretrain.images.headers import is_dicom
from nnssl.pretrain.images.items import Item, Rejected
from nnssl.pretrain.images.kinds import LABEL_MAP, TEST_IMAGE, label_path, modality_of_path

VOLUMES = (
    *(".nii.gz", ".nii", ".nrrd", ".nhdr", ".mha", ".mhd", ".gipl", ".gipl.gz"),
    *(".mgz", ".mgh", ".hdr", ".tif", ".tiff"),
)
DICOM = (".dcm", ".dicom", ".ima")
ARCHIVES = (".zip", ".tar", ".tgz", ".tar.gz", ".rar", ".7z", ".tar.bz2", ".tar.xz")
DETACHED = {
    ".raw": (".mhd", ".nhdr"),
    ".zraw": (".mhd",),
    ".raw.gz": (".nhdr",),
    ".gz": (".nhdr",),
    ".img": (".hdr",),
    ".img.gz": (".hdr",),
    ".json": (".tif", ".tiff"),
}
"""Endings of files that belong to an image file beside them (voxels of a header, the voxel size of a TIFF), with its ending."""

NOT_TEXT = "its path is no UTF-8 text: rename it"


@dataclass
class Found:
    """What lies in the folders.

    Attributes:
        images: files that hold an image each.
        dicom: (root, path) of DICOM files, which still have to be sorted into series.
        rejected: the rest.
        keep: what is not left out, see :data:`nnssl.pretrain.images.kinds.KEEP`.
    """

    images: list[Item] = field(default_factory=list)
    dicom: list[tuple[str, str]] = field(default_factory=list)
    rejected: list[Rejected] = field(default_factory=list)
    keep: Sequence[str] = ()


def _walk(folder: str, seen: set[tuple[int, int]]) -> Iterator[str]:
    """All files below a folder, sorted; links to folders are followed, each once. A folder whose name is no text is yielded."""
    info = os.stat(folder)
    if (info.st_dev, info.st_ino) in seen:
        return
    seen.add((info.st_dev, info.st_ino))
    with os.scandir(folder) as entries:
        ordered = sorted(entries, key=lambda e: e.name)
    for entry in ordered:
        if entry.is_dir() and is_text(entry.path):
            yield from _walk(entry.path, seen)
        else:
            yield entry.path


def _starts_like_dicom(path: str) -> bool:
    with open(path, "rb") as file:
        return is_dicom(file.read(132))


def _belongs_to_header(path: str) -> bool:
    for ending, headers in DETACHED.items():
        if path.lower().endswith(ending):
            stem = path[: -len(ending)]
            if any(os.path.exists(stem + h) for h in headers):
                return True
    return False


@lru_cache(maxsize=1024)
def dataset_channels(folder: str) -> tuple[str, ...] | None:
    """Channel names of the nnU-Net dataset that a folder of images is of; () where they are unknown, None for other folders."""
    parent = Path(folder).absolute().parent
    if Path(folder).name not in ("imagesTr", "imagesTs", "imagesVal"):
        return None
    if not (parent / "dataset.json").is_file():
        return () if (parent / "imagesTr").is_dir() else None
    try:
        description = read_json(parent / "dataset.json")
        names = description.get("channel_names") or description.get("modality") or {}
        return tuple(str(names[k]) for k in sorted(names, key=int))
    except (NnsslError, AttributeError, TypeError, ValueError):
        return ()


def _image(path: str, root: str, found: Found) -> Item | Rejected:
    text = os.path.relpath(path, root)
    folder = os.path.dirname(path)
    names = dataset_channels(folder)
    # the folder itself may have been given, so that the text does not name it
    if "label-maps" not in found.keep and (label_path(text) or os.path.basename(folder) in ("labelsTr", "labelsTs")):
        return Rejected(path, LABEL_MAP, "by its path")
    if names is not None and os.path.basename(folder) != "imagesTr" and "test-images" not in found.keep:
        return Rejected(path, TEST_IMAGE)
    modality = names[0] if names and len(names) == 1 else modality_of_path(text)
    return Item((os.path.abspath(path),), root, text, modality=modality)


def _sort(path: str, root: str, found: Found) -> None:
    name = os.path.basename(path)
    lower = name.lower()
    if not is_text(path):
        several = sum(len(files) for _, _, files in os.walk(path)) if os.path.isdir(path) else 1
        found.rejected.append(Rejected(path, NOT_TEXT, "a folder" if os.path.isdir(path) else "", several))
    elif name.startswith("."):
        found.rejected.append(Rejected(path, "a hidden file"))
    elif not os.path.isfile(path):
        found.rejected.append(Rejected(path, "it cannot be reached (a dead link?)"))
    elif lower.endswith(VOLUMES):
        one = _image(path, root, found)
        (found.images if isinstance(one, Item) else found.rejected).append(one)  # type: ignore[arg-type]
    elif lower.endswith(ARCHIVES):
        found.rejected.append(Rejected(path, "an archive, which has to be unpacked first"))
    elif lower == "dicomdir":
        found.rejected.append(Rejected(path, "an index of DICOM files"))
    elif lower.endswith(DICOM) or _starts_like_dicom(path):
        found.dicom.append((root, os.path.abspath(path)))
    elif not _belongs_to_header(path):
        found.rejected.append(Rejected(path, "no image format that is read", os.path.splitext(lower)[1]))


def scan(folders: Sequence[str | os.PathLike[str]], keep: Sequence[str] = ()) -> Found:
    """Look through folders, recursively; single files may be named too. A file that is reached twice counts once.

    Args:
        folders: where to look.
        keep: see :data:`nnssl.pretrain.images.kinds.KEEP`.

    Raises:
        NnsslError: a folder does not exist or cannot be listed.
    """
    found, seen, files = Found(keep=keep), set[tuple[int, int]](), set[str]()
    dataset_channels.cache_clear()
    for given in folders:
        root = os.fspath(given)
        if not os.path.exists(root):
            raise NnsslError(f"{root!a} does not exist." if not is_text(root) else f"{root} does not exist.")
        if not is_text(os.path.abspath(root)):
            raise NnsslError(f"The path {root!a} is no UTF-8 text: rename the folder.")
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
