"""The raw dataset that images are added to: names, places, what was added before, and dataset.json."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from nnssl.errors import NnsslError
from nnssl.files import move_into_place, read_json, write_json
from nnssl.journal import append_line, read_lines
from nnssl.paths import raw_folder
from nnssl.plans import dataset_id, list_datasets
from nnssl.plans.description import check_description
from nnssl.pretrain.prepare.raw import channel_names

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
ENDING = ".nii.gz"
INDEX = "nnssl_images.jsonl"


@dataclass(frozen=True)
class Line:
    """What became of one task in an earlier call: its cases with the hash of each, or why it gave none under which options.

    It holds hashes and neutral names, no path.
    """

    key: str
    cases: tuple[str, ...] = ()
    sha256: tuple[str, ...] = ()
    reason: str = ""
    options: str = ""


def find_dataset(number: int | str, name: str | None) -> str:
    """The full name of a dataset, from its id or full name and from what follows the id; it need not exist yet.

    Raises:
        NnsslError: a name that nnU-Net cannot take, or another one than the dataset's.
    """
    text = str(number)
    if not text.isdecimal():
        own = text.partition("_")[2]
        if name not in (None, own):
            raise NnsslError(f"-d {text} and --name {name} name two datasets.")
        return find_dataset(dataset_id(text), own)
    if name is not None and (not _NAME.fullmatch(name) or "__" in name):
        raise NnsslError(
            f"--name {name}: letters, digits, - and single _ are possible. It becomes part of every case's name."
        )
    known = [n for n in list_datasets() if dataset_id(n) == int(text)]
    if name is not None:
        full = f"Dataset{int(text):03d}_{name}"
        if known and full not in known:
            raise NnsslError(
                f"Dataset {text} exists and is called {known[0]}. Leave out --name, or take another number."
            )
        return full
    if not known:
        raise NnsslError(f"There is no dataset {text} yet: name it with --name.")
    if len(known) > 1:
        raise NnsslError(f"Dataset {text} has several names: {', '.join(known)}. Give the whole name with -d.")
    return known[0]


@dataclass
class Dataset:
    """``nnUNet_raw/<name>``; call :meth:`open` first. ``lines``: of earlier calls by key. ``hashes``: of voxels -> case."""

    name: str
    channels: tuple[str, ...] = ()
    lines: dict[str, Line] = field(default_factory=dict)
    hashes: dict[str, str] = field(default_factory=dict)
    _next: int = 1

    @property
    def folder(self) -> Path:
        """``nnUNet_raw/<name>``."""
        return raw_folder() / self.name

    @property
    def images(self) -> Path:
        """``imagesTr``."""
        return self.folder / "imagesTr"

    @property
    def _json(self) -> Path:
        return self.folder / "dataset.json"

    @property
    def _prefix(self) -> str:
        return self.name.partition("_")[2]

    def open(self) -> None:
        """Look at what is there; raises :class:`NnsslError` where it has labels, or images of another format."""
        labels = self.folder / "labelsTr"
        if labels.is_dir() and any(labels.iterdir()):
            raise NnsslError(
                f"{self.name} has labels; images without labels would break it. Take a dataset of its own."
            )
        if self._json.is_file():
            description = read_json(self._json)
            check_description(description, self._json)
            ending = description.get("file_ending", ENDING)
            if ending != ENDING or description.get("dataset"):
                what = f"holds {ending} files" if ending != ENDING else "names its images one by one"
                raise NnsslError(f"{self.name} {what}; images are added as {ENDING}. Take a dataset of its own.")
            self.channels = tuple(channel_names(description).values())
        self._read_index()
        pattern = re.compile(re.escape(self._prefix) + r"_(\d+)_\d{4}" + re.escape(ENDING))
        files = os.listdir(self.images) if self.images.is_dir() else []
        numbers = sorted({int(m[1]) for f in files if (m := pattern.fullmatch(f))})
        self._next = max(numbers, default=0) + 1
        odd = [case for n in numbers if not self._whole(case := f"{self._prefix}_{n:04d}")]
        if odd:
            raise NnsslError(
                f"{self.name}: {', '.join(odd[:3])} has fewer than {len(self.channels)} channels, as an interrupted call leaves "
                "it. Delete its files in imagesTr and start again; the case is then added anew."
            )

    def _read_index(self) -> None:
        def made(content: dict[str, Any]) -> Line:
            return Line(**{**content, **{k: tuple(content[k]) for k in ("cases", "sha256")}})

        for line in read_lines(self.folder / INDEX, made):
            self.lines[line.key] = line
        for line in list(self.lines.values()):
            there = {sha: case for sha, case in zip(line.sha256, line.cases) if self._whole(case)}
            self.hashes.update(there)
            if len(there) < len(line.cases):  # removed by the user, or a killed process was about to put it into place
                del self.lines[line.key]

    def _whole(self, case: str) -> bool:
        return all(os.path.exists(self.images / f"{case}_{c:04d}{ENDING}") for c in range(max(1, len(self.channels))))

    def append(self, line: Line) -> None:
        """Remember what became of a task."""
        append_line(self.folder / INDEX, vars(line))
        self.lines[line.key] = line

    def place(self, drafts: Sequence[str], sha256: str, line: Line) -> Line:
        """Move the channels of a case into place under the next free number.

        Returns the line of its task with this case, which is appended before anything is moved.
        """
        while True:
            case = f"{self._prefix}_{self._next:04d}"
            self._next += 1
            finals = [self.images / f"{case}_{c:04d}{ENDING}" for c in range(len(drafts))]
            told = replace(line, cases=(*line.cases, case), sha256=(*line.sha256, sha256))
            self.append(told)
            try:
                _move(drafts[0], finals[0])
            except FileExistsError:  # another call on another machine has just taken it
                continue
            for draft, final in zip(drafts[1:], finals[1:]):
                os.replace(draft, final)
            self.hashes[sha256] = case
            return told

    def describe(self) -> None:
        """Write dataset.json with the number of cases; what else is in it stays."""
        count = len({f.rsplit("_", 1)[0] for f in os.listdir(self.images) if f.endswith(ENDING)})
        content: dict[str, Any] = {
            "channel_names": {str(c): name for c, name in enumerate(self.channels)},
            "labels": {"background": 0},
            "numTraining": count,
            "file_ending": ENDING,
        }
        if self._json.is_file():
            content |= {**read_json(self._json), "numTraining": count}
        write_json(self._json, content)


def _move(draft: str, final: Path) -> None:
    """Rename, but never over a file that exists."""
    if os.path.islink(draft):
        os.symlink(os.readlink(draft), final)
        os.unlink(draft)
    else:
        move_into_place(draft, final, overwrite=False)
