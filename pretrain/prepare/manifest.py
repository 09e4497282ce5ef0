"""What is known of all cases of a source in one file, so that a start need not look at each of them.

The index lines (one per case, appended while cases are made) say what was made; whether they still hold is seen only by
looking at every raw and every preprocessed file, which takes minutes for 100,000 on a network file system. The manifest is a
snapshot of a start that did look. It is taken back only if

- it is whole (its first line has the hash of the second),
- the folders of raw and of preprocessed images, and dataset.json, have the modification times that they had, which tells of
  files that were added, removed or renamed, and the index files have the sizes that they had,
- these times are well before its own (a change within the same tick of a coarse clock would not be seen),
- :data:`SPOT_CHECKS` cases, others every day, have the raw and preprocessed files that it says.

Otherwise it is made anew. What it cannot see is the rest of the raw files being overwritten in place under the same name;
``nnssl_pretrain --preprocess-only`` looks at all of them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from datetime import date
from pathlib import Path
from typing import Any

from nnssl.files import write_atomic
from nnssl.paths import set_folders
from nnssl.pretrain.data.case_set import BadCase
from nnssl.pretrain.prepare.index import Entry, journals

log = logging.getLogger("nnssl")

SCHEMA = 1

SPOT_CHECKS = 64
"""Cases whose files are looked at before a manifest is believed."""

RACY_SECONDS = 2.0
"""Some file systems count in seconds: a folder that changed less than this before the manifest may have changed again."""


def folder_times(paths: Sequence[Path]) -> dict[str, int | None]:
    """Path -> modification time in ns, None where there is nothing."""
    times: dict[str, int | None] = {}
    for path in paths:
        try:
            times[str(path)] = path.stat().st_mtime_ns
        except OSError:
            times[str(path)] = None
    return times


def settled_times(times: Mapping[str, int | None], written_ns: int) -> bool:
    """Whether all times are well before the time at which they were written down."""
    return all(t is None or t < written_ns - RACY_SECONDS * 1e9 for t in times.values())


@dataclass
class Manifest:
    """A snapshot of one source.

    Attributes:
        source: name of the dataset.
        folder: of its preprocessed cases.
        entries: of all cases that are done or known to be bad.
        waiting: cases that are not preprocessed.
        misfits: files and cases that do not fit nnU-Net's form.
        n_channels, channel_names: of the raw images, see :class:`nnssl.pretrain.prepare.raw.RawSource`.
        order: source channel for each target channel where they were put into another order.
    """

    source: str
    folder: Path
    entries: dict[str, Entry] = field(default_factory=dict)
    waiting: list[str] = field(default_factory=list)
    misfits: list[BadCase] = field(default_factory=list)
    n_channels: int = 1
    channel_names: dict[int, str] = field(default_factory=dict)
    order: tuple[int, ...] | None = None

    @property
    def path(self) -> Path:
        """``<folder>_manifest.json``."""
        return self.folder.with_name(f"{self.folder.name}_manifest.json")

    def state(self) -> dict[str, Any]:
        """What must not have changed: times of folders, sizes of index files. Taken before they are looked at."""
        watched = [self.folder]
        for variable in ("nnUNet_raw", "nnUNet_preprocessed"):
            root = set_folders().get(variable)
            if root is not None:
                watched.append(root / self.source / "dataset.json")
                watched += [root / self.source / "imagesTr"] if variable == "nnUNet_raw" else []
        index = self.folder.with_name(f"{self.folder.name}_index.jsonl")
        return {"times": folder_times(watched), "index": {f.name: f.stat().st_size for f in journals(index)}}

    def write(self, state: Mapping[str, Any]) -> bool:
        """Write it, whole or not at all; where that is not possible the next start looks at all files again.

        Args:
            state: what :meth:`state` gave before the files were looked at.

        Returns:
            Whether it was written.
        """
        try:
            names = [f.name for f in fields(Entry)]
            body = {
                "entries": {n: [getattr(e, n) for e in self.entries.values()] for n in names},
                "waiting": self.waiting,
                "misfits": [[b.case, b.file, b.reason] for b in self.misfits],
                "n_channels": self.n_channels,
                "channel_names": self.channel_names,
                "order": self.order,
            }
            text = json.dumps(body).encode()
            head = {"schema": SCHEMA, "source": self.source, "sha256": hashlib.sha256(text).hexdigest(), **state}
            write_atomic(self.path, lambda file: file.write(json.dumps(head).encode() + b"\n" + text + b"\n"))
        except (OSError, ValueError) as error:
            log.debug("%s is not written: %s", self.path, error)
            return False
        return True

    @classmethod
    def read(cls, source: str, folder: Path) -> Manifest | None:
        """The snapshot, or None where there is none that can be believed."""
        found = cls(source, folder)
        try:
            path = found.path
            if not path.exists():  # its name before
                path = folder.with_name(f"{folder.name}_catalogue.json")
            written = path.stat().st_mtime_ns
            with open(path, "rb") as file:
                head, text = json.loads(file.readline()), file.readline()
            if not text.endswith(b"\n") or hashlib.sha256(text[:-1]).hexdigest() != head["sha256"]:
                raise ValueError("it is damaged")
            if head["schema"] != SCHEMA or head["source"] != source:
                raise ValueError("it is of another version or source")
            state = found.state()
            if {k: head[k] for k in state} != state:
                raise ValueError("files were added, removed or renamed since")
            if not settled_times(head["times"], written):
                raise ValueError("it was written right after a change")
            found._take(json.loads(text))
            found._spot_check(head["sha256"])
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            log.debug("The manifest of %s is made anew: %s.", source, error)
            return None
        return found

    def _take(self, body: dict[str, Any]) -> None:
        columns = body["entries"]
        columns["files"] = [tuple((n, s, m) for n, s, m in files) for files in columns["files"]]
        for name in ("shape", "spacing"):
            columns[name] = [tuple(values) for values in columns[name]]
        names = list(columns)
        entries = (Entry(**dict(zip(names, row))) for row in zip(*columns.values(), strict=True))
        self.entries = {entry.name: entry for entry in entries}
        self.waiting = list(body["waiting"])
        self.misfits = [BadCase(*m) for m in body["misfits"]]
        self.n_channels = int(body["n_channels"])
        self.channel_names = {int(k): str(v) for k, v in body["channel_names"].items()}
        self.order = None if body["order"] is None else tuple(body["order"])

    def _spot_check(self, key: str) -> None:
        """Raises ``ValueError`` where a case's files are not what is written."""
        names = list(self.entries)
        chosen = random.Random(f"{key}{date.today()}").sample(range(len(names)), min(SPOT_CHECKS, len(names)))
        raw = set_folders().get("nnUNet_raw")
        images = None if raw is None else raw / self.source / "imagesTr"
        for i in chosen:
            entry = self.entries[names[i]]
            if not entry.bad and not (self.folder / f"{entry.name}.b2nd").is_file():
                raise ValueError(f"the preprocessed {entry.name} is gone")
            if images is None:
                continue
            for file, size, time in entry.files:
                with contextlib.suppress(FileNotFoundError):  # named in dataset.json and elsewhere
                    info = os.stat(images / file)
                    if (info.st_size, info.st_mtime_ns) != (size, time):
                        raise ValueError(f"{file} has changed")
