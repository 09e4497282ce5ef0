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

NO_FILMS = frozenset({"US", "XA", "RF", "ES", "IVUS", "OCT", "OP", "GM", "SM", "MG", "DX", "CR", "NM"})
"""Modalities whose multi-frame files are films or stacks of other things than slices."""

NO_IMAGES = {"SEG": "a DICOM segmentation", "RTDOSE": "a dose distribution"}

SAME_PLACE = 0.01
"""Slices this near to each other, in mm, lie at one place: of several volumes, or twice the same."""

SAME_ORIENTATION = 0.01
"""Largest difference of direction cosines within a volume (0.6 degrees): slices of one scan are written with rounded numbers."""

SAME_SPACING = 0.01
"""Largest difference of pixel spacings within a volume, as a share."""

UNEVEN = 0.1
"""Largest difference of a slice distance from the median, as a share of it: more means that slices are missing."""

TILT_DEGREES = 1.0
"""Largest angle between the slices' normal and the line that their positions lie on; more is a tilted gantry."""


@dataclass(frozen=True, eq=False)
class _Slice:
    """One slice: a file, or a frame of one."""

    header: Header
    place: Header | Frame
    frame: int = 0

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


def _spaced(stack: Sequence[_Slice], places: np.ndarray) -> Rejected | float:
    """Distance of the slices of one volume, in order, or why they are none."""
    headers, steps = [s.header for s in stack], np.diff(places)
    middle = float(np.median(steps))
    if np.abs(steps - middle).max() > UNEVEN * middle:
        return _all(headers, "slices are missing or unevenly spaced", _gap(steps, middle))
    line = np.subtract(stack[-1].place.position, stack[0].place.position)
    across = float(np.sqrt(max(0.0, line @ line - (places[-1] - places[0]) ** 2)))
    angle = np.degrees(np.arctan2(across, places[-1] - places[0]))
    if angle > TILT_DEGREES:
        return _all(headers, "its gantry is tilted", f"{angle:.1f} degrees")
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


def _volumes(slices: Sequence[_Slice], four_d: str, least: int) -> tuple[list[list[_Slice]], float] | Rejected:
    """The volumes of slices with one series, size and orientation, and the distance of their slices."""
    headers = [s.header for s in slices]
    if any(len(s.place.position) != 3 or len(s.place.orientation) != 6 for s in slices):
        return _all(headers, "its slices have no positions" if len(slices) > 1 else "a single slice")
    levels, at = _levels(slices)
    if len(levels) < least:
        few = "a single slice" if len(levels) == 1 else f"fewer than {least} slices"
        return _all(headers, few, f"{len(levels)} positions")
    counts = sorted({len(level) for level in levels})
    if len(counts) > 1:
        return _all(headers, "some positions have more slices than others", f"{counts[0]} to {counts[-1]} slices")
    if counts[0] > 1 and four_d == "reject":
        return _all(headers, "4D (see --four-d)", f"{counts[0]} volumes")
    volumes = [[level[i] for level in levels] for i in range(counts[0] if four_d == "split" else 1)]
    steps = [_spaced(v, np.array([at[s] for s in v])) for v in volumes]
    bad = next((s for s in steps if isinstance(s, Rejected)), None)
    return bad or (volumes, float(np.mean([s for s in steps if isinstance(s, float)])))


def _stack(headers: Sequence[Header], four_d: str, least: int) -> tuple[list[Item], list[Rejected]]:
    """Volumes of single-slice files."""
    found = _volumes([_Slice(h, h) for h in headers], four_d, least)
    if isinstance(found, Rejected):
        return [], [found]
    volumes, step = found
    items = [_item([volume], step) for volume in volumes]
    unused = sorted({h.file for h in headers} - {f for i in items for f in i.files})
    over = [Rejected(unused[0], "a later volume of 4D (see --four-d)", "", len(unused))] if unused else []
    return items, over


def _multi_frame(header: Header, four_d: str, least: int) -> Item | Rejected:
    """The image of a multi-frame file."""
    if header.modality in NO_FILMS:
        return Rejected(header.file, "a film, or frames that are no slices", header.modality)
    if len(header.frames) != header.n_frames or not all(f.position and f.orientation for f in header.frames):
        return Rejected(header.file, "its frames have no positions", f"{header.n_frames} frames")
    if any(_differs(header.frames[0].orientation, f.orientation) for f in header.frames):
        return Rejected(header.file, "its frames have several orientations")
    slices = [_Slice(header, frame, i) for i, frame in enumerate(header.frames)]
    found = _volumes(slices, four_d, least)
    if not isinstance(found, Rejected):
        return _item(*found)
    return found


def _differs(one: Sequence[float], other: Sequence[float]) -> bool:
    return len(one) != len(other) or any(abs(a - b) > SAME_ORIENTATION for a, b in zip(one, other))


def _alike(one: Header, other: Header) -> bool:
    """Whether two slices can be of one volume."""
    spacings = len(one.spacing) == len(other.spacing) and np.allclose(one.spacing, other.spacing, rtol=SAME_SPACING)
    return one.size == other.size and bool(spacings) and not _differs(one.orientation, other.orientation)


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


def _place_key(header: Header) -> tuple:
    return (header.instance, *(round(p, 2) for p in header.position))


def _without_copies(headers: Sequence[Header]) -> tuple[list[Header], list[Rejected]]:
    """Files of one folder without those that are there twice: the same identifier, place and voxels."""
    by_key: dict[tuple, list[Header]] = {}
    for header in headers:
        by_key.setdefault(_place_key(header), []).append(header)
    kept, copies = [], []
    for several in by_key.values():
        seen: set[bytes] = set()
        for header in several:
            content = header.voxel_hash() if len(several) > 1 else b""
            if content and content in seen:
                copies.append(Rejected(header.file, "duplicate", "the same slice twice"))
            else:
                kept.append(header)
            seen.add(content)
    return kept, copies


def _is_copy(folder: Sequence[Header], others: Iterable[Header]) -> bool:
    """Whether each file of a folder is in the others too."""
    known: dict[tuple, list[Header]] = {}
    for header in others:
        known.setdefault(_place_key(header), []).append(header)
    return all(any(h.voxel_hash() == o.voxel_hash() for o in known.get(_place_key(h), ())) for h in folder)


def _of_folders(headers: Sequence[Header], four_d: str, least: int) -> tuple[list[Item], list[Rejected]]:
    """One series: a volume spread over folders is one, folders with a volume each (two patients under one identifier) are two."""
    folders: dict[str, list[Header]] = {}
    for header in headers:
        folders.setdefault(header.folder, []).append(header)
    rejected: list[Rejected] = []
    for name in folders:
        folders[name], copies = _without_copies(folders[name])
        rejected += copies
    for name in sorted(folders, key=lambda n: (len(folders[n]), n)) if len(folders) > 1 else ():
        others = [h for other, several in folders.items() if other != name for h in several]
        if others and _is_copy(folders[name], others):
            rejected.append(_all(folders.pop(name), "duplicate", "the same slices in another folder"))
    together = [h for several in folders.values() for h in several]
    items, bad = _stack(together, four_d, least)
    several_times = len({h.order[1] for h in together}) > 1
    if len(folders) > 1 and (not items or len(items) > 1) and not several_times:
        apart = [_stack(several, four_d, least) for several in folders.values()]
        if all(good for good, _ in apart):
            items, bad = [i for good, _ in apart for i in good], [b for _, more in apart for b in more]
    return items, [*rejected, *bad]


def volumes_of(headers: Iterable[Header], *, four_d: str, least: int) -> tuple[list[Item], list[Rejected]]:
    """Sort files into volumes.

    Args:
        headers: of all files, in any order and of any number of patients, studies and series.
        four_d: see :data:`nnssl.pretrain.images.items.FOUR_D`.
        least: slices that make a volume.
    """
    items: list[Item] = []
    rejected: list[Rejected] = []
    series: dict[tuple, list[Header]] = {}
    for h in headers:
        if h.modality in NO_IMAGES:
            rejected.append(Rejected(h.file, NO_IMAGES[h.modality], h.modality))
        elif "LOCALIZER" in h.kind:
            rejected.append(Rejected(h.file, "a scout"))
        elif h.samples > 1:
            rejected.append(Rejected(h.file, "colour (RGB)"))
        elif h.n_frames > 1:
            found = _multi_frame(h, four_d, least)
            (items if isinstance(found, Item) else rejected).append(found)  # type: ignore[arg-type]
        else:
            where = h.series or h.folder  # some anonymisers wipe identifiers out
            series.setdefault((h.patient, h.study, where, "MOSAIC" in h.kind), []).append(h)
    for (*_, mosaic), several in series.items():
        if mosaic:
            good, bad = _mosaics(several, four_d)
        else:
            parts = [_of_folders(cluster, four_d, least) for cluster in _clusters(several)]
            good, bad = [i for g, _ in parts for i in g], [r for _, b in parts for r in b]
        items += good
        rejected += bad
    return items, rejected


def _mosaics(headers: Sequence[Header], four_d: str) -> tuple[list[Item], list[Rejected]]:
    ordered = sorted(headers, key=lambda h: (h.order, h.file))
    if len(ordered) > 1 and four_d == "reject":
        return [], [_all(ordered, "4D (see --four-d)", f"{len(ordered)} volumes")]
    used, rest = (ordered, []) if four_d == "split" else (ordered[:1], ordered[1:])
    return [_mosaic(h) for h in used], [_all(rest, "a later volume of 4D (see --four-d)")] if rest else []
