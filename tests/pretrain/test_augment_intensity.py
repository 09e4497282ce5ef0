"""Brightness, contrast and blur."""

from types import SimpleNamespace

import pytest
import torch

from nnssl import intensity
from nnssl.intensity import (
    adjust_contrast,
    bend,
    gaussian_blur,
    limit_contrast,
    low_resolution,
    multiply,
    resample,
    rescale_intensity,
    restore_intensity,
    where_chosen,
)
from nnssl.pretrain.augment import StepRNG, random_jitter
from nnssl.pretrain.augment.intensity import unit_range


def test_units_and_back():
    x = torch.randn(2, 3, 4, 5)
    intensity = torch.tensor([[-1.0, 3.0], [0.0, 0.5], [2.0, 2.0]]).expand(2, 3, 2)
    unit = rescale_intensity(x, intensity)
    assert torch.allclose(unit[:, 0], (x[:, 0] + 1) / 4)
    assert torch.allclose(unit[:, 2], x[:, 2] - 2)  # a channel without a range
    assert torch.allclose(restore_intensity(unit, intensity), x, atol=1e-6)


def test_brightness_and_contrast_by_hand():
    x = torch.tensor([[[1.0, 3.0]], [[2.0, 6.0]]])
    assert multiply(x, torch.tensor([2.0, 0.5])).flatten().tolist() == [2, 6, 1, 3]
    assert adjust_contrast(x, torch.tensor([2.0, 0.5])).flatten().tolist() == [0, 4, 3, 5]


@pytest.mark.parametrize("shape", [(12, 17), (9, 12, 17)])
def test_blur_equals_scipy(shape):
    from scipy.ndimage import gaussian_filter

    x = torch.randn(2, 2, *shape)
    sigma = torch.tensor([0.7, 1.3])
    blurred = gaussian_blur(x, sigma)
    for b in range(2):
        for c in range(2):
            expected = gaussian_filter(x[b, c].numpy(), float(sigma[b]), mode="nearest", radius=4)
            assert torch.allclose(blurred[b, c], torch.from_numpy(expected), atol=1e-5)


def test_blur_per_axis():
    x = torch.zeros(1, 1, 9, 9)
    x[..., 4, 4] = 1
    blurred = gaussian_blur(x, torch.tensor([[0.0, 1.0]]), radius=3)
    assert torch.allclose(blurred.sum(3)[0, 0], x.sum(3)[0, 0], atol=1e-5)
    assert float(blurred[0, 0, 4, 4]) < 0.5
    assert float(blurred.sum()) == pytest.approx(1, abs=1e-5)


def test_a_wide_kernel_on_a_short_axis():
    """The edge is repeated as often as the kernel asks for, also where it reaches over the whole axis."""
    from scipy.ndimage import gaussian_filter

    x = torch.randn(1, 1, 3, 2, 5)
    expected = gaussian_filter(x[0, 0].numpy(), 2.0, mode="nearest", radius=6)
    assert torch.allclose(gaussian_blur(x, torch.tensor([2.0]))[0, 0], torch.from_numpy(expected), atol=1e-5)


def test_only_what_is_chosen_is_changed():
    x, seen = torch.arange(6.0).view(3, 1, 2), []

    def change(rows):
        seen.append(rows)
        return -x[rows]

    out = where_chosen(x, torch.tensor([True, False, True]), change)
    assert out.flatten().tolist() == [0, -1, 2, 3, -4, -5] and x.flatten().tolist() == [0, 1, 2, 3, 4, 5]
    assert seen[0].tolist() == [0, 2]
    assert where_chosen(x, torch.zeros(3, dtype=torch.bool), change) is x and len(seen) == 1


def test_jitter():
    x, intensity = torch.randn(3, 2, 6, 7, 8), torch.tensor([-2.0, 2.0]).expand(3, 2, 2)
    same = random_jitter(x, intensity, StepRNG(0, 0, 3))
    assert torch.allclose(same, x, atol=1e-5) and same.data_ptr() != x.data_ptr()
    assert torch.allclose(random_jitter(x.clone(), None, StepRNG(0, 0, 3)), x, atol=1e-5)
    ranges = {"brightness": (0.5, 0.9), "contrast": (0.8, 1.2), "sigma": (1.0, 3.0)}
    once, again, other = (random_jitter(x, intensity, StepRNG(0, s, 3), **ranges) for s in (1, 1, 2))
    assert torch.equal(once, again) and not torch.allclose(once, other)
    assert torch.isfinite(once).all() and once.std() < x.std()
    dark = random_jitter(x, intensity, StepRNG(0, 0, 3), brightness=(0.5, 0.5))
    assert torch.allclose(dark, (x + 2) / 2 - 2, atol=1e-5)


@pytest.mark.parametrize("size", [(40, 47, 33), (50, 36)])
def test_a_blur_in_blocks_is_the_whole_blur(size, monkeypatch):
    x, sigma = torch.randn(2, 3, *size), torch.rand(2, len(size)) + 0.4
    blocks = gaussian_blur(x, sigma, radius=4)
    monkeypatch.setattr(intensity, "BLUR_BLOCK", 10**6)
    assert torch.allclose(blocks, gaussian_blur(x, sigma, radius=4), atol=1e-6)


def test_a_bend_is_a_power_within_the_range_and_a_shift_outside():
    u = torch.tensor([[[-0.5, 0.0, 0.25, 1.0, 2.0]], [[-0.5, 0.0, 0.25, 1.0, 2.0]]])
    out = bend(u, torch.tensor([2.0, 0.5]))
    assert out.flatten().tolist() == [-0.5, 0, 0.0625, 1, 2, -0.5, 0, 0.5, 1, 2]
    lifted = bend(u, torch.tensor([2.0, 0.5]), floor=0.01)[1, 0, :3]
    assert lifted.tolist() == pytest.approx([-0.4, 0.1, 0.5])
    shifted = bend(u, torch.tensor([2.0, 0.5]), low=0.01)[1, 0, :3]
    assert shifted.tolist() == pytest.approx([-0.41, 0.09, 0.5])


def test_one_resolution_for_all_equals_one_for_each_sample():
    x = torch.randn(2, 3, 9, 12, 7)
    coarse = resample(x, (4, 6, 4))  # halves: 4.5 and 3.5 are rounded to the even number
    torch.testing.assert_close(low_resolution(x, torch.tensor([0.5, 0.5])), coarse)
    assert torch.equal(resample(x, x.shape[2:]), x)


@pytest.mark.parametrize("size", [(9, 12, 7), (9, 12)])
@pytest.mark.parametrize("scale", [0.3, 0.5, 0.73, 0.9, 1.0, 1.3])
def test_a_lower_resolution_of_any_size_equals_resampling(size, scale):
    """To at least one voxel and at most as many as there are; also of an axis that has one voxel."""
    for shape in (size, (1, *size[1:])):
        x = torch.randn(2, 3, *shape)
        coarse = [min(n, max(1, round(scale * n))) for n in shape]
        torch.testing.assert_close(low_resolution(x, torch.tensor([scale, scale])), resample(x, coarse))


def test_contrast_is_limited_by_the_range_of_the_whole_channel():
    x, factor = torch.randn(2, 3, 4, 5, 6), torch.tensor([[0.5, 1.5, 4.0], [2.0, 1.0, 3.0]])
    out = limit_contrast(x, factor)
    for b in range(2):
        for c in range(3):
            one = x[b, c]
            spread = one.mean() + factor[b, c] * (one - one.mean())
            torch.testing.assert_close(out[b, c], spread.clamp(one.min(), one.max()))


def test_a_kernel_reaches_three_standard_deviations():
    """3 x 0.8 = 2.4 are two voxels, 3 x 0.9 = 2.7 three."""
    x = torch.zeros(1, 1, 1, 15)
    x[..., 7] = 1.0
    for sigma, radius in ((0.8, 2), (0.9, 3), (0.1, 1)):
        line = gaussian_blur(x, torch.tensor([[0.01, sigma]]))[0, 0, 0]
        assert bool((line[7 - radius : 8 + radius] > 0).all()) and float(line.sum()) == pytest.approx(1)
        assert not line[: 7 - radius].any() and not line[8 + radius :].any()


def test_units_are_the_clipping_limits_of_ct_and_the_percentiles_of_others():
    """-100 and 300 HU of mean 50 and SD 100 are -1.5 and 2.5; the third channel is CT without statistics."""
    statistics = {"percentile_00_5": -100.0, "percentile_99_5": 300.0, "mean": 50.0, "std": 100.0}
    plan = SimpleNamespace(
        plans={"foreground_intensity_properties_per_channel": {"0": statistics, "1": statistics}},
        normalization_schemes=["CTNormalization", "ZScoreNormalization", "CTNormalization"],
    )
    intensity = torch.tensor([[[-1.0, 3.0], [-2.0, 4.0], [-0.5, 0.5]]]).repeat(2, 1, 1)
    out = unit_range(plan, intensity)
    assert out[0].tolist() == out[1].tolist() == [[-1.5, 2.5], [-2.0, 4.0], [-0.5, 0.5]]
    assert intensity[0, 0].tolist() == [-1.0, 3.0], "a copy"
    plan.plans["foreground_intensity_properties_per_channel"]["0"] = statistics | {"std": 0.0}
    assert bool(unit_range(plan, intensity).isfinite().all())
    del plan.plans["foreground_intensity_properties_per_channel"]
    assert torch.equal(unit_range(plan, intensity), intensity)
