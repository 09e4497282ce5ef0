"""The raw images of a dataset, listed in one pass without opening any."""

from __future__ import annotations

import logging
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nnunetv2.imageio.reader_writer_registry import LIST_OF_IO_CLASSES

from nnssl.errors import NnsslError, raise_problems
from nnssl.files import is_text, read_json
from nnssl.paths import set_folders
from nnssl.plans import Plan
from nnssl.plans.description import check_description
from nnssl.pretrain.data.case_set import BadCase
from nnssl.words import counted, first_few

log = logging.getLogger("nnssl")

IMAGES = (
    ".nii.gz", ".nii", ".nrrd", ".nhdr", ".mha", ".mhd", ".gipl", ".mgz", ".mgh", ".hdr", ".dcm", ".tif", ".tiff", ".png",
    ".bmp", ".jpg", ".jpeg",
)  # fmt: skip
"""Endings of images, in small letters."""

NAMED = 3

Stamp = tuple[str, int, int]
"""Name of a file, its size in bytes, and its modification time in ns: another content nearly always changes one."""

Listing = tuple[dict[str, dict[int, tuple[str, Stamp]]], list[BadCase]]
"""``{case: {channel: (path, stamp)}}``, and the files that do not fit."""


@dataclass(frozen=True)
class RawCase:
    """The image files of one case, one per channel: absolute paths in channel order, with the stamp of each."""

    name: str
    files: tuple[str, ...]
    stamps: tuple[Stamp, ...]


@dataclass
class RawSource:
    """The raw images of one dataset."""

    cases: dict[str, RawCase] = field(default_factory=dict)
    n_channels: int = 1  # files (or declared channels) per case
    channel_names: dict[int, str] = field(default_factory=dict)  # empty where dataset.json does not tell
    bad: list[BadCase] = field(default_factory=list)  # files and cases that do not fit nnU-Net's form


def describe(source: str) -> dict[str, Any]:
    """The source's dataset.json, of nnU-Net's present form, from the raw or the preprocessed folder; {} where there is none."""
    folders = set_folders()
    for variable in ("nnUNet_raw", "nnUNet_preprocessed"):
        if variable in folders:
            path = folders[variable] / source / "dataset.json"
            if path.is_file():
                content = read_json(path)
                check_description(content, path)
                return content
    return {}


def channel_names(description: dict[str, Any]) -> dict[int, str]:
    """Channel names of a dataset.json by index; {} where it has none that can be read."""
    names = description.get("channel_names") or description.get("modality") or {}
    try:
        return {int(k): str(v) for k, v in sorted(names.items(), key=lambda item: int(item[0]))}
    except (AttributeError, ValueError):
        return {}


def _stamp(name: str, info: os.stat_result) -> Stamp:
    return name, info.st_size, info.st_mtime_ns


def _scan(folder: Path) -> dict[str, tuple[str, Stamp] | None]:
    """File name -> (path, stamp) of a folder without its sub-folders and hidden files; None for a dead link."""
    found: dict[str, tuple[str, Stamp] | None] = {}
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            try:
                if entry.is_dir():
                    continue
                found[entry.name] = (os.path.abspath(entry.path), _stamp(entry.name, entry.stat()))
            except OSError:
                found[entry.name] = None
    return found


def _frequent_ending(names: Iterable[str], supported: Sequence[str]) -> str:
    """The most frequent ending that the reader knows."""
    known = sorted({*supported, ".nii"}, key=len, reverse=True)
    counts = Counter(next((e for e in known if n.lower().endswith(e)), "") for n in names)
    counts.pop("", None)
    return counts.most_common(1)[0][0] if counts else known[0]


def _list_folder(folder: Path, ending: str | None, supported: Sequence[str]) -> Listing:
    """List ``<case>_<4 digits><ending>`` files of a folder; the ending is inferred where it is None.

    nnU-Net's own listing compares each case with each file and needs a process pool, which does not end for 100,000 cases;
    this one gives the same in a single pass.
    """
    files = _scan(folder)
    ending = ending or _frequent_ending(files, supported)
    pattern = re.compile(r"(.+)_(\d{4})" + re.escape(ending), re.DOTALL)
    cases: dict[str, dict[int, tuple[str, Stamp]]] = {}
    bad = []
    others = [n for n in sorted(files) if not n.endswith(ending) and n.lower().endswith(IMAGES) and is_text(n)]
    if others:
        log.warning(
            "Not used, since the name does not end with %s as the dataset's do: %s in %s: %s",
            *(ending, counted(len(others), "image"), folder, first_few(others, NAMED)),
        )
    for name in sorted(n for n in files if n.endswith(ending)):
        match, info, path = pattern.fullmatch(name), files[name], str(folder / name)
        if not is_text(name):  # it would crash the reader, and with it the process
            bad.append(BadCase(name, path, "the file's name is no UTF-8 text; rename it"))
        elif match is None:
            bad.append(BadCase(name, path, f"the name is not <case>_<channel, 4 digits>{ending}"))
        elif info is None:
            bad.append(BadCase(match[1], path, "the file cannot be reached (a dead link?)"))
            cases.setdefault(match[1], {})
        else:
            cases.setdefault(match[1], {})[int(match[2])] = info
    return cases, bad


def _declared(description: dict[str, Any], root: Path) -> Listing:
    """Images that dataset.json names one by one (nnU-Net's ``"dataset"`` entry); their labels are not looked at."""
    cases: dict[str, dict[int, tuple[str, Stamp]]] = {}
    bad = []
    for name, entry in description["dataset"].items():
        cases[name] = {}
        for i, image in enumerate(entry.get("images", [])):
            path = os.path.abspath(root / os.path.expandvars(image))
            try:
                cases[name][i] = (path, _stamp(os.path.basename(path), os.stat(path)))
            except OSError as error:
                bad.append(BadCase(name, path, f"the file cannot be reached: {error.strerror}"))
    return cases, bad


def list_raw(source: str, plan: Plan, images: str = "imagesTr") -> RawSource | None:
    """The raw images of a dataset that the target's reader will read, in a sub-folder; nothing is opened but dataset.json.

    None where ``nnUNet_raw`` is not set or has no such folder. Raises :class:`NnsslError` where no image files are there, or the
    reader does not read them.
    """
    try:
        reader = plan.manager.image_reader_writer_class
    except Exception as error:  # nnU-Net looks the name up
        raise NnsslError(
            f"Plans '{plan.plans_name}' of {plan.dataset_name} cannot preprocess any image: 'image_reader_writer' "
            f"{plan.plans.get('image_reader_writer')!r} is no reader of nnU-Net's."
        ) from error
    supported = [e.lower() for e in reader.supported_file_endings]
    who = f"the plans of {plan.dataset_name} read images with {reader.__name__}, which does not read"
    return _list(source, images, supported, who)


def find_raw(source: str, plan: Plan, images: str = "imagesTr") -> RawSource | None:
    """As :func:`list_raw`; None also where the images are of no use, which only the log of details says."""
    try:
        return list_raw(source, plan, images)
    except NnsslError as error:
        log.debug("No raw images of %s in %s: %s", source, images, error)
        return None


def list_unplanned(source: str) -> RawSource | None:
    """The raw images of a dataset that has no plans yet, in any format that nnU-Net reads; see :func:`list_raw`."""
    supported = sorted({e.lower() for reader in LIST_OF_IO_CLASSES for e in reader.supported_file_endings})
    found = _list(source, "imagesTr", supported, "nnU-Net does not read")
    if found is not None and describe(source).get("dataset"):
        gone = [f"{b.case} names {b.file}" for b in found.bad if "cannot be reached" in b.reason]
        what = f'Entries of "dataset" in {source}\'s dataset.json are not there'
        raise_problems(gone[:NAMED], what, more=max(0, len(gone) - NAMED))
    return found


def _list(source: str, images: str, supported: Sequence[str], who: str) -> RawSource | None:
    raw = set_folders().get("nnUNet_raw")
    if raw is None:
        return None
    description, folder = describe(source), raw / source / images
    if images == "imagesTr" and isinstance(description.get("dataset"), dict) and description["dataset"]:
        cases, bad = _declared(description, raw / source)
    elif folder.is_dir():
        cases, bad = _list_folder(folder, description.get("file_ending"), supported)
    else:
        return None
    if not cases:
        ending = description.get("file_ending") or supported[0]
        raise NnsslError(
            f"There are no images in {folder}. nnU-Net's form is <case>_0000{ending} (one file per channel)."
        )
    allowed = tuple([*supported, ".nii"] if ".nii.gz" in supported else supported)  # ITK reads both
    paths = (path.lower() for files in cases.values() for path, _ in files.values())
    endings = {os.path.splitext(path)[1] for path in paths if not path.endswith(allowed)}
    if endings:
        raise NnsslError(f"{source}: {who} {', '.join(sorted(endings))}. Convert them to {' or '.join(supported)}.")
    names = channel_names(description)
    declared = len(names) or max(max(files, default=0) + 1 for files in cases.values())
    one_file = declared > 1 and all(set(files) <= {0} for files in cases.values())  # for example RGB
    found = RawSource(n_channels=declared, channel_names=names, bad=bad)
    known_bad = {b.case for b in bad}
    wanted = {0} if one_file else set(range(declared))
    for name, files in cases.items():
        if name in known_bad:
            continue
        where, _ = next(iter(files.values()), (str(folder), None))
        lacks, extra = (
            ", ".join(f"_{c:04d}" for c in sorted(some)) for some in (wanted - set(files), set(files) - wanted)
        )
        if name.endswith("_seg"):
            found.bad.append(BadCase(name, where, "a name that ends with _seg is taken for a label file; rename it"))
        elif lacks:
            found.bad.append(BadCase(name, where, f"channel {lacks} is missing"))
        elif extra:
            found.bad.append(BadCase(name, where, f"channel {extra} is not one of the dataset's {declared}"))
        else:
            ordered = [files[c] for c in sorted(files)]
            found.cases[name] = RawCase(name, tuple(path for path, _ in ordered), tuple(stamp for _, stamp in ordered))
    return found
