"""What is found in a folder: an image, or something that is not used and why."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from nnssl.errors import NnsslError

ENDINGS = re.compile(r"\.?(nii\.gz|nii|nrrd|nhdr|mha|mhd|gipl|gipl\.gz|mgz|mgh|hdr|tif|tiff)$", re.IGNORECASE)

FOUR_D = ("reject", "split", "first")
"""What becomes of an image with several volumes: nothing, a case of each, or a case of the first."""


@dataclass(frozen=True)
class Item:
    """One image.

    Attributes:
        files: a file, or the slices of a DICOM series from bottom to top.
        root: the folder that it was found under, as given.
        text: path below that folder, for DICOM with the series' description: what ``--channels`` is matched with.
        study: DICOM's study identifier; empty for other formats.
        modality: DICOM's, for example ``"CT"``, or a channel's name; empty where unknown.
        dicom: whether it is DICOM.
        size: voxels (x, y, z) that DICOM's headers tell of each volume; empty where they do not.
        step: mm from slice to slice that they tell.
        volumes: of a multi-frame file with more frames than those of one volume: the frames of each, from bottom to top.
    """

    files: tuple[str, ...]
    root: str
    text: str
    study: str = ""
    modality: str = ""
    dicom: bool = False
    size: tuple[int, ...] = ()
    step: float = 0.0
    volumes: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True)
class Rejected:
    """What is not used.

    Attributes:
        file: it, or the first of several.
        reason: the same for all of a kind; it names nobody.
        detail: what is special here; it may hold paths.
        count: files.
    """

    file: str
    reason: str
    detail: str = ""
    count: int = 1


@dataclass(frozen=True)
class Task:
    """One case to be: its channels, and a key that changes when a file does."""

    key: str
    items: tuple[Item, ...]

    @classmethod
    def of(cls, items: Sequence[Item]) -> Task:
        """The key is a hash of paths, sizes and times: it finds an image again and tells nothing of it."""
        digest = hashlib.sha256()
        for item in items:
            for file in item.files:
                info = os.stat(file)
                text = f"{os.path.abspath(file)}\0{info.st_size}\0{info.st_mtime_ns}\n"
                digest.update(text.encode("utf-8", "surrogateescape"))
        return cls(digest.hexdigest(), tuple(items))


def single_channels(items: Sequence[Item]) -> list[Task]:
    """Each image is a case."""
    return [Task.of([item]) for item in items]


def _pattern(name: str, pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern, re.IGNORECASE)
    except re.error as error:
        raise NnsslError(f"--channels {name}={pattern}: this is no regular expression ({error}).") from None


def group_channels(items: Sequence[Item], patterns: Mapping[str, str]) -> tuple[list[Task], list[Rejected]]:
    """Images that differ in their channel only become one case.

    Args:
        items: all of them.
        patterns: channel name -> regular expression, upper and lower case alike, that is looked for in :attr:`Item.text`.
            Of several that match, the one with the longest match counts (``_t1ce`` and not ``_t1``). DICOM series belong together
            where their study is the same, other files where their path is but for the match and the ending.

    Returns:
        The cases, and the images of which no case can be made.

    Raises:
        NnsslError: a pattern is none.
    """
    compiled = {name: _pattern(name, pattern) for name, pattern in patterns.items()}
    groups: dict[str, dict[str, list[Item]]] = {}
    rejected = []
    for item in items:
        found = {name: match for name, p in compiled.items() if (match := p.search(item.text))}
        longest = max((len(match[0]) for match in found.values()), default=0)
        found = {name: match for name, match in found.items() if len(match[0]) == longest}
        if len(found) != 1:
            reason = "it matches several channels" if found else "it matches no channel"
            rejected.append(Rejected(item.files[0], reason, ", ".join(found), len(item.files)))
            continue
        (name, match), *_ = found.items()
        rest = item.study or item.text[: match.start()] + "\0" + ENDINGS.sub("", item.text[match.end() :])
        groups.setdefault(f"{item.root}\0{rest}", {}).setdefault(name, []).append(item)
    tasks = []
    for channels in groups.values():
        missing = [name for name in compiled if name not in channels]
        twice = [name for name, several in channels.items() if len(several) > 1]
        if missing or twice:
            reason = "a channel of its case is missing" if missing else "its case has several images for a channel"
            members = [i for several in channels.values() for i in several]
            rejected += [Rejected(i.files[0], reason, ", ".join(missing or twice), len(i.files)) for i in members]
        else:
            tasks.append(Task.of([channels[name][0] for name in compiled]))
    return tasks, rejected
