"""Cases in one orientation, windows inside the image, and whole cases in a window."""

import itertools
import logging

import numpy as np
import pytest
import SimpleITK as sitk
import torch

from nnssl.plans import load_plan
from nnssl.pretrain.data import CaseFormat, CaseReader, SampleStream, make_loader
from nnssl.pretrain.data.orientation import Geometry
from nnssl.pretrain.data.reorientation import AxisTransform, Orientation, common_orientation
from nnssl.pretrain.data.resample import foreground_box, resample_box, resampling_matrix
from nnssl.pretrain.methods import CropRequest
from nnssl.pretrain.prepare import prepare_sources

SHAPE = (12, 16, 20)
MM = (1.0, 1.0, 1.0)


@pytest.mark.parametrize("axes", list(itertools.permutations(range(3))))
def test_a_turned_box_is_a_box_of_the_turned_array(axes):
    array = np.arange(2 * np.prod(SHAPE)).reshape(2, *SHAPE)
    for flips in itertools.product((False, True), repeat=3):
        transform = AxisTransform(axes, flips)
        turned = transform(array)
        assert list(turned.shape[1:]) == transform.shape(SHAPE)
        start, window = (1, 2, 3), (4, 5, 6)
        at, extent = transform.box(start, window, SHAPE)
        assert extent == transform.array_order(window)
        box = array[(slice(None), *[slice(a, a + e) for a, e in zip(at, extent)])]
        assert np.array_equal(transform(box), turned[:, 1:5, 2:7, 3:9])
        centre = (np.asarray(at) + np.asarray(extent) / 2) / SHAPE
        expected = (np.asarray(start) + np.asarray(window) / 2) / transform.shape(SHAPE)
        np.testing.assert_allclose(transform.position(centre), expected)


def geometry(axes, flips, shape=SHAPE):
    return Geometry(shape, (0, 0, 0), shape, shape, axes, flips)


def test_every_orientation_becomes_the_common_one():
    """Of a volume whose voxels are their patient coordinates, stored in all 48 ways."""
    patient = np.stack(np.meshgrid(*[np.arange(n) for n in (5, 6, 7)], indexing="ij"))  # (R-L, A-P, I-S) coordinates
    common = Orientation((2, 1, 0), (False, True, False), MM)

    def stored(axes, flips):
        order = np.argsort(axes)  # patient axis of each array axis
        x = patient.transpose(0, *(1 + order))
        return np.flip(x, [1 + axes[p] for p in range(3) if flips[p]])

    reference = stored(common.axes, common.flips)
    for axes in itertools.permutations(range(3)):
        for flips in itertools.product((False, True), repeat=3):
            x = stored(axes, flips)
            transform = common.transform(geometry(axes, flips, x.shape[1:]))
            assert np.array_equal(transform(x), reference)
    assert common.transform(geometry(common.axes, common.flips)) == AxisTransform()


def test_axes_of_other_spacing_stay():
    """An axial and a coronal case with thick first axes: flipped to the same directions, not permuted."""
    common = Orientation((2, 1, 0), (False, False, False), (5.0, 1.0, 1.0))
    coronal = geometry((2, 0, 1), (False, False, True))
    transform = common.transform(coronal)
    assert transform == AxisTransform((0, 1, 2), (False, True, False))
    swapped = geometry((1, 2, 0), (True, False, False))  # the two thin axes may change places
    assert common.transform(swapped) == AxisTransform((0, 2, 1), (False, False, True))
    flat = Orientation((2, 1, 0), (False, False, False), (0.0, 1.0, 1.0))
    assert flat.transform(coronal).axes == (0, 1, 2)
    assert str(common) == "inferior to superior, anterior to posterior, right to left"


@pytest.fixture
def mixed(tiny_preprocessed, tiny_raw_dataset):
    """Five cases of one patient; the last one is stored from left to right and from superior to inferior."""
    folder = tiny_raw_dataset(901, "Tiny", 5, shape=SHAPE)
    first = sitk.ReadImage(str(folder / "imagesTr" / "case_000_0000.nii.gz"))
    for i in range(5):
        image = sitk.Flip(first, [True, False, True]) if i == 4 else first
        sitk.WriteImage(image, str(folder / "imagesTr" / f"case_{i:03d}_0000.nii.gz"))
    tiny_preprocessed(902, "Other", 1, shape=SHAPE)
    plan = load_plan(902)
    return prepare_sources(plan, ["Dataset901_Tiny"], held_out=0.0, n_processes=1), plan


def crops_of(data, *, steps=4, batch=5, **request):
    pool, plan = data
    request = CropRequest(**{"size": (4, 4, 4), "read_size": (8, 12, 8), **request})
    return list(make_loader(pool, plan, request, SampleStream(3, batch), range(steps)))


def test_loader_turns_the_odd_case(mixed, caplog):
    """The same place of the patient shows the same voxels, in whichever way the case is stored."""
    with caplog.at_level(logging.INFO, logger="nnssl"):
        turned = crops_of(mixed, read_size=SHAPE, sampling="inside", reorient=True, steps=1)[0]
    assert any("4 of 5 images run inferior to superior" in r.message for r in caplog.records)
    plain = crops_of(mixed, read_size=SHAPE, sampling="inside", steps=1)[0]
    odd = turned.case.index("case_004")
    others = [i for i in range(5) if i != odd]
    for i in others:
        assert torch.equal(turned.data[i], plain.data[i])
        torch.testing.assert_close(turned.data[odd], turned.data[i], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(plain.data[odd], plain.data[others[0]], atol=0.1)
    torch.testing.assert_close(plain.data[odd], turned.data[odd].flip(1, 3))


def test_turned_crops_tell_where_they_are(mixed):
    """Positions in the patient do not change by turning; those along the array's axes, and the start, are the turned array's."""
    for crops in crops_of(mixed, sampling="inside", reorient=True):
        for i in range(5):
            start, shape = crops.start[i], crops.shape[i]
            assert bool((start >= 0).all()) and bool((start + torch.tensor([8, 12, 8]) <= shape).all())
            along = (start + torch.tensor([4.0, 6.0, 4.0])) / shape
            torch.testing.assert_close(crops.axis_position[i], along.double(), atol=0.08, rtol=0)
            torch.testing.assert_close(crops.position[i], crops.axis_position[i].flip(0))  # z, y, x are I-S, A-P, R-L
    assert crops.source == ["Dataset901_Tiny"] * 5


def test_windows_inside(mixed):
    """No padding where the window fits; in the middle where it does not."""
    for crops in crops_of(mixed, sampling="inside", read_size=(8, 12, 28)):
        assert crops.start[:, 2].tolist() == [(s - 28) // 2 for s in crops.shape[:, 2].tolist()]
        assert bool((crops.start[:, :2] >= 0).all())
        assert bool((crops.start[:, 0] + 8 <= crops.shape[:, 0]).all())
    starts = torch.cat([c.start for c in crops_of(mixed, sampling="inside")])
    assert starts[:, 0].min() == 0 and starts[:, 0].max() == int(crops.shape[0, 0]) - 8
    roaming = torch.cat([c.start for c in crops_of(mixed, read_size=(8, 12, 28))])
    assert len(roaming[:, 2].unique()) > 1


# ---- whole cases in a window -----------------------------------------------------------------------------------------


def test_resampling_matrix():
    for n, size in ((7, 7), (8, 4), (5, 12), (20, 3), (1, 4)):
        m = resampling_matrix(n, size)
        np.testing.assert_allclose(m.sum(1), 1, rtol=1e-6)
        if n == size:
            np.testing.assert_array_equal(m, np.eye(n, dtype=np.float32))
    ramp = resampling_matrix(64, 16) @ np.arange(64)
    np.testing.assert_allclose(ramp[1:-1], (np.arange(16) * 4 + 1.5)[1:-1], rtol=1e-5)  # edge to edge
    expected = torch.nn.functional.interpolate(torch.arange(6.0)[None, None], size=15, mode="linear")[0, 0]
    np.testing.assert_allclose(resampling_matrix(6, 15) @ np.arange(6.0), expected, rtol=1e-5)


def test_resample_box_in_slabs(monkeypatch):
    """Slab by slab gives what all at once gives, and the middle keeps a smooth image's values."""
    from nnssl.pretrain.data import resample

    rng = np.random.default_rng(0)
    array = rng.normal(size=(2, 13, 11, 9)).astype(np.float32)
    box, size = [(1, 12), (2, 11), (0, 8)], (5, 6, 16)
    whole = resample_box(array, box, size)
    monkeypatch.setattr(resample, "SLAB", 2 * 11 * 9 * 2)
    np.testing.assert_allclose(resample_box(array, box, size), whole, atol=1e-5)
    z, y, x = (resampling_matrix(high - low, n) for (low, high), n in zip(box, size))
    slow = np.einsum("zZ,yY,xX,cZYX->czyx", z, y, x, array[:, 1:12, 2:11, 0:8])
    np.testing.assert_allclose(whole, slow, atol=1e-5)


def test_foreground_box(monkeypatch):
    """Single bright voxels do not count; without any body it is the whole image."""
    from nnssl.pretrain.data import resample

    monkeypatch.setattr(resample, "SLAB", 2 * 20 * 9 * 4)
    image = np.full((2, 13, 20, 9), -1, np.float32)
    image[0, 3:9, 4:7, 2:8] = image[1, 3:9, 4:8, 2:8] = 1
    image[0, 12, 19, 0] = 1
    threshold = np.zeros(2, np.float32)
    assert foreground_box(image, threshold, masked=False) == [(3, 9), (4, 8), (2, 8)]
    assert foreground_box(image - 3, threshold, masked=False) == [(0, 13), (0, 20), (0, 9)]


def test_loader_delivers_whole_cases(mixed):
    """Each case fills the window, turned as the others, at the middle of its foreground, the same each time."""
    first, second = crops_of(mixed, read_size=(8, 8, 12), sampling="whole", reorient=True, steps=2)
    assert first.data.shape == (5, 1, 8, 8, 12) and first.shape.tolist() == [[8, 8, 12]] * 5
    assert bool((first.start == 0).all()) and float(first.body.float().mean()) > 0.3
    for i in range(5):
        torch.testing.assert_close(first.data[i], first.data[0], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(first.position[i], first.position[0])
    order = [second.case.index(c) for c in first.case]
    assert torch.equal(first.data, second.data[order])
    torch.testing.assert_close(first.position[0], torch.full((3,), 0.5, dtype=torch.float64), atol=0.1, rtol=0)


def test_flat_plans_get_whole_slices(tiny_preprocessed):
    tiny_preprocessed(901, "Tiny", 4, dim=2, shape=SHAPE)
    plan = load_plan(901, "2d")
    data = prepare_sources(plan, ["Dataset901_Tiny"], held_out=0.0, n_processes=1), plan
    crops = crops_of(data, size=(4, 4), read_size=(8, 12), sampling="whole", reorient=True, batch=4)
    assert crops[0].data.shape == (4, 1, 8, 12) and crops[0].shape.tolist() == [[1, 8, 12]] * 4
    heights = torch.cat([c.position[:, 2] for c in crops])
    assert len(heights.unique()) > 4


def test_common_orientation_is_the_most_frequent(mixed):
    pool, plan = mixed
    reader = CaseReader(CaseFormat.from_plan(plan))
    assert common_orientation(pool.cases, reader, plan.spacing).flips == (False, False, False)
    odd = [r for r in pool.cases if r.name == "case_004"]
    assert common_orientation(odd * 3 + pool.cases[:1], reader, plan.spacing).flips == (True, False, True)
