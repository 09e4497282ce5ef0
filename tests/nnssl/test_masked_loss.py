"""The error of hidden voxels: values, gradients, and what must not matter."""

import pytest
import torch

from nnssl.losses.masked import BLOCK_EPS, block_statistics, masked_error

SIZES = [(4, 6, 5), (3, 8, 2), (7, 5)]


def random_case(size, channels=3):
    prediction = torch.randn(2, channels, *size, dtype=torch.float64, requires_grad=True)
    return prediction, torch.randn(2, channels, *size, dtype=torch.float64), torch.rand(2, 1, *size) < 0.4


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", ["mse", "l1"])
def test_value_and_gradient_against_a_loop(size, kind):
    prediction, target, region = random_case(size)
    loss = masked_error(prediction, target, region, kind=kind)
    loss.backward()
    total, n, expected = 0.0, 0, torch.zeros_like(target)
    for place in torch.nonzero(region.expand_as(target)).tolist():
        d = (prediction[tuple(place)] - target[tuple(place)]).item()
        total, n = total + (d * d if kind == "mse" else abs(d)), n + 1
        expected[tuple(place)] = 2 * d if kind == "mse" else (d > 0) - (d < 0)
    assert loss.item() == pytest.approx(total / n)
    torch.testing.assert_close(prediction.grad, expected / n)
    assert (prediction.grad[~region.expand_as(target)] == 0).all()


def test_channels_are_averaged():
    prediction, target, region = random_case((4, 4, 4))
    single = [masked_error(prediction[:, c : c + 1], target[:, c : c + 1], region) for c in range(3)]
    torch.testing.assert_close(masked_error(prediction, target, region), sum(single) / 3)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_in_the_target_drops_out(bad):
    prediction, target, region = random_case((4, 6, 5))
    broken = target.clone()
    broken[0, 1, :2] = bad
    loss = masked_error(prediction, broken, region)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(prediction.grad).all()
    assert (prediction.grad[0, 1, :2] == 0).all()
    keep = region.expand_as(target).clone()
    keep[0, 1, :2] = False
    torch.testing.assert_close(loss.detach(), masked_error(prediction, target, keep).detach())


def test_predictions_outside_do_not_matter():
    prediction, target, region = random_case((4, 6, 5))
    with torch.no_grad():
        wild = torch.where(region, prediction, torch.inf)
    wild.requires_grad_(True)
    loss = masked_error(wild, target, region)
    loss.backward()
    torch.testing.assert_close(loss, masked_error(prediction, target, region))
    assert torch.isfinite(wild.grad).all()


def test_empty_region():
    prediction, target, _ = random_case((4, 6, 5))
    loss = masked_error(prediction, target, torch.zeros(2, 1, 4, 6, 5, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0 and (prediction.grad == 0).all()


def test_perfect_and_indifferent_predictions():
    target = torch.randn(2, 1, 20, 20, 20)
    region = torch.rand(2, 1, 20, 20, 20) < 0.75
    assert masked_error(target, target, region) == 0
    assert masked_error(torch.zeros_like(target), target, region).item() == pytest.approx(1, abs=0.05)


def test_half_precision_is_summed_in_float32():
    target = torch.full((1, 1, 64, 64, 64), 3.0)
    prediction = torch.zeros_like(target, dtype=torch.float16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = masked_error(prediction, target, torch.ones_like(target, dtype=torch.bool))
    assert loss.dtype == torch.float32 and loss.item() == 9.0


def test_unknown_kind():
    prediction, target, region = random_case((4, 4, 4))
    with pytest.raises(ValueError, match="mse"):
        masked_error(prediction, target, region, kind="ssim")


def test_block_statistics():
    x = torch.randn(2, 2, 4, 6, 4, dtype=torch.float64)
    region = torch.ones(2, 1, 4, 6, 4, dtype=torch.bool)
    mean, sd = block_statistics(x, region, (2, 3, 4))
    part = x[1, 0, 2:4, 3:6, :4]
    assert mean[1, 0, 3, 4, 1] == pytest.approx(part.mean().item())
    assert sd[1, 0, 3, 4, 1] == pytest.approx((part.var(unbiased=False) + BLOCK_EPS).sqrt().item())
    air = 0.01 * torch.randn(1, 1, 8, 8, 8)
    mean, sd = block_statistics(air, torch.ones(1, 1, 8, 8, 8, dtype=torch.bool), (4, 4, 4))
    assert ((air - mean) / sd).std() < 0.25  # noise of air stays small
    flat = torch.full((1, 1, 8, 8, 8), 7.0)  # without any noise a twentieth of the image's deviation is left
    mean, sd = block_statistics(flat, torch.ones_like(flat, dtype=torch.bool), (4, 4, 4))
    torch.testing.assert_close((mean, sd), (flat, torch.full_like(flat, 0.05)))
