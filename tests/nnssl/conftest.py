"""A made-up label-efficiency experiment: numbers with known gains, and small ellipsoids as images."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

LABELS = ("Anterior", "Posterior")
METHODS = {
    "scratch": 0.0,
    "mae": 0.02,
    "hdense": 0.035,
    "macl": 0.055,
}  # gain at the fewest labels, halved at each next count
SHAPE, SPACING = (12, 28, 22), (2.5, 1.0, 1.25)  # (z, y, x), mm: thick slices
CASE_COLUMNS = (
    "method", "labels", "setting", "seed", "fold", "case", "label", "dice", "surface_dice", "hd95", "reference_voxels",
    "prediction_voxels",
)  # fmt: skip
RUN_COLUMNS = (
    "setting", "method", "labels", "seed", "fold", "epoch", "step", "pseudo_dice", "train_loss", "val_loss", "minutes"
)  # fmt: skip


def write_csv(file: Path, columns: tuple[str, ...], rows: list[dict]) -> None:
    with file.open("w", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, columns)
        writer.writeheader()
        writer.writerows(rows)


def _ellipsoid(centre, radii) -> np.ndarray:
    z, y, x = np.indices(SHAPE)
    return sum(((a - c) / r) ** 2 for a, c, r in zip((z, y, x), centre, radii)) <= 1


def _label_map(generator: np.random.Generator, error: float) -> np.ndarray:
    out = np.zeros(SHAPE, dtype=np.uint8)
    for value, y in ((1, 9), (2, 18)):
        shift = generator.normal(0, 1, 3) * error * np.array([4, 12, 12])
        out[_ellipsoid(np.array([6, y, 11]) + shift, np.array([4, 5, 6]) * (1 + error * generator.normal()))] = value
    return out


def _write(array: np.ndarray, file: Path) -> None:
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(tuple(reversed(SPACING)))
    sitk.WriteImage(image, str(file))


def _images(folder: Path, cases: list[str], settings: tuple[str, ...], seeds: int) -> None:
    generator = np.random.default_rng(5)
    data = folder / "data"
    data.mkdir(parents=True, exist_ok=True)
    found, predictions = {}, []
    for case in cases:
        truth = _label_map(np.random.default_rng(int(case[-3:])), 0.03)
        scan = 300 + 120 * (truth == 1) + 200 * (truth == 2) + generator.normal(0, 35, SHAPE)
        _write(scan.astype(np.float32), data / f"{case}_0000.nii.gz")
        _write(truth, data / f"{case}.nii.gz")
        found[case] = {"image": str(data / f"{case}_0000.nii.gz"), "reference": str(data / f"{case}.nii.gz")}
    for setting in settings:
        for method in METHODS:
            out = folder / "predictions" / f"{setting or 'x'}_{method}"
            out.mkdir(parents=True)
            for case in cases:
                error = 0.06 + (0.06 if method == "scratch" else 0.0) + 0.01 * cases.index(case) / len(cases)
                _write(_label_map(np.random.default_rng(int(case[-3:]) + 1), error), out / f"{case}.nii.gz")
            predictions += [
                {"method": method, "labels": 4, "setting": setting, "seed": s, "fold": "0", "folder": str(out)}
                for s in range(seeds)
            ]
    content = {"cases": found, "labels": {n: i + 1 for i, n in enumerate(LABELS)}, "predictions": predictions}
    (folder / "images.json").write_text(json.dumps(content))


def _case_rows(counts, cases, settings, seeds) -> list[dict]:
    generator = np.random.default_rng(1)
    rows = []
    for setting in settings:
        hard = {case: generator.normal(0, 0.035) for case in cases}
        for seed in range(seeds):
            drawn = generator.normal(0, 0.012)
            for step, n in enumerate(counts):
                for method, gain in METHODS.items():
                    own = 0.60 + 0.075 * step + gain / 2**step + drawn / (step + 1) + generator.normal(0, 0.004)
                    for case in cases:
                        for i, label in enumerate(LABELS):
                            dice = float(np.clip(own + hard[case] - 0.03 * i + generator.normal(0, 0.018), 0, 1))
                            rows.append({
                                "method": method, "labels": n, "setting": setting, "seed": seed, "fold": "0", "case": case,
                                "label": label, "dice": f"{dice:.6f}", "surface_dice": f"{min(1, dice + 0.1):.6f}",
                                "hd95": f"{8 - 7 * dice:.4f}", "reference_voxels": 500, "prediction_voxels": 480,
                            })  # fmt: skip
    return rows


def _run_rows(counts, settings, seeds, epochs) -> list[dict]:
    generator = np.random.default_rng(2)
    rows = []
    for setting in settings:
        for step, n in enumerate(counts):
            for method, gain in METHODS.items():
                for seed in range(seeds):
                    for epoch in range(epochs):
                        speed = 9.0 if method == "scratch" else 9.0 - 80 * gain
                        final = 0.63 + 0.075 * step + gain / 2**step
                        dice = final * (1 - np.exp(-(epoch + 1) / speed)) + generator.normal(0, 0.008)
                        rows.append({
                            "setting": setting, "method": method, "labels": n, "seed": seed, "fold": "0", "epoch": epoch,
                            "step": (epoch + 1) * 50, "pseudo_dice": f"{max(0, dice):.5f}", "train_loss": f"{-dice:.5f}",
                            "val_loss": f"{-dice:.5f}", "minutes": f"{0.1 * (epoch + 1):.2f}",
                        })  # fmt: skip
    return rows


@pytest.fixture(scope="session")
def synthetic_experiment(tmp_path_factory) -> Callable[..., Path]:
    """Write a result folder: numbers of labels, of seeds, of cases, and the rows of ``cases.csv`` to keep."""

    def make(counts=(4, 8, 16), seeds=3, cases=12, settings=("",), images=False, keep=None, epochs=40) -> Path:
        folder = tmp_path_factory.mktemp("experiment")
        names = [f"phantom_{i:03d}" for i in range(cases)]
        rows = [r for r in _case_rows(counts, names, settings, seeds) if keep is None or keep(r)]
        write_csv(folder / "cases.csv", CASE_COLUMNS, rows)
        write_csv(folder / "runs.csv", RUN_COLUMNS, _run_rows(counts, settings, seeds, epochs))
        asked = {"methods": list(METHODS), "labels": list(counts), "seeds": list(range(seeds))}
        about = {
            "name": "phantoms", "title": "Phantoms with few labels", "minutes": 134.0, "started": "2026-01-05 10:00",
            "finished": "2026-01-05 12:14", "settings": [{"name": s, **asked} for s in settings],
            "commands": ["nnssl_label_efficiency phantoms.yaml"], "hardware": {"cpu": "made up", "cores": 2},
            "versions": {"nnssl": "0.1.0", "nnunetv2": "2.8.1"}, "notes": ["Made-up numbers: they only show how a report looks."],
        }  # fmt: skip
        (folder / "experiment.json").write_text(json.dumps(about))
        if images:
            _images(folder, names, settings, seeds)
        return folder

    return make
