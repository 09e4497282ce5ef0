"""Sorts DICOM files into volumes: by series, size and orientation, and along the patient by position.

Nothing of a header is kept but what this takes; names, dates and numbers of patients are never read out.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import SimpleITK as sitk

from nnssl.pretrain.images.items import Item, Rejected

__all__ = ["Header", "read_headers", "volumes_of"]

NO_FILMS = frozenset({"US", "XA", "RF", "ES", "IVUS", "OCT", "OP", "GM", "SM", "MG", "DX", "CR", "NM"})
"""Modalities whose multi-frame files are films or stacks of other things than slices."""

SAME_PLACE = 0.01
"""Slices this near to each other, in mm, lie at one place: of several volumes."""

UNEVEN = 0.1
"""Largest difference of a slice distance from the median, as a share of it: more means that slices are missing."""

TILT_DEGREES = 1.0
"""Largest angle between the slices' normal and the line that their positions lie on; more is a tilted gantry."""

TAGS = {
    "series": "0020|000e",
    "study": "0020|000d",
    "instance": "0008|0018",
    "description": "0008|103e",
    "modality": "0008|0060",
    "kind": "0008|0008",
    "position": "0020|0032",
    "orientation": "0020|0037",
    "frames": "0028|0008",
    "samples": "0028|0002",
    "acquisition": "0020|0012",
    "time_point": "0020|0100",
    "number": "0020|0013",
}


@dataclass(frozen=True)
class Header:
    """What sorting takes of a file.

    Attributes:
        size: columns and rows.
        orientation: six numbers, or none.
        position: three numbers in mm, or none.
        order: acquisition, time point and number of the instance: tells slices at one place apart.
    """

    file: str
    root: str
    series: str
    study: str
    instance: str
    description: str
    modality: str
    kind: str
    frames: int
    samples: int
    size: tuple[int, int]
    orientation: tuple[float, ...]
    position: tuple[float, ...]
    order: tuple[float, ...]


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split("\\")) if text else ()
    except ValueError:
        return ()


def _read(root: str, file: str) -> Header | Rejected:
    reader = sitk.ImageFileReader()
    reader.SetImageIO("GDCMImageIO")
    reader.SetFileName(file)
    try:
        reader.ReadImageInformation()
    except RuntimeError:
        return Rejected(file, "DICOM without a readable image (a report, a plan, or damaged)")
    text = {k: reader.GetMetaData(tag).strip() if reader.HasMetaDataKey(tag) else "" for k, tag in TAGS.items()}
    first = {k: int((_numbers(text[k]) or (1,))[0]) for k in ("frames", "samples")}
    order = [(_numbers(text[k]) or (0.0,))[0] for k in ("acquisition", "time_point", "number")]
    place = {"orientation": _numbers(text.pop("orientation")), "position": _numbers(text.pop("position"))}
    if text["modality"] == "OT":  # other: says nothing
        text["modality"] = ""
    kept = {k: text[k] for k in ("series", "study", "instance", "description", "modality", "kind")}
    width, height = reader.GetSize()[:2]
    return Header(file, root, **kept, **first, size=(width, height), **place, order=tuple(order))  # type: ignore[arg-type]


def read_headers(files: Sequence[tuple[str, str]]) -> list[Header | Rejected]:
    """Headers of (root, path) pairs; pickles as a job of :func:`nnssl.pretrain.prepare.processes.run_jobs`."""
    loud = sitk.ProcessObject.GetGlobalWarningDisplay()
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    try:
        return [_read(root, file) for root, file in files]
    finally:
        sitk.ProcessObject.SetGlobalWarningDisplay(loud)


def _all(headers: Sequence[Header], reason: str, detail: str = "") -> Rejected:
    more = f"{len(headers)} files of the series" if len(headers) > 1 else ""
    return Rejected(headers[0].file, reason, "; ".join(t for t in (detail, more) if t))


def _item(headers: Sequence[Header], step: float = 0.0) -> Item:
    one = headers[0]
    text = os.path.relpath(one.file if len(headers) == 1 else os.path.dirname(one.file), one.root)
    return Item(
        tuple(h.file for h in headers), one.root, os.path.join(text, one.description), one.study, one.modality, step
    )


def _spaced(stack: Sequence[Header], places: np.ndarray) -> Rejected | float:
    """Distance of the slices of one volume, in order, or why they are none."""
    steps = np.diff(places)
    middle = float(np.median(steps))
    if np.abs(steps - middle).max() > UNEVEN * middle:
        return _all(stack, "slices are missing or unevenly spaced", f"{steps.min():.3g} to {steps.max():.3g} mm")
    line = np.subtract(stack[-1].position, stack[0].position)
    across = float(np.sqrt(max(0.0, line @ line - (places[-1] - places[0]) ** 2)))
    angle = np.degrees(np.arctan2(across, places[-1] - places[0]))
    if angle > TILT_DEGREES:
        return _all(stack, "its gantry is tilted", f"{angle:.1f} degrees")
    return float(places[-1] - places[0]) / (len(stack) - 1)


def _stack(headers: list[Header], four_d: str, least: int) -> tuple[list[Item], list[Rejected]]:
    """Volumes of single slices with one series, size and orientation."""
    if len(headers) == 1:
        return [], [_all(headers, "a single slice")]
    if any(len(h.position) != 3 or len(h.orientation) != 6 for h in headers):
        return [], [_all(headers, "its slices have no positions")]
    right, down = np.reshape(headers[0].orientation, (2, 3))
    normal = np.cross(right, down)
    at = {h.file: float(np.dot(normal, h.position)) for h in headers}
    ordered = sorted(headers, key=lambda h: at[h.file])
    levels: list[list[Header]] = []
    for header in ordered:
        if not levels or at[header.file] - at[levels[-1][0].file] > SAME_PLACE:
            levels.append([])
        levels[-1].append(header)
    levels = [sorted(level, key=lambda h: (h.order, h.file)) for level in levels]
    if len(levels) < least:
        few = "a single slice" if len(levels) == 1 else f"fewer than {least} slices"
        return [], [_all(ordered, few, f"{len(levels)} positions")]
    volumes = {len(level) for level in levels}
    if len(volumes) > 1:
        return [], [_all(ordered, "some positions have more slices than others")]
    count = volumes.pop()
    if count > 1 and four_d == "reject":
        return [], [_all(ordered, "4D (see --four-d)", f"{count} volumes")]
    items: list[Item] = []
    rejected: list[Rejected] = []
    for i in range(count if four_d == "split" else 1):
        stack = [level[i] for level in levels]
        step = _spaced(stack, np.array([at[h.file] for h in stack]))
        if isinstance(step, Rejected):
            rejected.append(step)
        else:
            items.append(_item(stack, step))
    return items, rejected


def volumes_of(headers: Iterable[Header], *, four_d: str, least: int) -> tuple[list[Item], list[Rejected]]:
    """Sort files into volumes.

    Args:
        headers: of all files, in any order and of any number of studies and series.
        four_d: see :data:`nnssl.pretrain.images.items.FOUR_D`.
        least: slices that make a volume.
    """
    items: list[Item] = []
    rejected: list[Rejected] = []
    seen: set[str] = set()
    series: dict[tuple, list[Header]] = {}
    for h in headers:
        if h.instance and h.instance in seen:
            rejected.append(Rejected(h.file, "duplicate", "the same DICOM instance"))
            continue
        seen.add(h.instance)
        if "LOCALIZER" in h.kind.upper():
            rejected.append(Rejected(h.file, "a scout"))
        elif h.samples > 1:
            rejected.append(Rejected(h.file, "colour (RGB)"))
        elif h.frames > 1 and h.modality in NO_FILMS:
            rejected.append(Rejected(h.file, "a film, or frames that are no slices", h.modality))
        elif h.frames > 1:
            items.append(_item([h]))
        else:
            where = h.series or os.path.dirname(h.file)  # some anonymisers wipe identifiers out
            key = (h.root, h.study, where, h.size, tuple(round(o, 3) for o in h.orientation))
            series.setdefault(key, []).append(h)
    for several in series.values():
        good, bad = _stack(several, four_d, least)
        items += good
        rejected += bad
    return items, rejected
