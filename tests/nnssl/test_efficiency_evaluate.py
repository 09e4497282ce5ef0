"""The metrics of a case: nnU-Net's own, and surface Dice and HD95 against hand-made cases and a slow reference."""

import json
import math
import sys

import numpy as np
import pytest
import SimpleITK as sitk
import torch

from nnssl.errors import NnsslError
from nnssl.experiments.evaluate import (
    drop_unreadable,
    evaluate_run,
    main,
    need_surface_library,
    surface_metrics,
    training_curve,
)

surface_distance = pytest.importorskip("surface_distance", reason="pip install nnssl[metrics]")
pytestmark = pytest.mark.filterwarnings("ignore:Please import")  # of SciPy, to that library


def cube(shape, *bounds):
    mask = np.zeros(shape, bool)
    mask[tuple(slice(a, b) for a, b in bounds)] = True
    return mask


def test_equal_masks_are_perfect_and_empty_ones_count_nowhere():
    mask = cube((12, 12, 12), (3, 8), (3, 8), (3, 8))
    nothing = np.zeros_like(mask)
    assert surface_metrics(mask, mask, (1, 1, 1), 1.0) == (1.0, 0.0)
    assert all(math.isnan(v) for v in surface_metrics(nothing, nothing, (1, 1, 1), 1.0))
    for pair in ((mask, nothing), (nothing, mask)):
        dice, hd95 = surface_metrics(*pair, (1, 1, 1), 1.0)
        assert dice == 0.0 and math.isnan(hd95)


def test_a_slab_moved_along_one_axis():
    """Two large flat surfaces, moved by 2 voxels of 1.5 mm: what is not a side of the slab is 3 mm away."""
    a, b = cube((20, 40, 40), (4, 10), (0, 40), (0, 40)), cube((20, 40, 40), (6, 12), (0, 40), (0, 40))
    assert surface_metrics(a, b, (1.5, 1, 1), 1.0)[1] == pytest.approx(3.0)
    assert surface_metrics(a, b, (3.0, 1, 1), 1.0)[1] == pytest.approx(6.0), "in mm, not in voxels"
    assert surface_metrics(a, b, (1.5, 1, 1), 2.9)[0] < 0.4 < 0.99 < surface_metrics(a, b, (1.5, 1, 1), 3.0)[0]


def test_hd95_lies_near_a_slow_reference():
    rng = np.random.default_rng(0)
    grid = np.stack(np.meshgrid(*[np.arange(24)] * 3, indexing="ij"))
    spacing = np.array([2.0, 1.0, 1.0])
    for _ in range(4):
        centres, radii = rng.uniform(9, 14, (2, 3)), rng.uniform(4, 8, (2, 3))
        a, b = (((grid - c.reshape(3, 1, 1, 1)) / r.reshape(3, 1, 1, 1)) ** 2 for c, r in zip(centres, radii))
        a, b = a.sum(0) < 1, b.sum(0) < 1
        points = [np.argwhere(m & ~_eroded(m)) * spacing for m in (a, b)]
        distance = np.linalg.norm(points[0][:, None] - points[1][None], axis=-1)
        slow = max(np.percentile(distance.min(1), 95), np.percentile(distance.min(0), 95))
        assert surface_metrics(a, b, spacing, 1.0)[1] == pytest.approx(slow, abs=1.0)


def _eroded(mask):
    out = mask.copy()
    for axis in range(3):
        for step in (-1, 1):
            out &= np.roll(mask, step, axis)
    return out


def test_a_slice_is_compared_in_its_plane():
    """Of a volume with one slice the faces above and below are no surface."""
    a, b = cube((30, 30), (5, 20), (5, 20)), cube((30, 30), (8, 23), (5, 20))
    flat = surface_metrics(a, b, (1, 1), 1.0)
    assert surface_metrics(a[None], b[None], (999, 1, 1), 1.0) == flat and flat[1] == pytest.approx(3.0)


@pytest.fixture
def model(tmp_path, tiny_plans, tiny_dataset_json):
    """Files of a fine-tuned model with two labels, and three cases with spacing (2, 1, 1)."""

    def make(labels=None):
        dataset_json = tiny_dataset_json()
        if labels:
            dataset_json.update(labels)
        (tmp_path / "dataset.json").write_text(json.dumps(dataset_json))
        (tmp_path / "plans.json").write_text(json.dumps(tiny_plans()))
        logging = {"mean_fg_dice": [np.float32(0.25), 0.5], "train_losses": [1.0, 0.5], "val_losses": [2.0]}
        logging |= {"epoch_start_timestamps": [100.0, 1000.0], "epoch_end_timestamps": [160.0, 1030.0]}
        content = {"logging": logging, "init_args": {"plans": {"nnssl": {"iterations": 7}}}}
        torch.save(content, tmp_path / "checkpoint_final.pth")
        cases = []
        for i in range(3):
            reference = np.zeros((10, 20, 20), np.uint8)
            reference[2:6, 4:12, 4:12] = 1
            if i != 1:
                reference[6:8, 14:18, 14:18] = 2
            guess = np.roll(reference, 1, 0) if i else reference.copy()
            if i == 2:
                guess[guess == 2] = 0
            paths = {}
            for what, array in (("reference", reference), ("prediction", guess)):
                image = sitk.GetImageFromArray(array)
                image.SetSpacing((1.0, 1.0, 2.0))
                (tmp_path / what).mkdir(exist_ok=True)
                paths[what] = str(tmp_path / what / f"case_{i}.nii.gz")
                sitk.WriteImage(image, paths[what])
            cases.append({"case": f"case_{i}", **paths})
        files = {k: str(tmp_path / f) for k, f in (("dataset_json", "dataset.json"), ("plans", "plans.json"))}
        files |= {"checkpoint": str(tmp_path / "checkpoint_final.pth"), "result": str(tmp_path / "r" / "out.json")}
        return {**files, "tolerance_mm": 1.0, "cases": cases}

    return make


def test_rows_are_nnunets_metrics_and_count_empty_references(model):
    from nnunetv2.evaluation.evaluate_predictions import compute_metrics
    from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

    spec = model()
    rows = evaluate_run(spec)["cases"]
    assert [(r["case"], r["label"]) for r in rows] == [
        (f"case_{i}", name) for i in range(3) for name in ("liver", "spleen")
    ]
    for case in spec["cases"]:
        theirs = compute_metrics(case["reference"], case["prediction"], SimpleITKIO(), [1, 2])["metrics"]
        for label, name in ((1, "liver"), (2, "spleen")):
            (row,) = (r for r in rows if r["case"] == case["case"] and r["label"] == name)
            assert row["dice"] == pytest.approx(theirs[label]["Dice"], nan_ok=True)
            assert (row["reference_voxels"], row["prediction_voxels"]) == (
                theirs[label]["n_ref"],
                theirs[label]["n_pred"],
            )
    by = {(r["case"], r["label"]): r for r in rows}
    assert by["case_0", "liver"]["dice"] == 1.0 and by["case_0", "liver"]["hd95"] == 0.0
    assert by["case_1", "liver"]["dice"] == pytest.approx(0.75) and by["case_1", "liver"]["hd95"] == pytest.approx(2.0)
    both_empty, missed = by["case_1", "spleen"], by["case_2", "spleen"]
    assert (
        math.isnan(both_empty["dice"])
        and math.isnan(both_empty["surface_dice"])
        and both_empty["reference_voxels"] == 0
    )
    assert missed["dice"] == 0.0 and missed["surface_dice"] == 0.0 and math.isnan(missed["hd95"])


def test_regions_and_the_ignore_label(model):
    spec = model({"labels": {"background": 0, "both": [1, 2], "spleen": 2, "ignore": 3}, "regions_class_order": [1, 2]})
    for case in spec["cases"]:
        image = sitk.ReadImage(case["reference"])
        array = sitk.GetArrayFromImage(image)
        array[6:] = 3
        ignored = sitk.GetImageFromArray(array)
        ignored.CopyInformation(image)
        sitk.WriteImage(ignored, case["reference"])
    found = evaluate_run(spec)
    assert found["labels"] == {"both": (1, 2), "spleen": (2,)}
    row = next(r for r in found["cases"] if (r["case"], r["label"]) == ("case_1", "both"))
    inside = 8 * 8
    assert (row["reference_voxels"], row["prediction_voxels"]) == (4 * inside, 3 * inside), (
        "ignored voxels count nowhere"
    )
    assert row["hd95"] == pytest.approx(2.0)


def test_the_training_curve_counts_only_the_time_of_epochs(model, tmp_path):
    model()
    first, second = training_curve(tmp_path / "checkpoint_final.pth")
    assert first == {"epoch": 0, "step": 7, "minutes": 1.0, "pseudo_dice": 0.25, "train_loss": 1.0, "val_loss": 2.0}
    assert (second["step"], second["minutes"]) == (14, 1.5) and math.isnan(second["val_loss"])


def test_the_command_writes_the_result_or_says_which_file_is_at_fault(model, tmp_path, capsys):
    spec = model()
    (tmp_path / "spec.json").write_text(json.dumps(spec))
    assert main([str(tmp_path / "spec.json")]) == 0
    assert len(json.loads((tmp_path / "r" / "out.json").read_text())["cases"]) == 6
    broken = tmp_path / "prediction" / "case_1.nii.gz"
    broken.write_bytes(broken.read_bytes()[:50])
    assert main([str(tmp_path / "spec.json")]) == 1
    assert "case case_1 cannot be evaluated" in capsys.readouterr().err
    assert drop_unreadable(tmp_path / "prediction") == ["case_1.nii.gz"] and not broken.exists()
    assert main([str(tmp_path / "spec.json")]) == 1
    assert "case case_1: the prediction" in capsys.readouterr().err
    assert drop_unreadable(tmp_path / "not there") == []


def test_without_the_library_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "surface_distance", None)
    with pytest.raises(NnsslError, match=r"pip install 'nnssl\[metrics\]'"):
        need_surface_library()
