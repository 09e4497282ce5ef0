"""Whether a dataset.json is what nnU-Net v2 reads, before hours are spent on it: its form, and the kinds of its entries."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nnssl.errors import raise_problems
from nnssl.fields import Wanted, field_problems, listing, mapping, optional, text, whole

ALL_ENDINGS = (".nii.gz", ".nii", ".nrrd", ".nhdr", ".mha", ".mhd", ".gipl", ".png", ".bmp", ".tif", ".tiff")

_CHANNELS = Wanted(
    'names by index, for example {"0": "CT"}',
    lambda v: mapping(text, text).fits(v) and sorted(v) == sorted(map(str, range(len(v)))),
)
_LABEL = Wanted("", lambda v: whole(0).fits(v) or listing(whole(0)).fits(v))
_LABELS = {
    "labels": optional(Wanted("a whole number, or several, by name", lambda v: mapping(text, _LABEL).fits(v))),
    "regions_class_order": optional(listing(whole(0))),
}
_IMAGES = {"channel_names": optional(_CHANNELS), "modality": optional(_CHANNELS), "file_ending": optional(text)}


def check_description(content: Mapping[str, Any], where: str | Path, *, labels: bool = False) -> None:
    """Whether a dataset.json has nnU-Net's present form, as far as it is used.

    Args:
        content: of the file.
        where: the file, or words for it.
        labels: whether its labels are used, and not only its images.

    Raises:
        NnsslError: it names the file and each entry that is wrong, and shows the right one.
    """
    if _is_v1(content):
        entry = next(k for k in ("training", "tensorImageSize", "modality", "labels") if k in content)
        right = _as_v2(content, where.parent if isinstance(where, Path) else None)
        problems = [f"'{entry}' is an entry of nnU-Net v1's form. Make it v2's, with this content: {right}"]
    else:
        problems = [*_channels(content), *_ending(content), *_images(content)]
        kinds = {k: w for k, w in _IMAGES.items() if not any(p.startswith(f'"{k}"') for p in problems)}
        problems += field_problems(content, {**kinds, **(_LABELS if labels else {})})
    raise_problems(problems, str(where))


def _is_v1(content: Mapping[str, Any]) -> bool:
    """Entries of v1 beside all that v2 needs do no harm: nnU-Net's own conversion of the decathlon leaves some."""
    if "channel_names" in content and "file_ending" in content:
        return False
    if isinstance(content.get("training"), list) or "tensorImageSize" in content:
        return True
    labels = content.get("labels")
    swapped = isinstance(labels, dict) and all(str(k).isdecimal() and isinstance(v, str) for k, v in labels.items())
    return bool(labels) and swapped and "channel_names" not in content


def _as_v2(content: Mapping[str, Any], folder: Path | None) -> str:
    """What a v1 file says in v2's form, in one line."""
    names = content.get("channel_names") or content.get("modality") or {"0": "MR"}
    labels = content.get("labels")
    if isinstance(labels, dict) and all(str(k).isdecimal() for k in labels):
        labels = {str(v): int(k) for k, v in labels.items()}
    images = None if folder is None else folder / "imagesTr"
    files = sorted(f.name for f in images.iterdir()) if images and images.is_dir() else []
    found = next((e for f in files for e in ALL_ENDINGS if f.lower().endswith(e)), ".nii.gz")
    cases = {f.rsplit("_", 1)[0] for f in files if f.endswith(found)}
    shortest = {
        "channel_names": {str(k): v for k, v in names.items()} if isinstance(names, dict) else {"0": "MR"},
        "labels": labels if isinstance(labels, dict) else {"background": 0},
        "numTraining": len(cases) or content.get("numTraining", 0),
        "file_ending": content.get("file_ending", found),
    }
    return json.dumps(shortest, ensure_ascii=False)


def _channels(content: Mapping[str, Any]) -> list[str]:
    key = "channel_names" if "channel_names" in content else "modality"
    names = content.get(key)
    if names is None:
        return []
    right, why = {"0": "MR"}, "does not name each channel's number"
    if isinstance(names, dict) and all(str(k).isdecimal() for k in names):
        if sorted(map(int, names)) == list(range(len(names))):
            return []
        right = {str(i): str(names[k]) for i, k in enumerate(sorted(names, key=int))}
        why = "does not count the channels from 0"
    elif isinstance(names, dict) and all(isinstance(v, int) or str(v).isdecimal() for v in names.values()):
        right = {str(v): str(k) for k, v in sorted(names.items(), key=lambda item: int(item[1]))}
        why = "has number and name the wrong way round"
    elif isinstance(names, (list, str)):
        right = {str(i): str(n) for i, n in enumerate([names] if isinstance(names, str) else names)}
    is_now, shall_be = (json.dumps(form, ensure_ascii=False) for form in (names, right))
    return [f'"{key}": {is_now} {why}. Write "{key}": {shall_be}']


def _ending(content: Mapping[str, Any]) -> list[str]:
    ending = content.get("file_ending")
    if ending is None or (isinstance(ending, str) and ending.startswith(".") and len(ending) > 1):
        return []
    right = f".{ending.strip().lstrip('.')}" if isinstance(ending, str) and ending.strip(" .") else ".nii.gz"
    return [f'"file_ending": {json.dumps(ending)} is no ending with its dot. Write "file_ending": "{right}"']


def _images(content: Mapping[str, Any]) -> list[str]:
    entries = content.get("dataset")
    if not entries:
        return []
    if not isinstance(entries, dict):
        return [
            '"dataset" is no object. Write "dataset": {"case": {"images": ["imagesTr/case_0000.nii.gz"]}}, or leave it out'
        ]
    problems = []
    for name, entry in entries.items():
        images = entry.get("images") if isinstance(entry, dict) else None
        if not isinstance(images, list) or not images or not all(isinstance(i, str) for i in images):
            problems.append(
                f'"dataset": "{name}" has no list of images. Write "images": ["imagesTr/{name}_0000.nii.gz"]'
            )
        elif os.sep == "/" and any("\\" in i for i in images):
            wrong = next(i for i in images if "\\" in i)
            problems.append(f'"dataset": "{name}" names {wrong} with backslashes. Write {wrong.replace(chr(92), "/")}')
        if len(problems) > 2:
            return [*problems, "and more of the kind may follow"]
    return problems
