"""Walks folders and tells images from everything else; DICOM by its content, other formats by their ending."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path

from nnssl.errors import NnsslError
from nnssl.files import is_text, read_json
from nnssl.pretrain.images.headers import is_dicom
from nnssl.pretrain.images.items import VOLUMES, Item, Rejected
from nnssl.pretrain.images.kinds import LABEL_MAP, TEST_IMAGE, label_path, modality_of_path
from nnssl.pretrain.prepare.raw import channel_names

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


Found = Item | Rejected | tuple[str, str]
"""An image, what is not used, or (root, path) of a DICOM file, which still has to be sorted into a series."""


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
    stems = ((path[: -len(ending)], headers) for ending, headers in DETACHED.items() if path.lower().endswith(ending))
    return any(os.path.exists(stem + header) for stem, headers in stems for header in headers)


@lru_cache(maxsize=1024)
def dataset_channels(folder: str) -> tuple[str, ...] | None:
    """Channel names of the nnU-Net dataset that a folder of images is of; () where they are unknown, None for other folders."""
    parent = Path(folder).absolute().parent
    if Path(folder).name not in ("imagesTr", "imagesTs", "imagesVal"):
        return None
    if not (parent / "dataset.json").is_file():
        return () if (parent / "imagesTr").is_dir() else None
    try:
        return tuple(channel_names(read_json(parent / "dataset.json")).values())
    except NnsslError:
        return ()


def _image(path: str, root: str, keep: Sequence[str]) -> Item | Rejected:
    text, folder = os.path.relpath(path, root), os.path.dirname(path)
    names, own = dataset_channels(folder), os.path.basename(folder)
    # the folder itself may have been given, so that the text does not name it
    if "label-maps" not in keep and (label_path(text) or own in ("labelsTr", "labelsTs")):
        return Rejected(path, LABEL_MAP, "by its path")
    if names is not None and own != "imagesTr" and "test-images" not in keep:
        return Rejected(path, TEST_IMAGE)
    modality = names[0] if names and len(names) == 1 else modality_of_path(text)
    return Item((os.path.abspath(path),), root, text, modality=modality)


def _sorted(path: str, root: str, keep: Sequence[str]) -> Found | None:
    """What a file or a folder with an odd name is; None for one that belongs to an image beside it."""
    name = os.path.basename(path)
    lower = name.lower()
    if not is_text(path):
        if os.path.isdir(path):
            return Rejected(path, NOT_TEXT, "a folder", sum(len(files) for _, _, files in os.walk(path)))
        return Rejected(path, NOT_TEXT)
    if name.startswith("."):
        return Rejected(path, "a hidden file")
    if not os.path.isfile(path):
        return Rejected(path, "it cannot be reached (a dead link?)")
    if lower.endswith(VOLUMES):
        return _image(path, root, keep)
    if lower.endswith(ARCHIVES):
        return Rejected(path, "an archive, which has to be unpacked first")
    if lower == "dicomdir":
        return Rejected(path, "an index of DICOM files")
    if lower.endswith(DICOM) or _starts_like_dicom(path):
        return root, os.path.abspath(path)
    return (
        None if _belongs_to_header(path) else Rejected(path, "no image format that is read", os.path.splitext(lower)[1])
    )


def scan(
    folders: Sequence[str | os.PathLike[str]], keep: Sequence[str]
) -> tuple[list[Item | Rejected], list[tuple[str, str]]]:
    """Look through folders, recursively; single files may be named too. A file that is reached twice counts once.

    Returns images and what is not used, and (root, path) of DICOM files. Raises :class:`NnsslError` where a folder does not exist
    or cannot be listed.
    """
    found: list[Found | None] = []
    seen, files = set[tuple[int, int]](), set[str]()
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
                    found.append(_sorted(path, os.path.dirname(root) if single else root, keep))
                except OSError as error:
                    found.append(Rejected(path, "it cannot be opened", str(error.strerror)))
        except OSError as error:
            raise NnsslError(f"{error.filename or root} cannot be listed: {error.strerror}.") from error
    return [f for f in found if isinstance(f, (Item, Rejected))], [f for f in found if isinstance(f, tuple)]
