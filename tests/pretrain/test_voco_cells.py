"""Crops of a window of cells: what each change does alone, which cells can be used and where random crops lie."""

import math

import pytest
import torch
import torch.nn.functional as F

from nnssl.intensity import gaussian_blur
from nnssl.losses.overlap import base_crops, overlap_labels
from nnssl.pretrain.augment.rng import StepRNG
from nnssl.pretrain.methods.voco.cells import (
    augment_intensity,
    draw_offsets,
    flip_and_turn,
    noise_to_all,
    noise_to_chosen,
    usable_cells,
)

ISOTROPIC = (1.0, 1.0, 1.0)


class Fixed(StepRNG):
    """Each number lies at three quarters of its range; of the chances only that number ``on`` comes true."""

    def __init__(self, on, total, turns=1):
        super().__init__(0, 0, total)
        self.on, self.turns, self.asked = on, turns, -1

    def uniform(self, low, high, *shape):
        return torch.full((self.count, *shape), low + 0.75 * (high - low))

    def integers(self, low, high, *shape):
        assert (low, high) == (1, 4)
        return torch.full((self.count, *shape), self.turns)

    def chance(self, p, *shape):
        self.asked += 1
        return torch.full((self.count, *shape), self.asked == self.on and p > 0)


def crops(size=(6, 8, 7), seed=0):
    return torch.rand(2, 3, 2, *size, generator=torch.Generator().manual_seed(seed)) * 1.6 - 0.3


UNIT = torch.tensor([0.0, 1.0]).expand(2, 2, 2)


def test_gamma_bends_the_range_and_keeps_what_lies_outside():
    x = torch.tensor([-0.2, 0.0, 0.25, 1.0, 1.3]).view(1, 1, 1, 5, 1, 1).expand(2, 3, 2, 5, 4, 4)
    exponent = math.exp(math.log(0.7) + 0.75 * (math.log(1.5) - math.log(0.7)))
    expected = torch.tensor([-0.2, 0.0, 0.25**exponent, 1.0, 1.3])
    out = augment_intensity(x, UNIT, Fixed(0, 2), ISOTROPIC, p=0.5)
    torch.testing.assert_close(out[1, 2, 1, :, 0, 0], expected, atol=1e-4, rtol=0)
    wide = torch.tensor([-2.0, 4.0]).expand(2, 2, 2)  # the same in units of another range
    torch.testing.assert_close(
        augment_intensity(6 * x - 2, wide, Fixed(0, 2), ISOTROPIC, p=0.5), 6 * out - 2, atol=1e-4, rtol=0
    )


@pytest.mark.parametrize("spacing", [ISOTROPIC, (3.0, 1.0, 1.0), (2.9, 1.0, 2.0)])
def test_blur_and_half_resolution_spare_coarse_axes(spacing):
    x, flat = crops(), crops().flatten(0, 1)
    fine = [s < 3.0 for s in spacing]
    sigma = torch.tensor([0.875 / s if f else 0.0 for s, f in zip(spacing, fine)]).expand(6, 3)
    torch.testing.assert_close(
        augment_intensity(x, UNIT, Fixed(1, 2), spacing, p=0.5).flatten(0, 1), gaussian_blur(flat, sigma, radius=3)
    )
    half = [n // 2 if f else n for n, f in zip(x.shape[3:], fine)]
    small = F.interpolate(flat, size=half, mode="nearest-exact")
    torch.testing.assert_close(
        augment_intensity(x, UNIT, Fixed(2, 2), spacing, p=0.5).flatten(0, 1),
        F.interpolate(small, size=x.shape[3:], mode="trilinear"),
    )
    assert torch.equal(augment_intensity(x, UNIT, Fixed(9, 2), spacing, p=0.5), x)


def test_short_axes_keep_their_resolution():
    x = crops((3, 4, 8))
    out = augment_intensity(x, UNIT, Fixed(2, 2), ISOTROPIC, p=0.5).flatten(0, 1)
    small = F.interpolate(x.flatten(0, 1), size=(3, 2, 4), mode="nearest-exact")
    torch.testing.assert_close(out, F.interpolate(small, size=(3, 4, 8), mode="trilinear"))


def test_noise_is_a_small_share_of_the_range():
    x, bounds = torch.zeros(2, 3, 2, 12, 14, 13), torch.tensor([-2.0, 4.0]).expand(2, 2, 2)
    noisy = augment_intensity(x, bounds, Fixed(3, 2), ISOTROPIC, p=0.5)
    assert float(noisy.std()) == pytest.approx(6 * 0.75 * 0.05, rel=0.03)
    assert len(noisy.flatten(2).std(2).unique()) == 6  # each crop its own


def test_noise_is_the_same_on_a_cpu_and_on_a_gpu_where_all_crops_get_it():
    """Crops of 2 x 4 x 4 x 4 voxels, so that single fields are the parts of the one of a volume; and none without its chance."""
    x, sd = torch.randn(2, 3, 2, 4, 4, 4), torch.tensor([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]])
    every = torch.ones(2, 3, dtype=torch.bool)
    one, all_ = (f(x.clone(), every, sd, StepRNG(0, 0, 2)) for f in (noise_to_chosen, noise_to_all))
    torch.testing.assert_close(one, all_)
    assert all_.shape == x.shape and not torch.equal(all_, x)
    some = torch.tensor([[False, True, False], [True, False, True]])
    for f in (noise_to_chosen, noise_to_all):
        noisy = f(x.clone(), some, sd, StepRNG(0, 0, 2))
        assert torch.equal((noisy != x).flatten(2).any(2), some)
        left = [float((noisy - x)[b, k].std() / sd[b, k]) for b, k in some.nonzero().tolist()]
        assert left == pytest.approx([1, 1, 1], abs=0.25)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_flips(axis):
    x = crops()
    out = flip_and_turn(x, Fixed(axis, 2), ISOTROPIC, mirror=0.5, rot90=0.0)
    assert torch.equal(out, x.flip(3 + axis))
    assert torch.equal(flip_and_turn(x, Fixed(9, 2), ISOTROPIC, mirror=0.5, rot90=0.5), x)


@pytest.mark.parametrize("turns", [1, 2, 3])
@pytest.mark.parametrize(
    ("size", "spacing", "plane"),
    [
        ((6, 6, 6), ISOTROPIC, (1, 2)),  # the last plane of equal axes
        ((6, 8, 8), (3.0, 1.0, 1.0), (1, 2)),
        ((6, 6, 8), ISOTROPIC, (0, 1)),
        ((6, 8, 6), ISOTROPIC, (0, 2)),
        ((6, 6, 8), (3.0, 1.0, 1.0), None),
        ((6, 8, 7), ISOTROPIC, None),
    ],
)
def test_quarter_turns_in_planes_of_equal_axes(size, spacing, plane, turns):
    x = crops(size)
    out = flip_and_turn(x, Fixed(3, 2, turns), spacing, mirror=0.5, rot90=0.5)
    assert torch.equal(out, x if plane is None else x.rot90(turns, [3 + a for a in plane]))
    assert torch.equal(flip_and_turn(x, Fixed(3, 2, turns), spacing, mirror=0.5, rot90=0.0), x)


def test_usable_cells_on_both_sides_of_each_limit():
    """Cells of 100 voxels, one a row: a quarter in the image, one in a hundred body, and not constant."""
    grid, window = (4, 1), (40, 10)
    base = torch.rand(1, 1, *window)
    everything = torch.ones(1, 1, *window, dtype=torch.bool)
    assert usable_cells(base, everything, everything, grid).tolist() == [[True] * 4]
    inside = everything.clone().view(1, 1, 4, 100)
    inside[..., 0, 25:], inside[..., 1, 24:] = False, False
    assert usable_cells(base, inside.view_as(everything), everything, grid).tolist() == [[True, False, True, True]]
    body = torch.zeros(1, 1, 4, 100, dtype=torch.bool)
    body[..., 2, 7] = True
    assert usable_cells(base, everything, body.view_as(everything), grid).tolist() == [[False, False, True, False]]
    body[:] = False
    body[..., 1, 30] = True  # body outside of the image is none
    assert not usable_cells(base, inside.view_as(everything), body.view_as(everything), grid).any()
    flat = base.repeat(1, 2, 1, 1)
    flat[:, :, 10:20] = 0.3
    flat[:, 1, 20:30] = 0.3  # one channel that differs is enough
    assert usable_cells(flat, everything, everything, grid).tolist() == [[True, False, True, True]]


def test_random_crops_lie_at_the_first_place_that_fits():
    """Against a loop over the places that the random numbers offer; half of the crop must lie in usable cells."""
    size, grid, n, batch = (4, 6), (3, 2), 5, 30
    usable = torch.rand(batch, 6, generator=torch.Generator().manual_seed(0)) < 0.4
    usable[0] = False
    offset, overlap, found = draw_offsets(StepRNG(0, 0, batch), size, grid, n, usable)
    share = StepRNG(0, 0, batch).uniform(0, 1, 16, n, 2)
    places = (share * (torch.tensor([2 * 4, 1 * 6]) + 1)).floor().long()
    assert places.amin((0, 1, 2)).tolist() == [0, 0] and places.amax((0, 1, 2)).tolist() == [8, 6]
    later = 0
    for b in range(batch):
        for k in range(n):
            labels = overlap_labels(places[b, :, k], size, grid) * usable[b]
            fits = [i for i, y in enumerate(labels) if float(y.sum()) >= 0.5]
            assert bool(found[b, k]) == bool(fits)
            if fits:
                assert offset[b, k].tolist() == places[b, fits[0], k].tolist()
                torch.testing.assert_close(overlap[b, k], labels[fits[0]] / labels[fits[0]].sum())
                later += fits[0] > 0
    assert later > 20 and not found[0].any() and found[usable.all(1)].all()
    assert base_crops(torch.zeros(1, 1, 12, 12), grid).shape == (1, 6, 1, 4, 6)


def test_crops_that_nothing_changes_are_themselves_and_changed_ones_leave_what_was_given():
    x = crops()
    kept = x.clone()
    off = {"mirror": 0.0, "rot90": 0.0}
    assert flip_and_turn(x, StepRNG(0, 0, 2), ISOTROPIC, **off).data_ptr() == x.data_ptr()
    assert torch.equal(flip_and_turn(x, StepRNG(0, 0, 2), ISOTROPIC, **off), kept)
    for name in off:
        changed = flip_and_turn(x, StepRNG(0, 0, 2), ISOTROPIC, **{**off, name: 1.0})
        assert torch.equal(x, kept) and (name == "rot90" or not torch.equal(changed, kept))  # no plane of equal axes
    changed = augment_intensity(x, UNIT, StepRNG(0, 0, 2), ISOTROPIC, p=1.0)
    assert torch.equal(x, kept) and not torch.equal(changed, kept)


def test_a_cell_of_little_contrast_counts():
    """Spread of 1e-5, in units of the image: that is no constant, which is left with a spread of rounding."""
    base = torch.full((1, 1, 4, 4), 0.5)
    base[:, :, 0, 0] += 1e-5
    base[:, :, 2, 2] += 1e-7
    everything = torch.ones(1, 1, 4, 4, dtype=torch.bool)
    assert usable_cells(base, everything, everything, (2, 2)).tolist() == [[True, False, False, False]]
