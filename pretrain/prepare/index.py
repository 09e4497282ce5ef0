"""The index of a folder of preprocessed cases: one JSON line per case, in a file beside the folder."""

from __future__ import annotations

import contextlib
import glob
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nnssl.files import write_csv
from nnssl.journal import append_line, read_lines
from nnssl.pretrain.data.case_set import BadCase
from nnssl.pretrain.prepare.raw import Stamp


@dataclass(frozen=True)
class Entry:
    """What is known of one case."""

    name: str
    files: tuple[Stamp, ...]  # its raw files, in channel order
    shape: tuple[int, ...] = ()  # after preprocessing, (z, y, x) after transpose
    spacing: tuple[float, ...] = ()  # of the raw image in mm, (z, y, x) before transpose
    sha256: str = ""  # hash (hex) of the raw image's shape and voxels
    bad: str = ""  # why it cannot be used; empty for a good case
    bad_file: str = ""  # which file is to blame

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Entry:
        """Raises ``ValueError``, ``TypeError`` or ``KeyError`` for a line that is damaged."""
        files = tuple((str(n), int(s), int(m)) for n, s, m in content["files"])
        shape, spacing = tuple(map(int, content["shape"])), tuple(map(float, content["spacing"]))
        return cls(**{**content, "files": files, "shape": shape, "spacing": spacing})

    @property
    def refusal(self) -> BadCase:
        """Of a bad case: what it is to its source."""
        return BadCase(self.name, self.bad_file, self.bad)

    def to_json(self) -> dict[str, Any]:
        """What is written."""
        return {k: v for k, v in asdict(self).items() if v or k in ("files", "shape", "spacing")}


def journals(path: Path) -> list[Path]:
    """The index file and those that parts of the preprocessing wrote beside it, the one written last at the end.

    A part writes a file of its own, because appends of several machines to one file get lost on network file systems.
    """
    parts = path.parent.glob(f"{glob.escape(path.stem)}_*of*{path.suffix}") if path.parent.is_dir() else ()
    found = []
    for file in [path, *parts]:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            found.append((file.stat().st_mtime_ns, file))
    return [file for _, file in sorted(found)]


class Index:
    """Reads and appends to an index file and those of parts beside it (:func:`journals`).

    Of several lines for a case the last counts; damaged lines are passed over. ``part``: label of the part that gets the lines.
    """

    def __init__(self, path: Path, part: str = "") -> None:
        self.path = path.with_name(f"{path.stem}_{part}{path.suffix}") if part else path
        self.entries: dict[str, Entry] = {}
        for journal in journals(path):
            # a case whose line a killed process left unfinished is looked at again
            self.entries.update((entry.name, entry) for entry in read_lines(journal, Entry.from_json))

    def append(self, entry: Entry) -> None:
        """Add a line, see :func:`nnssl.journal.append_line`."""
        append_line(self.path, entry.to_json())
        self.entries[entry.name] = entry


def write_report(path: Path, bad: Sequence[BadCase]) -> Path | None:
    """Write the table of bad images (case, file, reason), or remove an outdated one where there are none; gives the file."""
    if not bad:
        path.unlink(missing_ok=True)
        return None
    write_csv(path, [("case", "file", "reason"), *((b.case, b.file, b.reason) for b in bad)])
    return path
