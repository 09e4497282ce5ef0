"""What is known of all cases of a source in one file, so that a start need not look at each of them.

Whether the index lines (one per case) still hold is seen only by looking at every raw and every preprocessed file, which takes
minutes for 100,000 on a network file system. The manifest is a snapshot of a start that did look. It is believed only if

- it is whole (its first line has the hash of the second),
- the folders of raw and of preprocessed images, and dataset.json, have the modification times that they had, which tells of
  files that were added, removed or renamed, and the index files have the sizes that they had,
- these times are well before its own (a change within the same tick of a coarse clock would not be seen),
- :data:`SPOT_CHECKS` cases, others every day, have the raw and preprocessed files that it says.

What it cannot see is the rest of the raw files being overwritten in place under the same name; ``nnssl_pretrain
--preprocess-only`` looks at all of them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import random
from collections.abc import Mapping
from dataclasses import astuple, dataclass, field, fields
from datetime import date
from pathlib import Path
from typing import Any

from nnssl.files import write_atomic
from nnssl.paths import set_folders
from nnssl.pretrain.data.case_set import BadCase
from nnssl.pretrain.data.folders import beside
from nnssl.pretrain.prepare.index import Entry, journals
from nnssl.pretrain.prepare.raw import RawSource

log = logging.getLogger("nnssl")

SCHEMA = 1
VARIABLES = ("nnUNet_raw", "nnUNet_preprocessed")

SPOT_CHECKS = 64  # cases whose files are looked at before a manifest is believed

RACY_SECONDS = 2.0
"""Some file systems count in seconds: a folder that changed less than this before the manifest may have changed again."""


def _time(path: Path) -> int | None:
    """Modification time in ns, None where there is nothing."""
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return None


def settled_times(times: Mapping[str, int | None], written_ns: int) -> bool:
    """Whether all times are well before the time at which they were written down."""
    return all(t is None or t < written_ns - RACY_SECONDS * 1e9 for t in times.values())


@dataclass
class Manifest:
    """A snapshot of one source."""

    source: str
    folder: Path
    raw: RawSource = field(default_factory=RawSource)  # but for the cases
    entries: dict[str, Entry] = field(default_factory=dict)  # of all cases that are done or known to be bad
    waiting: list[str] = field(default_factory=list)  # cases that are not preprocessed
    order: tuple[int, ...] | None = None  # source channel for each target channel, where that is another order

    @property
    def path(self) -> Path:
        """``<folder>_manifest.json``."""
        return beside(self.folder, "manifest.json")

    def state(self) -> dict[str, Any]:
        """What must not have changed: times of folders, sizes of index files. Taken before they are looked at."""
        roots = set_folders()
        watched = [self.folder, *(roots[v] / self.source / "dataset.json" for v in VARIABLES if v in roots)]
        watched += [roots["nnUNet_raw"] / self.source / "imagesTr"] if "nnUNet_raw" in roots else []
        sizes = {f.name: f.stat().st_size for f in journals(beside(self.folder, "index.jsonl"))}
        return {"times": {str(path): _time(path) for path in watched}, "index": sizes}

    def write(self, state: Mapping[str, Any]) -> None:
        """Write it, whole or not at all; where that is not possible the next start looks at all files again.

        ``state``: what :meth:`state` gave before the files were looked at.
        """
        columns = {f.name: [getattr(e, f.name) for e in self.entries.values()] for f in fields(Entry)}
        body = {
            "entries": columns,
            "waiting": self.waiting,
            "misfits": [astuple(b) for b in self.raw.bad],
            "n_channels": self.raw.n_channels,
            "channel_names": self.raw.channel_names,
            "order": self.order,
        }
        try:
            text = json.dumps(body).encode()
            head = {"schema": SCHEMA, "source": self.source, "sha256": hashlib.sha256(text).hexdigest(), **state}
            write_atomic(self.path, lambda file: file.write(json.dumps(head).encode() + b"\n" + text + b"\n"))
        except (OSError, ValueError) as error:
            log.debug("%s is not written: %s", self.path, error)

    @classmethod
    def read(cls, source: str, folder: Path) -> Manifest | None:
        """The snapshot, or None where there is none that can be believed."""
        found = cls(source, folder)
        try:
            path = found.path if found.path.exists() else beside(folder, "catalogue.json")  # its name before
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
        rows = (dict(zip(columns, row)) for row in zip(*columns.values(), strict=True))
        self.entries = {row["name"]: Entry.from_json(row) for row in rows}
        self.waiting = list(body["waiting"])
        names = {int(k): str(v) for k, v in body["channel_names"].items()}
        self.raw = RawSource({}, int(body["n_channels"]), names, [BadCase(*m) for m in body["misfits"]])
        self.order = None if body["order"] is None else tuple(body["order"])

    def _spot_check(self, key: str) -> None:
        """Raises ``ValueError`` where a case's files are not what is written."""
        entries = list(self.entries.values())
        root = set_folders().get("nnUNet_raw")
        images = None if root is None else root / self.source / "imagesTr"
        for entry in random.Random(f"{key}{date.today()}").sample(entries, min(SPOT_CHECKS, len(entries))):
            if not entry.bad and not (self.folder / f"{entry.name}.b2nd").is_file():
                raise ValueError(f"the preprocessed {entry.name} is gone")
            if images is None:
                continue
            for file, size, time in entry.files:
                with contextlib.suppress(FileNotFoundError):  # named in dataset.json and elsewhere
                    info = os.stat(images / file)
                    if (info.st_size, info.st_mtime_ns) != (size, time):
                        raise ValueError(f"{file} has changed")
