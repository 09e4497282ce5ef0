"""Positions come from the geometry: the same landmark has the same position however the image is stored (MACL T16)."""

from __future__ import annotations

import logging
from itertools import permutations, product

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from nnunetv2.imageio.nibabel_reader_writer import NibabelIO, NibabelIOWithReorient
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO, SimpleITKIOWithReorient
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnssl.pretrain.data.orientation import Geometry, _warn_without_directions, direction_matrix, patient_axes

LANDMARK = np.array([0.3, 0.65, 0.4])  # share of the image to the left, to posterior, to superior
EXTENT = np.array([40.0, 66.0, 52.0])  # mm along the same axes


def stored(order, signs, spacing):
    """A blob at LANDMARK in an image whose index axis j runs along patient axis order[j], backwards where signs[j] < 0."""
    n = [round(EXTENT[order[j]] / spacing[j]) for j in range(3)]
    share = [(np.arange(n[j]) + 0.5) / n[j] for j in range(3)]
    share = [s if sign > 0 else 1 - s for s, sign in zip(share, signs)]
    grid = np.meshgrid(*share, indexing="ij")  # index axes x, y, z
    r2 = sum(((g - LANDMARK[p]) * EXTENT[p]) ** 2 for g, p in zip(grid, order))
    inside = np.logical_and.reduce([(g > 0.12) & (g < 0.93) for g in grid])  # zero margins are cropped, unevenly
    values = (10 + 100 * np.exp(-r2 / (2 * 5.0**2))) * inside
    direction = np.zeros((3, 3))
    direction[order, range(3)] = signs
    return values.astype(np.float32), direction


def write(path, values, direction, spacing, tilt=None):
    image = sitk.GetImageFromArray(np.ascontiguousarray(values.T))
    image.SetSpacing([float(s) for s in spacing])
    image.SetDirection((direction if tilt is None else tilt @ direction).ravel().tolist())
    sitk.WriteImage(image, str(path))


def found_position(path, reader, plans):
    manager = PlansManager(plans)
    data, properties = reader().read_images([str(path)])
    data, _, properties = DefaultPreprocessor(verbose=False).run_case_npy(
        data, None, properties, manager, manager.get_configuration("3d_fullres"), {}
    )
    geometry = Geometry.from_properties(properties, data.shape[1:], manager.transpose_forward, "Dataset001_X")
    weight = np.clip(data[0] - data[0].max() + 1.5, 0, None) ** 2
    centre = [float((weight.sum(tuple(b for b in range(3) if b != a)) * np.arange(n)).sum() / weight.sum())
              for a, n in enumerate(weight.shape)]  # fmt: skip
    along = geometry.axis_position(centre, (1, 1, 1))
    assert properties["shape_before_cropping"] != properties["shape_after_cropping_and_before_resampling"]
    return geometry.position(along), geometry


@pytest.mark.parametrize("reader", [SimpleITKIO, SimpleITKIOWithReorient, NibabelIO, NibabelIOWithReorient])
@pytest.mark.parametrize("transpose", [(0, 1, 2), (1, 2, 0), (2, 0, 1)])
@pytest.mark.parametrize(
    ("order", "signs", "spacing"),
    [
        ((0, 1, 2), (1, 1, 1), (1.0, 1.0, 1.0)),
        ((0, 1, 2), (1, 1, -1), (1.0, 1.0, 2.0)),  # flipped z, thick slices
        ((0, 1, 2), (-1, -1, 1), (1.5, 1.0, 1.0)),  # RAS
        ((2, 0, 1), (1, -1, 1), (1.0, 2.0, 1.5)),  # coronal storage
    ],
)
def test_landmark_keeps_its_position(tmp_path, tiny_plans, reader, transpose, order, signs, spacing):
    values, direction = stored(list(order), signs, spacing)
    write(tmp_path / "case_0000.nii.gz", values, direction, spacing)
    plans = tiny_plans(transpose_forward=transpose, spacing=(1.3, 1.1, 1.2))
    position, geometry = found_position(tmp_path / "case_0000.nii.gz", reader, plans)
    half_voxel = 0.5 * max(spacing) / EXTENT
    assert np.all(np.abs(position - LANDMARK) < half_voxel + 1e-6), (position, LANDMARK)
    assert sorted(geometry.axes) == [0, 1, 2]


def test_oblique_image_takes_the_nearest_axes(tmp_path, tiny_plans):
    angle = np.deg2rad(25)
    tilt = np.array([[1, 0, 0], [0, np.cos(angle), -np.sin(angle)], [0, np.sin(angle), np.cos(angle)]])
    values, direction = stored([1, 2, 0], (-1, 1, 1), (1.0, 1.0, 1.0))
    write(tmp_path / "case_0000.nii.gz", values, direction, (1.0, 1.0, 1.0), tilt)
    for reader in (SimpleITKIO, NibabelIO):
        position, _ = found_position(tmp_path / "case_0000.nii.gz", reader, tiny_plans())
        assert np.all(np.abs(position - LANDMARK) < 0.02)


def test_assignment_is_a_permutation_for_any_directions():
    for order, signs in product(permutations(range(3)), product((1, -1), repeat=3)):
        matrix = np.zeros((3, 3))
        matrix[list(order), range(3)] = signs
        axes, flips = patient_axes(matrix, (0, 1, 2))
        for patient in range(3):
            column = 2 - axes[patient]
            assert order[column] == patient and flips[patient] == (signs[column] < 0)
    worst = np.full((3, 3), 1 / np.sqrt(3))
    assert sorted(patient_axes(worst, (2, 0, 1))[0]) == [0, 1, 2]


def test_positions_by_hand():
    # 20 voxels of which 4..16 were kept and resampled to 24: a window of 6 from 3 has its centre at 4 + 6 / 24 * 12 = 7 of 20.
    geometry = Geometry((24, 10, 1), (4, 0, 0), (12, 10, 1), (20, 10, 5), (2, 1, 0), (False, True, False))
    along = geometry.axis_position((3, 0, 0), (6, 4, 1))
    assert along == pytest.approx([7 / 20, 2 / 10, 0.5 / 5])
    assert geometry.position(along) == pytest.approx([0.1, 1 - 0.2, 0.35])


def test_positions_increase_with_the_index_and_stay_inside():
    geometry = Geometry((30, 20, 10), (1, 2, 3), (15, 20, 20), (17, 25, 40), (2, 1, 0), (False, False, True))
    z = np.array([geometry.axis_position((i, 0, 0), (1, 1, 1)) for i in range(30)])
    assert np.all(np.diff(z[:, 0]) > 0) and np.all((z > 0) & (z < 1))
    flipped = np.array([geometry.position(p) for p in z])
    assert np.all(np.diff(flipped[:, 2]) < 0)


def test_2d_image_lies_in_the_axial_plane():
    matrix = direction_matrix({"sitk_stuff": {"direction": (0.0, -1.0, 1.0, 0.0)}})
    assert patient_axes(matrix, (0, 1, 2)) == ((1, 2, 0), (True, False, False))


def test_nibabel_and_itk_agree_on_a_file(tmp_path):
    affine = np.array([[0, 0, -2.0, 5], [-1.0, 0, 0, 3], [0, 1.5, 0, 1], [0, 0, 0, 1]])
    nibabel.save(nibabel.Nifti1Image(np.ones((4, 5, 6), np.float32), affine), tmp_path / "a_0000.nii.gz")
    found = [
        patient_axes(direction_matrix(reader().read_images([str(tmp_path / "a_0000.nii.gz")])[1]), (0, 1, 2))
        for reader in (SimpleITKIO, NibabelIO)
    ]
    assert found[0] == found[1]


def test_reader_without_directions_warns_once(caplog):
    properties = {
        "spacing": (999, 1, 1),
        "bbox_used_for_cropping": [[0, 1], [0, 8], [2, 8]],
        "shape_before_cropping": (1, 8, 8),
        "shape_after_cropping_and_before_resampling": (1, 8, 6),
    }
    _warn_without_directions.cache_clear()
    with caplog.at_level(logging.WARNING, logger="nnssl"):
        for _ in range(3):
            geometry = Geometry.from_properties(properties, (1, 8, 6), (0, 1, 2), "Dataset009_Png")
    assert len(caplog.records) == 1 and "Dataset009_Png" in caplog.text
    assert geometry.axes == (2, 1, 0) and geometry.flips == (False, False, False)
