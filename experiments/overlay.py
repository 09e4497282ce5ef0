"""The three best and the three worst cases as pictures: contours of reference and prediction on the slice that shows most."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from nnssl.experiments.scores import CELL, Key, Scores, label_order, parse_labels
from nnssl.experiments.tables import baseline_of, means
from nnssl.pictures import new_figure, write_png

log = logging.getLogger("nnssl")

REFERENCE = "#ffffff"
COLOURS = ("#ffb000", "#35d0e6", "#ff5a8a", "#8ce04a", "#b79bff", "#ff7a2f", "#4f9bff", "#f4f06a")
PLANES = {"L": "sagittal", "R": "sagittal", "A": "coronal", "P": "coronal", "S": "axial", "I": "axial"}
OPPOSITE = {"L": "R", "R": "L", "A": "P", "P": "A", "S": "I", "I": "S"}


@dataclass(frozen=True)
class CasePicture:
    """One drawn case, ``"best 1"`` to ``"worst 3"`` of a cell and seed: its Dice averaged over labels (0..1), the baseline's (NaN
    where there is none), plane and slice (``"axial slice 17 of 36"``)."""

    file: Path
    case: str
    rank: str
    key: Key
    seed: str
    dice: float
    scratch: float
    where: str


def pictured_cell(rows: pd.DataFrame, setting: str) -> Key | None:
    """The cell whose cases are shown: of the methods with the fewest labels, where they differ most, the one with the highest
    Dice; ``scratch`` if alone."""
    own = means(rows[rows["setting"] == setting])
    measured = own[own["dice"].notna()]
    ours = measured[measured["method"] != baseline_of(own)]
    shown = measured if ours.empty else ours
    if shown.empty:
        return None
    fewest = shown[shown["labels"] == min(shown["labels"], key=label_order)]
    return Key(*fewest.loc[fewest["dice"].idxmax(), CELL])


def _case_dice(scores: Scores, key: Key, seed: str) -> pd.Series:
    """Mean Dice over labels of each case of one seed; NaN where there is none."""
    cases = scores.cases(key.setting)
    if key not in scores.cells:
        return pd.Series(math.nan, index=cases)
    dice = scores.cells[key]["dice"]
    return dice[dice.index.get_level_values("seed") == seed].groupby("case").mean().reindex(cases)


def extreme_cases(scores: Scores, key: Key, seed: str, count: int = 3) -> list[tuple[str, str, float]]:
    """Best and worst cases of one seed: ``(rank, case, Dice)``, best first; a case is never shown twice. Equal ones go by
    name."""
    dice = _case_dice(scores, key, seed).dropna().sort_values(ascending=False, kind="stable")
    worst = dice[::-1][: min(count, len(dice) // 2)]
    best = dice[: min(count, len(dice) - len(worst))]
    named = [("best", best), ("worst", worst)]
    return [(f"{word} {n}", case, float(v)) for word, of in named for n, (case, v) in enumerate(of.items(), start=1)]


def best_slice(reference: np.ndarray, prediction: np.ndarray) -> int:
    """Index on axis 0 of the slice with most labels at once, then with most foreground of either label map; the middle one where
    there is none."""
    names = np.union1d(reference, prediction)
    if not names.any():
        return len(reference) // 2
    labels = [(m == n).any(axis=(1, 2)).astype(int) for m in (reference, prediction) for n in names if n > 0]
    voxels = ((reference > 0) | (prediction > 0)).sum(axis=(1, 2))
    return int(np.argmax(np.sum(labels, axis=0) * (voxels.max() + 1) + voxels))


def directions(file: Path) -> str:
    """For each axis of the array the side of the patient that its index runs towards, for example ``"SPL"``; of an image that is
    not 3D an empty text. Where a header tells no direction, these are its format's default."""
    import SimpleITK as sitk

    reader = sitk.ImageFileReader()
    reader.SetFileName(str(file))
    reader.ReadImageInformation()
    if reader.GetDimension() != 3:
        return ""
    code = sitk.DICOMOrientImageFilter.GetOrientationFromDirectionCosines(reader.GetDirection())
    return code[::-1] if set(code) <= set(PLANES) else ""


def _mark(panel: Any, towards: str, flipped: bool) -> None:
    """Letters at the four sides of a panel; ``towards`` of its rows and columns."""
    down, right = towards[0], towards[1]
    up = OPPOSITE[down]
    if flipped:
        down, up = up, down
    how = {"transform": panel.transAxes, "color": "#fff27a", "fontsize": 9, "fontweight": "bold"}
    panel.text(0.5, 0.97, up, ha="center", va="top", **how)
    panel.text(0.5, 0.03, down, ha="center", va="bottom", **how)
    panel.text(0.03, 0.5, OPPOSITE[right], ha="left", va="center", **how)
    panel.text(0.97, 0.5, right, ha="right", va="center", **how)


def _read(file: Path) -> tuple[np.ndarray, tuple[float, ...]]:
    """Array ``(D, H, W)`` and spacing in mm; of a 4D image the first channel, of a 2D one a single slice."""
    import SimpleITK as sitk

    image = sitk.ReadImage(str(file))
    array = sitk.GetArrayFromImage(image)
    spacing = tuple(reversed(image.GetSpacing()))
    if array.ndim == 4:
        array, spacing = array[0], spacing[1:]
    return (array, spacing) if array.ndim == 3 else (array[None], (1.0, *spacing))


def _thick_axis(spacing: Sequence[float]) -> int:
    """The axis across which slices are taken: the one with much thicker slices, else the first."""
    thick = int(np.argmax(spacing))
    return thick if spacing[thick] > 1.5 * sorted(spacing)[1] else 0


def _box(mask: np.ndarray, spacing: Sequence[float]) -> tuple[slice, ...]:
    """A square window in mm around what is drawn, with a margin, within the slice."""
    where = np.argwhere(mask) if mask.any() else np.array([(0, 0), np.array(mask.shape) - 1])
    low, high = where.min(0), where.max(0) + 1
    half = (max((high - low) * spacing) * 1.5 + 6 * max(spacing)) / np.array(spacing) / 2
    start = np.clip(np.round((low + high) / 2 - half), 0, np.maximum(0, mask.shape - 2 * half)).astype(int)
    return tuple(slice(a, int(min(size, b))) for a, b, size in zip(start, np.ceil(start + 2 * half), mask.shape))


def draw_case(
    image: Path, reference: Path, predictions: Sequence[tuple[str, Path]], labels: Sequence[int], file: Path
) -> str:
    """Draw one case into a PNG: the reference, then each prediction (with its title) over a thin white reference contour, on one
    slice, which is chosen for the last one. ``labels`` are the values to draw.

    Returns:
        Plane and slice that are shown, counted from 1.

    Raises:
        ValueError: the sizes differ. RuntimeError: a file cannot be read.
    """
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    scan, spacing = _read(image)
    truth, _ = _read(reference)
    maps = [(title, _read(path)[0]) for title, path in predictions]
    if any(m.shape != scan.shape for m in [truth, *(m for _, m in maps)]):
        raise ValueError(f"{image.name}: image and label maps differ in size")
    axis = _thick_axis(spacing)
    z = best_slice(np.moveaxis(truth, axis, 0), np.moveaxis(maps[-1][1], axis, 0))
    towards = directions(image)
    pixel = [s for a, s in enumerate(spacing) if a != axis]
    whole, reference_map, *shown = (np.take(a, z, axis) for a in (scan, truth, *(m for _, m in maps)))
    box = _box(np.any([m > 0 for m in (reference_map, *shown)], axis=0), pixel)
    seen, reference_map = whole[box], reference_map[box]
    low, high = np.percentile(seen, [1, 99.5])
    figure = new_figure(
        2.5 * (len(maps) + 1), 2.85, layout=ConstrainedLayoutEngine(w_pad=0.03, h_pad=0.06, wspace=0.02)
    )
    panels = figure.subplots(1, len(maps) + 1, squeeze=False)[0]
    titles = ["reference", *(title for title, _ in maps)]
    for panel, title, found in zip(panels, titles, [None, *(m[box] for m in shown)]):
        aspect = pixel[0] / pixel[1]
        panel.imshow(seen, cmap="gray", vmin=low, vmax=max(high, low + 1), aspect=aspect, interpolation="bilinear")
        for value, colour in zip(labels, itertools.cycle(COLOURS)):
            if found is None:
                _contour(panel, reference_map == value, colour, 1.6)
            else:
                _contour(panel, reference_map == value, REFERENCE, 0.8)
                _contour(panel, found == value, colour, 1.6)
        panel.set_title(title, fontsize=11.5, color="#2b2f36")
        panel.axis("off")
        if axis:  # coronal and sagittal slices: the head is up
            panel.invert_yaxis()
        if towards:
            _mark(panel, towards[:axis] + towards[axis + 1 :], flipped=bool(axis))
    write_png(file, figure, 110, facecolor="white", metadata={"Software": None})
    plane = PLANES[towards[axis]] if towards else f"axis {axis},"
    return f"{plane} slice {z + 1} of {scan.shape[axis]}"


def _contour(panel: Any, mask: np.ndarray, colour: str, width: float) -> None:
    if mask.any() and not mask.all():
        panel.contour(np.pad(mask, 1).astype(float), [0.5], colors=colour, linewidths=width,
                      extent=(-1.5, mask.shape[1] + 0.5, -1.5, mask.shape[0] + 0.5))  # fmt: skip


def _prediction(images: dict[str, Any], key: Key, seed: str, name: str) -> Path | None:
    """A predicted file of a cell and seed; with several folds, of the first that has it."""
    for entry in images.get("predictions") or []:
        same = Key(str(entry.get("setting", "")), str(entry["method"]), parse_labels(entry["labels"])) == key
        file = Path(entry["folder"]) / name
        if same and str(entry["seed"]) == seed and file.is_file():
            return file
    return None


def _label_values(images: dict[str, Any], names: Sequence[str]) -> list[int]:
    values = images.get("labels") or {}
    of = [values[name] for name in names if values.get(name) is not None]
    flat = [int(v) for o in of for v in (o if isinstance(o, list) else [o])]
    return list(dict.fromkeys(flat)) or list(range(1, len(names) + 1))


def remove_overlays(out: Path) -> None:
    """Remove the pictures of an earlier report: other cases may be the best now, or pictures may have been switched off since."""
    for kind in ("best", "worst"):
        for file in out.glob(f"*{kind}_[0-9].png"):
            file.unlink()


def write_overlays(
    scores: Scores, rows: pd.DataFrame, images: dict[str, Any], setting: str, out: Path
) -> list[CasePicture]:
    """Draw the best and worst cases of a setting into the folder ``out``; what cannot be drawn (a file that is gone) is left out
    with a warning. ``images`` is the content of ``images.json``."""
    key = pictured_cell(rows, setting)
    if key is None:
        return []
    cases = images.get("cases") or {}
    known = cases.get(setting, cases)
    names = {case: Path(about.get("reference") or "").name for case, about in known.items()}
    for seed in scores.seeds(setting):
        chosen = extreme_cases(scores, key, seed)
        if any(_prediction(images, key, seed, names.get(case, "")) for _, case, _ in chosen):
            break
    else:
        return []
    base = scores.baseline(key)
    scratch, drawn = _case_dice(scores, base, seed), []
    values = _label_values(images, scores.label_names(setting))
    out.mkdir(parents=True, exist_ok=True)
    for rank, case, dice in chosen:
        own = _prediction(images, key, seed, names.get(case, ""))
        if own is None or not known[case].get("image"):
            log.warning("No picture of %s: its prediction, image or reference is not there.", case)
            continue
        panels = [(f"{key.method}: Dice {100 * dice:.1f}", own)]
        before = float(scratch[case]) if key != base else math.nan
        theirs = _prediction(images, base, seed, names[case]) if not math.isnan(before) else None
        if theirs is not None:
            panels.insert(0, (f"{base.method}: Dice {100 * before:.1f}", theirs))
        prefix = "".join(c if c.isalnum() or c == "-" else "_" for c in setting)
        file = out / f"{prefix}{'_' * bool(prefix)}{rank.replace(' ', '_')}.png"
        try:
            where = draw_case(Path(known[case]["image"]), Path(known[case]["reference"]), panels, values, file)
        except (RuntimeError, ValueError, OSError) as error:
            log.warning("No picture of %s: %s", case, error)
            continue
        drawn.append(CasePicture(file, case, rank, key, seed, dice, before, where))
    return drawn
