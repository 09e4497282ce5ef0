"""The three best and the three worst cases as pictures: contours of reference and prediction on the slice that shows most."""

from __future__ import annotations

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
ENDINGS = (".nii.gz", ".nrrd", ".mha", ".nii", ".tif", ".png")


@dataclass(frozen=True)
class CasePicture:
    """One drawn case.

    Attributes:
        file: the PNG. case: its name. rank: ``"best 1"`` to ``"worst 3"``. key, seed: whose prediction is shown beside the
            baseline's.
        dice: its Dice averaged over labels, 0..1. scratch: the same of scratch; NaN where there is none.
        where: plane and slice, ``"axial slice 17 of 36"``.
    """

    file: Path
    case: str
    rank: str
    key: Key
    seed: str
    dice: float
    scratch: float
    where: str = ""


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
    """Index on axis 0 of the slice with most labels at once, then with most foreground of either; the middle one where there
    is none.

    Args:
        reference, prediction: integer label maps ``(D, H, W)``.
    """
    names = np.unique(np.concatenate([np.unique(reference), np.unique(prediction)]))
    area = [
        (reference == n).any(axis=(1, 2)).astype(float) + (prediction == n).any(axis=(1, 2)) for n in names if n > 0
    ]
    if not area:
        return len(reference) // 2
    voxels = ((reference > 0) | (prediction > 0)).sum(axis=(1, 2))
    return int(np.argmax(np.sum(area, axis=0) * (voxels.max() + 1.0) + voxels))


PLANES = {"L": "sagittal", "R": "sagittal", "A": "coronal", "P": "coronal", "S": "axial", "I": "axial"}
OPPOSITE = {"L": "R", "R": "L", "A": "P", "P": "A", "S": "I", "I": "S"}


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
    sides = {
        (0.5, 0.97): down if flipped else up,
        (0.5, 0.03): up if flipped else down,
        (0.03, 0.5): OPPOSITE[right],
        (0.97, 0.5): right,
    }
    for (x, y), letter in sides.items():
        align = {
            "ha": "center" if x == 0.5 else "left" if x < 0.5 else "right",
            "va": "center" if y == 0.5 else "top" if y > 0.5 else "bottom",
        }
        panel.text(x, y, letter, transform=panel.transAxes, color="#fff27a", fontsize=9, fontweight="bold", **align)


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


def _window(image: np.ndarray, box: tuple[slice, slice]) -> tuple[float, float]:
    inside = image[box]
    low, high = np.percentile(inside, [1, 99.5])
    return float(low), float(high if high > low else low + 1)


def _box(mask: np.ndarray, spacing: Sequence[float]) -> tuple[slice, slice]:
    """A square window in mm around what is drawn, with a margin, within the slice."""
    shape = mask.shape
    where = np.argwhere(mask) if mask.any() else np.array([[0, 0], [shape[0] - 1, shape[1] - 1]])
    low, high = where.min(0), where.max(0) + 1
    side = max((high - low) * spacing) * 1.5 + 6 * max(spacing)
    out = []
    for a in (0, 1):
        half, middle = side / spacing[a] / 2, (low[a] + high[a]) / 2
        start = int(max(0, min(round(middle - half), shape[a] - 2 * half)))
        out.append(slice(start, int(min(shape[a], math.ceil(start + 2 * half)))))
    return out[0], out[1]


def draw_case(
    image: Path, reference: Path, predictions: Sequence[tuple[str, Path]], labels: Sequence[int], file: Path
) -> str:
    """Draw one case: the reference, then each prediction over a thin white reference contour, on one slice, side by side.

    Args:
        image: first channel of the raw image.
        reference: label map of the same grid.
        predictions: title and label map of each panel; the last one is the one that the slice is chosen for.
        labels: values to draw; one colour each.
        file: the PNG to write.

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
    flat = [np.take(a, z, axis) for a in (scan, truth, *(m for _, m in maps))]
    pixel = [s for a, s in enumerate(spacing) if a != axis]
    box = _box(np.any([m > 0 for m in flat[1:]], axis=0), pixel)
    low, high = _window(flat[0], box)
    layout = ConstrainedLayoutEngine(w_pad=0.03, h_pad=0.06, wspace=0.02)
    figure = new_figure(2.5 * (len(maps) + 1), 2.85, layout=layout)
    axes = figure.subplots(1, len(maps) + 1, squeeze=False)
    for panel, (title, shown) in zip(axes[0], [("reference", None), *zip([t for t, _ in maps], flat[2:])]):
        panel.imshow(
            flat[0][box], cmap="gray", vmin=low, vmax=high, aspect=pixel[0] / pixel[1], interpolation="bilinear"
        )
        for i, value in enumerate(labels):
            colour = COLOURS[i % len(COLOURS)]
            _contour(
                panel, flat[1][box] == value, colour if shown is None else REFERENCE, 1.6 if shown is None else 0.8
            )
            if shown is not None:
                _contour(panel, shown[box] == value, colour, 1.6)
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


def _folder(images: dict[str, Any], key: Key, seed: str, case: str) -> Path | None:
    """The prediction of a case: the folder of its cell and seed that has the file; with several folds, the first that does."""
    for entry in images.get("predictions") or []:
        same = Key(str(entry.get("setting", "")), str(entry["method"]), parse_labels(entry["labels"])) == key
        if same and str(entry["seed"]) == seed:
            for ending in ENDINGS:
                file = Path(entry["folder"]) / f"{case}{ending}"
                if file.is_file():
                    return file
    return None


def _label_values(images: dict[str, Any], names: Sequence[str]) -> list[int]:
    values = images.get("labels") or {}
    out = [values.get(name) for name in names]
    flat = [int(v) for o in out if o is not None for v in (o if isinstance(o, list) else [o])]
    return list(dict.fromkeys(flat)) or list(range(1, len(names) + 1))


def remove_overlays(out: Path) -> None:
    """Remove the pictures of an earlier report: other cases may be the best now, or pictures may have been switched off since."""
    for kind in ("best", "worst"):
        for file in out.glob(f"*{kind}_[0-9].png"):
            file.unlink()


def write_overlays(
    scores: Scores, rows: pd.DataFrame, images: dict[str, Any], setting: str, out: Path
) -> list[CasePicture]:
    """Draw the best and worst cases of a setting into ``out``; what cannot be drawn (a file that is gone) is left out with a
    warning.

    Args:
        scores, rows: of the experiment.
        images: content of ``images.json``.
        setting: which table.
        out: folder for the PNG files; created.
    """
    key = pictured_cell(rows, setting)
    if key is None:
        return []
    cases = images.get("cases") or {}
    cases = cases.get(setting, cases)
    drawn = []
    for seed in scores.seeds(setting):
        chosen = extreme_cases(scores, key, seed)
        if any(_folder(images, key, seed, case) for _, case, _ in chosen):
            break
    else:
        return []
    base = scores.baseline(key)
    scratch = _case_dice(scores, base, seed)
    out.mkdir(parents=True, exist_ok=True)
    for rank, case, dice in chosen:
        own, theirs = _folder(images, key, seed, case), _folder(images, base, seed, case) if key != base else None
        before = float(scratch[case]) if key != base else math.nan
        known = cases.get(case) or {}
        if own is None or not known.get("image") or not known.get("reference"):
            log.warning("No picture of %s: its prediction, image or reference is not there.", case)
            continue
        panels = [(f"{key.method}: Dice {100 * dice:.1f}", own)]
        if theirs is not None and not math.isnan(before):
            panels.insert(0, (f"{base.method}: Dice {100 * before:.1f}", theirs))
        file = out / f"{_safe(setting)}{rank.replace(' ', '_')}.png"
        try:
            where = draw_case(
                Path(known["image"]),
                Path(known["reference"]),
                panels,
                _label_values(images, scores.label_names(setting)),
                file,
            )
        except (RuntimeError, ValueError, OSError) as error:
            log.warning("No picture of %s: %s", case, error)
            continue
        drawn.append(CasePicture(file, case, rank, key, seed, dice, before, where))
    return drawn


def _safe(setting: str) -> str:
    name = "".join(c if c.isalnum() or c in "-" else "_" for c in setting)
    return f"{name}_" if name else ""
