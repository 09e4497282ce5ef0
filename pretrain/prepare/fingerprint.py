"""nnU-Net's dataset fingerprint from images alone: what its planner needs to know, with the body in place of the labels.

nnU-Net's own extractor takes intensities where labels are; everything else in a fingerprint (spacings, shapes after cropping to
non-zero, how much cropping took away) comes from the images anyway. Here intensities are those inside the body
(:mod:`nnssl.pretrain.prepare.body`), weighted as nnU-Net does: each image counts the same.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.imageio.reader_writer_registry import recursive_find_reader_writer_by_name

from nnssl.errors import NnsslError
from nnssl.files import hash_of
from nnssl.journal import append_line, read_lines
from nnssl.pretrain.data.orientation import direction_matrix, patient_axes
from nnssl.pretrain.prepare.body import AIR_HU, body_of_raw
from nnssl.pretrain.prepare.integrity import check_files, check_voxels, quiet
from nnssl.pretrain.prepare.processes import run_tasks
from nnssl.pretrain.prepare.raw import RawCase, Stamp
from nnssl.pretrain.prepare.worker import reason
from nnssl.words import counted

MOST_IMAGES = 2000
"""Images that are looked at; medians of more do not differ. They are chosen by the hash of their names."""

QUANTILES = 1001  # quantiles of each image's intensities that are kept: percentile 0, 0.1, ..., 100

CT_SHARE = 0.9
"""Share of the images that must reach down to air in Hounsfield units for a nameless channel to be taken for CT."""


@dataclass(frozen=True)
class CaseFigures:
    """What one image, ``"<source>/<case>"``, adds to the fingerprint, or why it cannot."""

    name: str
    files: tuple[Stamp, ...]
    shape: tuple[int, ...] = ()  # voxels after cropping to non-zero, (z, y, x) of the file
    spacing: tuple[float, ...] = ()  # in mm, same axes
    kept: float = 1.0  # share of the voxels that cropping keeps
    low: tuple[float, ...] = ()  # smallest intensity of each channel, air included
    mean: tuple[float, ...] = ()  # of each channel inside the body, as the next two
    std: tuple[float, ...] = ()
    quantiles: tuple[tuple[float, ...], ...] = ()  # QUANTILES of them
    bad: str = ""  # why the image cannot be used

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> CaseFigures:
        """Raises ``ValueError``, ``TypeError`` or ``KeyError`` for a damaged line."""
        known: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in content.items()}
        known["files"] = tuple((str(n), int(s), int(m)) for n, s, m in content["files"])
        known["quantiles"] = tuple(map(tuple, content["quantiles"]))
        return cls(**known)


@dataclass(frozen=True)
class FigureWorker:
    """Measures one image with a reader of nnU-Net's. Pickles. ``is_ct``: of each channel; None where their names do not tell."""

    reader: str
    is_ct: tuple[bool, ...] | None = None

    def __call__(self, task: tuple[str, RawCase]) -> CaseFigures:
        """Measure an image; never raises but for Ctrl-C and lack of memory."""
        name, case = task
        with quiet() as printed:
            try:
                check_files(case.files)
                reader = recursive_find_reader_writer_by_name(self.reader)()
                data, properties = reader.read_images(list(case.files))
                return self._figures(name, case, data, properties)
            except MemoryError:
                raise
            except ValueError as error:  # of the checks
                return CaseFigures(name, case.stamps, bad=str(error)[:300])
            except Exception as error:  # readers raise anything on broken files
                return CaseFigures(name, case.stamps, bad=reason(error, printed.getvalue()))

    def _figures(self, name: str, case: RawCase, data: np.ndarray, properties: Mapping[str, Any]) -> CaseFigures:
        check_voxels(data)
        low = tuple(float(channel.min()) for channel in data)
        is_ct = self.is_ct or tuple(value <= AIR_HU for value in low)
        matrix = direction_matrix(properties)
        axes, _ = patient_axes(np.eye(3) if matrix is None else matrix, (0, 1, 2))
        body = body_of_raw(data, is_ct, axes[2])
        nonzero = (data != 0).any(0)
        shape = [int(np.ptp(np.flatnonzero(nonzero.any(tuple(b for b in range(3) if b != a))))) + 1 for a in range(3)]
        inside = [channel[body] for channel in data]
        share = np.linspace(0, 100, QUANTILES)
        return CaseFigures(
            name,
            case.stamps,
            tuple(shape),
            tuple(float(s) for s in properties["spacing"]),
            float(np.prod(shape) / nonzero.size),
            low,
            tuple(float(v.mean(dtype=np.float64)) for v in inside),
            tuple(float(v.std(dtype=np.float64)) for v in inside),
            tuple(tuple(float(f"{q:.6g}") for q in np.percentile(v, share)) for v in inside),
        )


def sample_cases(cases: Mapping[str, RawCase], most: int) -> dict[str, RawCase]:
    """At most ``most`` of the cases: the same on each machine, and nearly the same with a few cases more or less."""
    return {name: cases[name] for name in sorted(sorted(cases, key=hash_of)[:most])}


def measure(
    cases: Mapping[str, RawCase], worker: FigureWorker, *, n_processes: int, notes: Path | None
) -> list[CaseFigures]:
    """Measure images, by ``"<source>/<case>"``, in parallel and with a progress bar; the figures come in the same order.

    ``notes``: file of one JSON line per image, so that an interrupted call is continued by the next; None for none.
    """
    before = {f.name: f for f in (read_lines(notes, CaseFigures.from_json) if notes is not None else ())}
    known = {n: f for n, f in before.items() if n in cases and f.files == cases[n].stamps}
    tasks = [(name, case) for name, case in cases.items() if name not in known]
    with contextlib.closing(run_tasks(worker, tasks, n_processes, "Fingerprint")) as results:
        for figures in results:
            known[figures.name] = figures
            if notes is not None:
                append_line(notes, asdict(figures))
    return [known[name] for name in cases]


def looks_like_ct(figures: Sequence[CaseFigures], channel: int) -> bool:
    """Whether nearly all images of a channel reach down to air in Hounsfield units."""
    return sum(f.low[channel] <= AIR_HU for f in figures) >= CT_SHARE * len(figures)


def combine(figures: Sequence[CaseFigures]) -> dict[str, Any]:
    """nnU-Net's ``dataset_fingerprint.json`` from the figures of good images, which must have one number of channels."""
    n_channels = len(figures[0].mean)
    odd = next((f for f in figures if len(f.mean) != n_channels), None)
    if odd is not None:
        raise NnsslError(f"{odd.name} has {counted(len(odd.mean), 'channel')}, {figures[0].name} has {n_channels}.")
    intensities = {}
    for c in range(n_channels):
        mean, std = np.array([f.mean[c] for f in figures]), np.array([f.std[c] for f in figures])
        edges = np.array([f.quantiles[c] for f in figures])
        low, median, high = np.percentile((edges[:, 1:] + edges[:, :-1]) / 2, [0.5, 50, 99.5])
        intensities[str(c)] = {
            "mean": float(mean.mean()),
            "median": float(median),
            "std": float(np.sqrt(max(0.0, (std**2 + mean**2).mean() - mean.mean() ** 2))),
            "min": float(edges.min()),
            "max": float(edges.max()),
            "percentile_99_5": float(high),
            "percentile_00_5": float(low),
        }
    return {
        "spacings": [list(f.spacing) for f in figures],
        "shapes_after_crop": [list(f.shape) for f in figures],
        "foreground_intensity_properties_per_channel": intensities,
        "median_relative_size_after_cropping": float(np.median([f.kept for f in figures])),
    }
