"""Sorts DICOM files into volumes, and accounts for every file that is in none; :mod:`nnssl.pretrain.images.dcm2niix` converts.

dcm2niix alone takes a gap of six slices without a word, makes several stacks of one whose orientation varies in the fourth digit,
and drops a second patient under the same identifiers for duplicates. So a volume's files are chosen here, by place and content
and not by identifiers alone, and given to it one volume at a time.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from nnssl.pretrain.images.headers import Frame, Header
from nnssl.pretrain.images.items import Item, Rejected
from nnssl.pretrain.images.options import AddOptions

Sorted = list[Item | Rejected]

NO_FILMS = frozenset({"US", "XA", "RF", "ES", "IVUS", "OCT", "OP", "GM", "SM", "MG", "DX", "CR", "NM"})
"""Modalities whose multi-frame files are films or stacks of other things than slices."""

FOUR_D, LATER = "4D (see --four-d)", "a later volume of 4D (see --four-d)"

NO_IMAGES = {"SEG": "a DICOM segmentation", "RTDOSE": "a dose distribution"}

SAME_PLACE = 0.01  # slices this near to each other, in mm, lie at one place: of several volumes, or twice the same

SAME_ORIENTATION = 0.01
"""Largest difference of direction cosines within a volume (0.6 degrees): slices of one scan are written with rounded numbers."""

SAME_SPACING = 0.01  # largest difference of pixel spacings within a volume, as a share

UNEVEN = 0.1
"""Largest difference of a slice distance from the median, as a share of it: more means that slices are missing."""

TILT_DEGREES = 1.0
"""Largest angle between the slices' normal and the line that their positions lie on; more is a tilted gantry."""


class _No(Exception):
    """These slices are no volume: reason, detail."""


@dataclass(frozen=True, eq=False)
class _Slice:
    """One slice: a file, or a frame of one."""

    header: Header
    frame: int = 0

    @property
    def place(self) -> Frame:
        return self.header.frames[self.frame]

    @property
    def order(self) -> tuple:
        return (*self.place.order, self.header.file, self.frame)


def _all(headers: Sequence[Header], reason: str, detail: str = "") -> Rejected:
    files = sorted({h.file for h in headers})
    more = f"{len(files)} files of the series" if len(files) > 1 else ""
    return Rejected(files[0], reason, "; ".join(t for t in (detail, more) if t), len(files))


def _item(slices: Sequence[Sequence[_Slice]], step: float) -> Item:
    """An image of one or more volumes, each a list of slices from bottom to top."""
    headers = list(dict.fromkeys(s.header for volume in slices for s in volume))
    one = headers[0]
    text = os.path.relpath(one.file if len(headers) == 1 else one.folder, one.root)
    part = one.n_frames > 1 and one.n_frames != len(slices[0])
    volumes = tuple(tuple(s.frame for s in volume) for volume in slices) if part else ()
    return Item(
        tuple(h.file for h in headers),
        one.root,
        os.path.join(text, one.description),
        one.study,
        one.modality,
        dicom=True,
        size=(*one.size, len(slices[0])),
        step=step,
        volumes=volumes,
    )


def _mosaic(header: Header) -> Item:
    """A file whose one picture holds all slices side by side; dcm2niix knows how many."""
    text = os.path.join(os.path.relpath(header.file, header.root), header.description)
    return Item((header.file,), header.root, text, header.study, header.modality, dicom=True)


def _gap(steps: np.ndarray, middle: float) -> str:
    """What is missing, in numbers."""
    missing = int(sum(max(0, round(float(s) / middle) - 1) for s in steps)) if middle > 0 else 0
    at = int(np.argmax(np.abs(steps - middle)))
    gap = f"{steps[at]:.4g} mm from slice {at + 1} to the next, {middle:.4g} mm elsewhere"
    return f"{missing} of {len(steps) + 1 + missing} slices are missing: {gap}" if missing else gap


def _spaced(stack: Sequence[_Slice], places: np.ndarray) -> float:
    """Distance of the slices of one volume, in order."""
    steps = np.diff(places)
    middle = float(np.median(steps))
    if np.abs(steps - middle).max() > UNEVEN * middle:
        raise _No("slices are missing or unevenly spaced", _gap(steps, middle))
    line = np.subtract(stack[-1].place.position, stack[0].place.position)
    across = float(np.sqrt(max(0.0, line @ line - (places[-1] - places[0]) ** 2)))
    angle = np.degrees(np.arctan2(across, places[-1] - places[0]))
    if angle > TILT_DEGREES:
        raise _No("its gantry is tilted", f"{angle:.1f} degrees")
    return float(places[-1] - places[0]) / (len(stack) - 1)


def _levels(slices: Sequence[_Slice]) -> tuple[list[list[_Slice]], dict[_Slice, float]]:
    """Slices by place along their normal, from bottom to top; those at one place in the order in which they were taken."""
    right, down = np.reshape(slices[0].place.orientation, (2, 3))
    normal = np.cross(right, down)
    at = {s: float(np.dot(normal, s.place.position)) for s in slices}
    levels: list[list[_Slice]] = []
    for one in sorted(slices, key=lambda s: at[s]):
        if not levels or at[one] - at[levels[-1][0]] > SAME_PLACE:
            levels.append([])
        levels[-1].append(one)
    return [sorted(level, key=lambda s: s.order) for level in levels], at


def _volumes(slices: Sequence[_Slice], asked: AddOptions) -> tuple[list[list[_Slice]], float]:
    """The volumes of slices with one series, size and orientation, and the distance of their slices."""
    if any(len(s.place.position) != 3 or len(s.place.orientation) != 6 for s in slices):
        raise _No("its slices have no positions" if len(slices) > 1 else "a single slice")
    levels, at = _levels(slices)
    if len(levels) < asked.least_slices:
        few = "a single slice" if len(levels) == 1 else f"fewer than {asked.least_slices} slices"
        raise _No(few, f"{len(levels)} positions")
    counts = sorted({len(level) for level in levels})
    if len(counts) > 1:
        raise _No("some positions have more slices than others", f"{counts[0]} to {counts[-1]} slices")
    if counts[0] > 1 and asked.four_d == "reject":
        raise _No(FOUR_D, f"{counts[0]} volumes")
    volumes = [[level[i] for level in levels] for i in range(counts[0] if asked.four_d == "split" else 1)]
    return volumes, float(np.mean([_spaced(v, np.array([at[s] for s in v])) for v in volumes]))


def _stack(headers: Sequence[Header], asked: AddOptions) -> Sorted:
    """Volumes of single-slice files."""
    try:
        volumes, step = _volumes([_Slice(h) for h in headers], asked)
    except _No as no:
        return [_all(headers, *no.args)]
    used = {s.header.file for volume in volumes for s in volume}
    unused = sorted({h.file for h in headers} - used)
    over = [Rejected(unused[0], LATER, "", len(unused))] if unused else []
    return [*[_item([volume], step) for volume in volumes], *over]


def _multi_frame(header: Header, asked: AddOptions) -> Item | Rejected:
    """The image of a multi-frame file."""
    if header.modality in NO_FILMS:
        return Rejected(header.file, "a film, or frames that are no slices", header.modality)
    if len(header.frames) != header.n_frames or not all(f.position and f.orientation for f in header.frames):
        return Rejected(header.file, "its frames have no positions", f"{header.n_frames} frames")
    if any(_turned(header.frames[0], f) for f in header.frames):
        return Rejected(header.file, "its frames have several orientations")
    try:
        return _item(*_volumes([_Slice(header, i) for i in range(header.n_frames)], asked))
    except _No as no:
        return _all([header], *no.args)


def _turned(frame: Frame, other: Frame) -> bool:
    one, two = frame.orientation, other.orientation
    return len(one) != len(two) or any(abs(a - b) > SAME_ORIENTATION for a, b in zip(one, two))


def _alike(one: Header, other: Header) -> bool:
    """Whether two slices can be of one volume."""
    spacings = len(one.spacing) == len(other.spacing) and np.allclose(one.spacing, other.spacing, rtol=SAME_SPACING)
    return one.size == other.size and bool(spacings) and not _turned(one.frames[0], other.frames[0])


def _clusters(headers: Iterable[Header]) -> list[list[Header]]:
    """Files of one series by size, pixel spacing and orientation."""
    clusters: list[list[Header]] = []
    for header in headers:
        home = next((c for c in clusters if _alike(c[0], header)), None)
        if home is None:
            clusters.append([header])
        else:
            home.append(header)
    return clusters


def _by_place(headers: Iterable[Header]) -> dict[tuple, list[Header]]:
    """Files with one identifier and place (0.01 mm): copies of each other, where their voxels are equal too."""
    found: dict[tuple, list[Header]] = {}
    for header in headers:
        found.setdefault((header.instance, *(round(p, 2) for p in header.frames[0].position)), []).append(header)
    return found


def _without_copies(headers: Sequence[Header]) -> tuple[list[Header], Sorted]:
    """Files of one folder without those that are there twice."""
    kept: list[Header] = []
    copies: Sorted = []
    for several in _by_place(headers).values():
        seen: set[str] = set()
        for header in several:
            content = header.voxel_hash() if len(several) > 1 else ""
            if content and content in seen:
                copies.append(Rejected(header.file, "duplicate", "the same slice twice"))
            else:
                kept.append(header)
            seen.add(content)
    return kept, copies


def _is_copy(folder: Sequence[Header], others: Iterable[Header]) -> bool:
    """Whether each file of a folder is in the others too."""
    known = _by_place(others)
    return all(
        any(h.voxel_hash() == o.voxel_hash() for o in known.get(place, ()))
        for place, several in _by_place(folder).items()
        for h in several
    )


def _of_folders(headers: Sequence[Header], asked: AddOptions) -> Sorted:
    """One series: a volume spread over folders is one, folders with a volume each (two patients under one identifier) are two."""
    folders: dict[str, list[Header]] = {}
    for header in headers:
        folders.setdefault(header.folder, []).append(header)
    copies: Sorted = []
    for name in folders:
        folders[name], twice = _without_copies(folders[name])
        copies += twice
    for name in sorted(folders, key=lambda n: (len(folders[n]), n)):
        others = [h for other, several in folders.items() if other != name for h in several]
        if others and _is_copy(folders[name], others):
            copies.append(_all(folders.pop(name), "duplicate", "the same slices in another folder"))
    together = [h for several in folders.values() for h in several]
    found, several_times = _stack(together, asked), len({h.frames[0].order[1] for h in together}) > 1
    if len(folders) > 1 and sum(isinstance(f, Item) for f in found) != 1 and not several_times:
        apart = [_stack(several, asked) for several in folders.values()]
        if all(any(isinstance(f, Item) for f in one) for one in apart):
            found = [f for one in apart for f in one]
    return [*copies, *found]


def _mosaics(headers: Sequence[Header], asked: AddOptions) -> Sorted:
    ordered = sorted(headers, key=lambda h: _Slice(h).order)
    if len(ordered) > 1 and asked.four_d == "reject":
        return [_all(ordered, FOUR_D, f"{len(ordered)} volumes")]
    used = len(ordered) if asked.four_d == "split" else 1
    return [*map(_mosaic, ordered[:used]), *([_all(ordered[used:], LATER)] if ordered[used:] else [])]


def volumes_of(headers: Iterable[Header], asked: AddOptions) -> Sorted:
    """Sort files, in any order and of any number of patients, studies and series, into volumes."""
    found: Sorted = []
    series: dict[tuple, list[Header]] = {}
    for h in headers:
        if h.modality in NO_IMAGES:
            found.append(Rejected(h.file, NO_IMAGES[h.modality], h.modality))
        elif "LOCALIZER" in h.kind:
            found.append(Rejected(h.file, "a scout"))
        elif h.samples > 1:
            found.append(Rejected(h.file, "colour (RGB)"))
        elif h.n_frames > 1:
            found.append(_multi_frame(h, asked))
        else:
            where = h.series or h.folder  # some anonymisers wipe identifiers out
            series.setdefault((h.patient, h.study, where, "MOSAIC" in h.kind), []).append(h)
    for (*_, mosaic), several in series.items():
        if mosaic:
            found += _mosaics(several, asked)
        else:
            found += [f for cluster in _clusters(several) for f in _of_folders(cluster, asked)]
    return found
