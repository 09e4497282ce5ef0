"""What the demo says at its end: Dice with and without pretraining, a table of the steps, and pictures."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
import SimpleITK as sitk  # noqa: E402
from phantoms import LABELLED, LABELS, UNLABELLED  # noqa: E402

ORGANS = {name: value for name, value in LABELS.items() if value}
COLOURS = {1: "#ff5a4f", 2: "#35d0e6"}
NAMES = {"scratch": "labels only", "pretrained": "pretrained, mean teacher"}


GAINS: dict[int, float] = {0: 0.014, 1: 0.060, 2: -0.017, 10: 0.155, 11: 0.085}
"""Seed of the phantoms -> gain in mean Dice of this demo on a CPU. The phantoms were chosen with the seeds 10 and 11."""


def measured(gains: dict[int, float]) -> str:
    """What to expect of a run, from the gains of several seeds."""
    if not gains:
        return ""
    seeds, values = ", ".join(map(str, gains)), list(gains.values())
    spread = f"{min(values):+.3f} to {max(values):+.3f}"
    return f"With the seeds {seeds} of the phantoms it was {np.mean(values):+.3f} on average ({spread}). "


def dice_of(summary: Path) -> dict[str, dict[str, float]]:
    """Dice of each case and organ from nnU-Net's summary.json: ``{case: {organ: dice, "mean": dice}}``."""
    out = {}
    for case in json.loads(summary.read_text())["metric_per_case"]:
        dice = {organ: float(case["metrics"][str(value)]["Dice"]) for organ, value in ORGANS.items()}
        name = Path(case["prediction_file"]).name.removesuffix(".nii.gz")
        out[name] = {**dice, "mean": float(np.mean(list(dice.values())))}
    return out


def table(rows: list[tuple[str, ...]], head: tuple[str, ...]) -> str:
    """Text columns, aligned to the left."""
    widths = [max(len(str(row[i])) for row in [head, *rows]) for i in range(len(head))]
    lines = [head, tuple("-" * w for w in widths), *rows]
    return "\n".join("  ".join(str(c).ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in lines)


def summary(rows: list[tuple[str, str, str]], dice: dict[str, dict], pictures: list[str]) -> str:
    """The last text: steps with their times, the Dice table, an honest sentence on it, and where to look."""
    columns = [*ORGANS, "mean"]
    scores = []
    for name in ("scratch", "pretrained"):
        means = [np.mean([case[c] for case in dice[name].values()]) for c in columns]
        scores.append((NAMES[name], *(f"{m:.3f}" for m in means)))
    gain = [dice["pretrained"][case]["mean"] - dice["scratch"][case]["mean"] for case in dice["pretrained"]]
    better = sum(g > 0 for g in gain)
    verdict = (
        f"Pretraining and the mean teacher changed the mean Dice by {np.mean(gain):+.3f} against the same steps on labels only, "
        f"and were better in {better} of {len(gain)} test cases. {measured(GAINS)}"
        "A tiny network and minutes of training: this shows how it works; docs/results says how well."
    )
    parts = [
        table(rows, ("step", "min:s", "result")),
        table(scores, (f"Dice on {len(gain)} test cases", *columns)),
        verdict,
        f"Pictures in {Path(pictures[0]).parent}: {', '.join(Path(p).name for p in pictures)}",
    ]
    return "\n\n".join(parts)


def _load(file: Path) -> np.ndarray:
    return sitk.GetArrayFromImage(sitk.ReadImage(str(file)))


def _show(axis: plt.Axes, image: np.ndarray, labels: np.ndarray | None = None, title: str = "") -> None:
    axis.imshow(image, cmap="gray", vmin=0, vmax=np.percentile(image, 99.7), interpolation="bilinear")
    for value, colour in reversed(COLOURS.items()):
        if labels is not None and (labels == value).any():
            axis.contour(labels == value, [0.5], colors=colour, linewidths=1.4)
    axis.set_title(title, fontsize=9, color="#333333")
    axis.axis("off")


def write_pictures(folder: Path, dice: dict[str, dict]) -> list[Path]:
    """Write ``pictures/``: the phantoms, the predictions, and copies of what the pretraining has drawn."""
    out = folder / "pictures"
    out.mkdir(exist_ok=True)
    raw = folder / "nnUNet_raw"
    scans = sorted((raw / UNLABELLED / "imagesTr").glob("*.nii.gz"))[:6]
    figure, axes = plt.subplots(1, len(scans), figsize=(1.9 * len(scans), 2.1), squeeze=False)
    for axis, scan in zip(axes[0], scans, strict=True):
        image = _load(scan)
        _show(axis, image[len(image) // 2], title=scan.name.removesuffix("_0000.nii.gz"))
    written = [_save(figure, out / "phantoms.png")]

    cases = sorted(dice["pretrained"])[:3]
    columns = ["image", "truth", *NAMES.values()]
    figure, axes = plt.subplots(
        len(cases), len(columns), figsize=(1.9 * len(columns), 2.05 * len(cases)), squeeze=False
    )
    for row, case in zip(axes, cases, strict=True):
        image = _load(raw / LABELLED / "imagesTs" / f"{case}_0000.nii.gz")
        truth = _load(raw / LABELLED / "labelsTs" / f"{case}.nii.gz")
        z = int(
            np.argmax(np.minimum(*[(truth == v).sum((1, 2)) for v in ORGANS.values()]) * 1000 + (truth > 0).sum((1, 2)))
        )
        predicted = {name: _load(folder / "predictions" / name / f"{case}.nii.gz") for name in NAMES}
        _show(row[0], image[z], None, "image")
        _show(row[1], image[z], truth[z], "truth")
        for axis, name in zip(row[2:], NAMES, strict=True):
            _show(axis, image[z], predicted[name][z], f"{NAMES[name]}\nDice {dice[name][case]['mean']:.2f}")
    written.append(_save(figure, out / "predictions.png"))

    run = next(iter(sorted((folder / "nnUNet_results" / LABELLED).glob("nnssl*"))), None)
    for drawn in sorted(run.glob("*.png")) if run else []:
        copy = out / f"pretraining_{drawn.name}"
        copy.write_bytes(drawn.read_bytes())
        written.append(copy)
    return written


def _save(figure: plt.Figure, file: Path) -> Path:
    figure.set_layout_engine("constrained")
    figure.savefig(file, dpi=90, facecolor="white")
    plt.close(figure)
    return file
