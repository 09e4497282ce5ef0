"""What is found in a folder: an image, or something that is not used and why."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from nnssl.errors import NnsslError

VOLUMES = (
    ".nii.gz", ".nii", ".nrrd", ".nhdr", ".mha", ".mhd", ".gipl.gz", ".gipl", ".mgz", ".mgh", ".hdr", ".tif", ".tiff",
)  # fmt: skip
"""Endings of files that hold an image each; DICOM is known by its content."""

_ENDING = re.compile(rf"\.?({'|'.join(re.escape(v[1:]) for v in VOLUMES)})$", re.IGNORECASE)


@dataclass(frozen=True)
class Rejected:
    """What is not used."""

    file: str  # or the first of several
    reason: str  # the same for all of a kind; it names nobody
    detail: str = ""  # what is special here; it may hold paths
    count: int = 1  # files


@dataclass(frozen=True)
class Item:
    """One image."""

    files: tuple[str, ...]  # one, or the slices of a DICOM series from bottom to top
    root: str  # the folder that it was found under, as given
    text: str  # path below that folder, for DICOM with the series' description: what --channels is matched with
    study: str = ""  # DICOM's identifier
    modality: str = ""  # DICOM's, for example "CT", or a channel's name; empty where unknown
    dicom: bool = False
    size: tuple[int, ...] = ()  # voxels (x, y, z) that DICOM's headers tell of each volume
    step: float = 0.0  # mm from slice to slice that they tell
    volumes: tuple[
        tuple[int, ...], ...
    ] = ()  # of a file with frames of several: the frames of each, from bottom to top

    def rejected(self, reason: str, detail: str = "") -> Rejected:
        """The line of the table where it is not used."""
        return Rejected(self.files[0], reason, detail, len(self.files))


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

    def rejected(self, reason: str, detail: str = "") -> Rejected:
        """The line of the table where it gives no case."""
        return Rejected(self.items[0].files[0], reason, detail, sum(len(item.files) for item in self.items))


def _pattern(name: str, pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern, re.IGNORECASE)
    except re.error as error:
        raise NnsslError(f"--channels {name}={pattern}: this is no regular expression ({error}).") from None


def group_channels(items: Sequence[Item], patterns: Mapping[str, str]) -> tuple[list[Task], list[Rejected]]:
    """Images that differ in their channel only become one case; those of which no case can be made are rejected.

    Patterns (channel name -> regular expression, upper and lower case alike) are looked for in :attr:`Item.text`. Of several
    that match, the one with the longest match counts (``_t1ce`` and not ``_t1``). DICOM series belong together where their
    study is the same, other files where their path is but for the match and the ending.
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
            rejected.append(item.rejected(reason, ", ".join(found)))
            continue
        (name, match), *_ = found.items()
        rest = item.study or item.text[: match.start()] + "\0" + _ENDING.sub("", item.text[match.end() :])
        groups.setdefault(f"{item.root}\0{rest}", {}).setdefault(name, []).append(item)
    tasks = []
    for channels in groups.values():
        missing = [name for name in compiled if name not in channels]
        twice = [name for name, several in channels.items() if len(several) > 1]
        if missing or twice:
            reason = "a channel of its case is missing" if missing else "its case has several images for a channel"
            members = [item for several in channels.values() for item in several]
            rejected += [item.rejected(reason, ", ".join(missing or twice)) for item in members]
        else:
            tasks.append(Task.of([channels[name][0] for name in compiled]))
    return tasks, rejected
