"""nnU-Net's training augmentation, batched: against nnU-Net's own transforms and torch's interpolation."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from batchgeneratorsv2.transforms.intensity.gamma import GammaTransform

from nnssl.intensity import gaussian_blur
from nnssl.plans import Plan
from nnssl.pretrain.augment import StepRNG, nnunet
from nnssl.pretrain.augment.spatial import warp

SIZE = (10, 14, 12)


def image(batch=3, channels=2, size=SIZE):
    return torch.randn(batch, channels, *size, generator=torch.Generator().manual_seed(4))


def figures(tiny_plans, tiny_dataset_json, size=SIZE, mirror=True, **kind):
    dim = len(size)
    plan = Plan.from_dicts(tiny_plans(dim, **kind), "3d_fullres" if dim == 3 else "2d", tiny_dataset_json())
    return nnunet.TrainingAugmentation.of(plan, size, mirror)


def test_low_resolution_equals_interpolation_sample_by_sample():
    x, scale = image(), torch.tensor([0.5, 0.73, 1.0])
    out = nnunet.low_resolution(x, scale)
    for i, s in enumerate(scale.tolist()):
        small = F.interpolate(x[i : i + 1], [round(n * s) for n in SIZE], mode="nearest-exact")
        expected = F.interpolate(small, SIZE, mode="trilinear", align_corners=False)
        torch.testing.assert_close(out[i : i + 1], expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(out[2], x[2])


def test_gamma_equals_nnunets():
    x, exponent = image(1), torch.tensor([[0.8, 1.4]])
    theirs = GammaTransform(
        gamma=(1, 1), p_invert_image=0, synchronize_channels=False, p_per_channel=1, p_retain_stats=1
    )
    parameters = {
        "apply_to_channel": torch.tensor([0, 1]),
        "retain_stats": torch.tensor([True, True]),
        "invert_image": torch.tensor([False, False]),
        "gamma": exponent[0],
    }
    expected = theirs._apply_to_image(x[0].clone(), **parameters)
    torch.testing.assert_close(nnunet.adjust_gamma(x, exponent)[0], expected, atol=1e-4, rtol=1e-4)


def test_contrast_stays_in_the_range_and_keeps_what_factor_one_is_given():
    x = image()
    out = nnunet.limit_contrast(x, torch.tensor([[1.0, 1.25], [0.75, 1.0], [2.0, 1.0]]))
    torch.testing.assert_close(out[0, 0], x[0, 0])
    assert float(out[2, 0].max()) <= float(x[2, 0].max())
    assert float(out[1, 0].std()) == pytest.approx(0.75 * float(x[1, 0].std()), rel=1e-3)


def test_image_and_label_move_by_one_map(tiny_plans, tiny_dataset_json):
    """A label map used as an image, moved as an image from the nearest voxel, is the moved label."""
    how = figures(tiny_plans, tiny_dataset_json)
    label = torch.randint(0, 4, (6, 1, *how.read_size), generator=torch.Generator().manual_seed(0))
    grid = nnunet.draw_grid(StepRNG(0, 0, 6), how, how.read_size)
    moved = nnunet.move_label(label, grid, outside=9)
    seen = warp(label.float() + 1, grid, "nearest")
    inside = seen > 0
    assert torch.equal(moved[inside], seen[inside].long() - 1)
    assert bool((moved[~inside] == 9).all())
    assert moved.shape == (6, 1, *SIZE)


def test_outside_of_the_window_and_minus_one_get_the_label_asked_for(tiny_plans, tiny_dataset_json):
    how = figures(tiny_plans, tiny_dataset_json, mirror=False)
    label = torch.full((2, 1, *SIZE), -1)
    label[:, :, 5:] = 3
    assert set(nnunet.middle_label(label, SIZE, 0).unique().tolist()) == {0, 3}
    far = nnunet.draw_grid(StepRNG(0, 0, 2), how, SIZE) + 5
    assert bool((nnunet.move_label(label, far, outside=7) == 7).all())


@pytest.mark.parametrize("change", [nnunet.augment_intensity, nnunet.augment_strongly])
@pytest.mark.parametrize("masked", [(), (1,)])
def test_alter_is_a_pure_function_and_keeps_masked_voxels(change, masked):
    x = image(8)
    x[:, :, :, :4] = 0
    out = change(x, StepRNG(3, 5, 8), masked)
    assert torch.equal(out, change(x, StepRNG(3, 5, 8), masked))
    halves = torch.cat([change(x[i : i + 4], StepRNG(3, 5, 8, i, 4), masked) for i in (0, 4)])
    torch.testing.assert_close(out, halves, atol=1e-6, rtol=1e-5)
    assert bool(out.isfinite().all())
    changed = (out != x).flatten(1).any(1)
    assert int(changed.sum()) > 0
    if masked:
        assert float(out[:, 1, :, :4].abs().max()) == 0
    else:
        assert float(out[:, :, :, :4].abs().max()) > 0


def test_half_of_each_skewed_number_is_below_one():
    numbers = nnunet._skewed(StepRNG(0, 0, 4000), 0.7, 1.5)
    assert 0.7 <= float(numbers.min()) < float(numbers.max()) < 1.5
    assert float((numbers < 1).float().mean()) == pytest.approx(0.5, abs=0.05)


def test_rotation_follows_nnunet(tiny_plans, tiny_dataset_json):
    """Free in isotropic patches, in the plane where they are flat, 15 degrees in long slices."""
    assert figures(tiny_plans, tiny_dataset_json).rotation == (30.0, 30.0, 30.0)
    assert figures(tiny_plans, tiny_dataset_json, (8, 32, 32)).rotation == (180.0, 0.0, 0.0)
    assert figures(tiny_plans, tiny_dataset_json, (8, 32, 32)).read_size[0] < 2 * 8
    assert figures(tiny_plans, tiny_dataset_json, (16, 32)).rotation == (15.0,)
    assert figures(tiny_plans, tiny_dataset_json, (16, 20)).rotation == (180.0,)
    assert figures(tiny_plans, tiny_dataset_json, mirror=False).mirror_axes == ()


def test_constant_patches_stay_finite():
    out = nnunet.augment_intensity(torch.zeros(64, 1, 4, 6, 5), StepRNG(0, 1, 64))
    assert bool(out.isfinite().all())


def test_forks_differ_and_are_repeated():
    a, b = StepRNG(1, 2, 4), StepRNG(1, 2, 4)
    first, second = a.fork(6).uniform(0, 1, 3), a.fork(6).uniform(0, 1, 3)
    assert not np.allclose(first, second)
    assert torch.equal(first, b.fork(6).uniform(0, 1, 3))
    assert torch.equal(b.fork(6, 2, 3).uniform(0, 1, 3), second[2:5])


class Fixed(StepRNG):
    """Random numbers of which each number lies at three quarters of its range, and of whose chances ``on`` alone comes true.

    Chances of one half are told by ``below`` and are not counted: they choose channels and sides.
    """

    def __init__(self, on, below, total):
        super().__init__(0, 0, total)
        self.on, self.below, self.asked = on, below, 0

    def uniform(self, low, high, *shape):
        return torch.full((self.count, *shape), low + 0.75 * (high - low))

    def chance(self, p, *shape):
        if p != 0.5:
            self.asked += 1
        true = self.below if p == 0.5 else self.asked - 1 == self.on
        return torch.full((self.count, *shape), true)


def test_each_change_alone():
    """In nnU-Net's order, by its formula; numbers of the lower and of the upper side of 1."""
    x, scale = image(2), torch.full((2,), 0.875)
    low, high = torch.full((2, 2), 0.75 + 0.75 * 0.25), torch.full((2, 2), 1 + 0.75 * 0.25)
    soft, hard = torch.full((2, 2), 0.7 + 0.75 * 0.3), torch.full((2, 2), 1 + 0.75 * 0.5)
    column = (..., None, None, None)

    def alone(on, below):
        return nnunet.augment_intensity(x, Fixed(on, below, 2))

    noisy = nnunet.augment_intensity(torch.zeros(2, 2, 20, 24, 18), Fixed(0, True, 2))
    assert float(noisy.std()) == pytest.approx(0.075, rel=0.03)  # three quarters of 0.1
    expected = {
        (1, True): gaussian_blur(x, torch.full((2, 3), 0.875), radius=3),
        (1, False): x,  # no channel is chosen
        (2, True): x * low[column],
        (2, False): x * high[column],
        (3, True): nnunet.limit_contrast(x, low),
        (3, False): nnunet.limit_contrast(x, high),
        (4, True): nnunet.low_resolution(x, scale),
        (5, True): -nnunet.adjust_gamma(-x, soft),
        (5, False): -nnunet.adjust_gamma(-x, hard),
        (6, True): nnunet.adjust_gamma(x, soft),
        (6, False): nnunet.adjust_gamma(x, hard),
        (7, True): x,
    }
    for (on, below), want in expected.items():
        torch.testing.assert_close(alone(on, below), want, msg=str((on, below)))
        assert torch.equal(want, x) == ((on, below) in ((1, False), (7, True)))
    assert not torch.allclose(alone(5, True), alone(6, True))


def test_each_strong_change_alone():
    """Three quarters of each range: noise of 0.225 x strength, a factor of 1.15, an exponent of 1.3."""
    x = image(2)
    for strength in (1.0, 2.0):
        noisy = nnunet.augment_strongly(torch.zeros(2, 2, 20, 24, 18), Fixed(0, True, 2), strength=strength)
        assert float(noisy.std()) == pytest.approx(0.225 * strength, rel=0.03)
    torch.testing.assert_close(nnunet.augment_strongly(x, Fixed(1, True, 2)), 1.15 * x)
    added = nnunet.augment_strongly(x, Fixed(2, True, 2)) - x
    assert float(added.flatten(2).std(-1).max()) < 1e-5 and float(added.abs().max()) > 0  # one number for a channel
    exponent = torch.full((2, 2), 0.7 + 0.75 * 0.8)
    torch.testing.assert_close(nnunet.augment_strongly(x, Fixed(3, True, 2)), nnunet.adjust_gamma(x, exponent))
    assert torch.equal(nnunet.augment_strongly(x, Fixed(4, True, 2)), x)
    shifts = nnunet.augment_strongly(torch.zeros(4000, 1, 1, 1, 2), _Only(2, 4000))[:, 0, 0, 0, 0]
    assert float(shifts.std()) == pytest.approx(0.17, rel=0.05)


class _Only(StepRNG):
    """Random numbers of which one chance alone comes true."""

    def __init__(self, on, total):
        super().__init__(0, 0, total)
        self.on, self.asked = on, 0

    def chance(self, p, *shape):
        assert p == pytest.approx(0.3)
        self.asked += 1
        return torch.full((self.count, *shape), self.asked - 1 == self.on)


def test_how_often_each_change_happens():
    """Shares of samples, by nnU-Net's probabilities."""
    asked = []

    class Counted(StepRNG):
        def chance(self, p, *shape):
            asked.append(p)
            return super().chance(p, *shape)

    nnunet.augment_intensity(image(2), Counted(0, 0, 2))
    assert [p for p in asked if p != 0.5] == [0.1, 0.2, 0.15, 0.15, 0.25, 0.1, 0.3]
