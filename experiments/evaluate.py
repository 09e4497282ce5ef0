"""Evaluates one fine-tuning: nnU-Net's own metrics of each case and label, surface Dice and HD95, and its training curve.

Dice and voxel counts are ``nnunetv2``'s :func:`compute_metrics`; surface Dice and HD95 are those of the library
``surface-distance-based-measures`` (Nikolov et al. 2018, arXiv:1809.04430), whose surface elements know the spacing. As in
nnU-Net a label that neither reference nor prediction has counts nowhere (nan); the table says how often that was so.
"""

from __future__ import annotations

import argparse
import logging
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nnssl.command import run_command
from nnssl.errors import NnsslError
from nnssl.files import read_json, write_json
from nnssl.weights.load import read_file

log = logging.getLogger("nnssl")

Region = int | tuple[int, ...]
LOGGED = {"pseudo_dice": "mean_fg_dice", "train_loss": "train_losses", "val_loss": "val_losses"}
"""Our column -> the list in nnU-Net's log."""


def need_surface_library() -> None:
    """Raise :class:`NnsslError` where the library of the surface metrics is not installed."""
    try:
        import surface_distance  # noqa: F401
    except ImportError:
        raise NnsslError(
            "surface Dice and HD95 need the package surface-distance-based-measures. Type: pip install 'nnssl[metrics]' "
            "(or pip install surface-distance-based-measures)"
        ) from None


def surface_metrics(
    reference: np.ndarray, prediction: np.ndarray, spacing: Sequence[float], tolerance_mm: float
) -> tuple[float, float]:
    """Surface Dice in 0..1 at a tolerance, and the 95th percentile of the Hausdorff distance in mm.

    (nan, nan) where both masks are empty, (0, nan) where one is: nothing has no distance. An axis of one voxel is left out.
    """
    if not reference.any() or not prediction.any():
        return (0.0 if reference.any() or prediction.any() else math.nan), math.nan
    import surface_distance

    flat = [i for i, size in enumerate(reference.shape) if size > 1]
    if 2 <= len(flat) < reference.ndim:
        reference, prediction = np.squeeze(reference), np.squeeze(prediction)
        spacing = [spacing[i] for i in flat]
    found = surface_distance.compute_surface_distances(reference, prediction, [float(s) for s in spacing])
    dice = surface_distance.compute_surface_dice_at_tolerance(found, tolerance_mm)
    return float(dice), float(surface_distance.compute_robust_hausdorff(found, 95))


def evaluate_case(
    reference: str, prediction: str, reader: Any, labels: dict[str, Region], ignore: int | None, tolerance_mm: float
) -> list[dict[str, Any]]:
    """The metrics of one case, a row for each label or region; voxels of the ``ignore`` label count nowhere."""
    from nnunetv2.evaluation.evaluate_predictions import compute_metrics, region_or_label_to_mask

    found = compute_metrics(reference, prediction, reader, list(labels.values()), ignore)["metrics"]
    truth, properties = reader.read_seg(reference)
    guess, _ = reader.read_seg(prediction)
    keep = np.ones_like(truth, dtype=bool) if ignore is None else truth != ignore
    rows = []
    for name, region in labels.items():
        masks = [(region_or_label_to_mask(seg, region) & keep)[0] for seg in (truth, guess)]
        surface, hd95 = surface_metrics(masks[0], masks[1], properties["spacing"], tolerance_mm)
        values = found[region]
        rows.append({"label": name, "dice": float(values["Dice"]), "surface_dice": surface, "hd95": hd95,
                     "reference_voxels": int(values["n_ref"]), "prediction_voxels": int(values["n_pred"])})  # fmt: skip
    return rows


def _labels(dataset_json: dict[str, Any], regions: bool) -> dict[str, Region]:
    """Name -> label, or region where the dataset has regions."""
    out: dict[str, Region] = {}
    for name, value in dataset_json["labels"].items():
        values = tuple(int(v) for v in np.atleast_1d(value))
        if name != "ignore" and values != (0,):
            out[name] = values if regions else values[0]
    return out


def evaluate_run(spec: dict[str, Any]) -> dict[str, Any]:
    """Evaluate the predictions of one fine-tuning; returns rows of ``cases`` and ``curve``, and values by name as ``labels``.

    ``spec`` has ``cases`` (a list of case, reference, prediction), ``dataset_json``, ``plans`` and ``checkpoint`` (files of the
    fine-tuned model) and ``tolerance_mm``.
    """
    from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_dataset_json
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    need_surface_library()
    dataset_json = read_json(spec["dataset_json"])
    manager = PlansManager(spec["plans"]).get_label_manager(dataset_json)
    labels, rows, reader = _labels(dataset_json, manager.has_regions), [], None
    for case in spec["cases"]:
        for what in ("reference", "prediction"):
            if not Path(case[what]).is_file():
                raise NnsslError(f"case {case['case']}: the {what} {case[what]} is missing.")
        if reader is None:
            reader = determine_reader_writer_from_dataset_json(dataset_json, case["reference"], verbose=False)()
        try:
            found = evaluate_case(case["reference"], case["prediction"], reader, labels, manager.ignore_label,
                                  float(spec["tolerance_mm"]))  # fmt: skip
        except (RuntimeError, OSError, ValueError, EOFError) as error:
            raise NnsslError(f"case {case['case']} cannot be evaluated ({case['prediction']}): {error}") from error
        rows += [{"case": case["case"], **row} for row in found]
        log.info("%s: %s", case["case"], ", ".join(f"{r['label']} {r['dice']:.3f}" for r in found))
    return {"cases": rows, "curve": training_curve(Path(spec["checkpoint"])), "labels": labels}


def training_curve(checkpoint: Path) -> list[dict[str, Any]]:
    """The training curve that nnU-Net keeps in a fine-tuned checkpoint: a row for each epoch.

    ``minutes`` counts the epochs' own time up to the end of each, so an interruption does not enter.
    """
    content = read_file(checkpoint)
    logged = content["logging"]
    metadata = (content.get("init_args") or {}).get("plans", {}).get("nnssl") or {}
    steps = int(metadata.get("iterations") or 250)
    rows, seconds = [], 0.0
    for epoch, (start, end) in enumerate(zip(logged["epoch_start_timestamps"], logged["epoch_end_timestamps"])):
        seconds += float(end) - float(start)
        values = {k: float(logged[key][epoch]) if epoch < len(logged[key]) else math.nan for k, key in LOGGED.items()}
        rows.append({"epoch": epoch, "step": (epoch + 1) * steps, "minutes": round(seconds / 60, 4), **values})
    return rows


def drop_unreadable(folder: Path) -> list[str]:
    """Remove predictions that a killed process left half written, so that ``--continue_prediction`` makes them anew; returns
    their names."""
    import SimpleITK as sitk

    dropped = []
    for file in sorted(folder.glob("*")) if folder.is_dir() else []:
        if file.suffix == ".json" or not file.is_file():
            continue
        try:
            sitk.ReadImage(str(file))
        except RuntimeError:
            file.unlink()
            dropped.append(file.name)
    return dropped


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate what a file of :func:`evaluate_run` asks for and write its ``result``; returns the exit status."""
    parser = argparse.ArgumentParser(prog="nnssl_evaluate", allow_abbrev=False, description=main.__doc__)
    parser.add_argument("spec", type=Path, help="JSON file that the experiment has written")
    args = parser.parse_args(argv)

    def body() -> None:
        spec = read_json(args.spec)
        result = Path(spec["result"])
        found = evaluate_run(spec)
        result.parent.mkdir(parents=True, exist_ok=True)
        write_json(result, found)

    return run_command(body)


if __name__ == "__main__":
    sys.exit(main())
