"""vox2vec's corruption of CT with known draws, against SciPy's filters: blur or sharpening, noise, and the window."""

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter1d

from nnssl.pretrain.augment.rng import StepRNG
from nnssl.pretrain.methods.hdense.window import window_corruption

SOFT, SHARP, AMOUNT, SD, LOW, HIGH = (
    (0.25, 1.5), (0.5, 1.0), (10.0, 30.0), (0.0, 30 / 2350), (0.0, 350 / 2350), (1650 / 2350, 1.0),
)  # fmt: skip


class Known(StepRNG):
    """Draws that a test chooses: ``yes`` in the order filter, sharpen, noise, window; numbers by their range."""

    def __init__(self, yes, field=None, **numbers):
        super().__init__(0, 0, 1)
        self.asked, self.yes, self.numbers, self.field = [], list(yes), numbers, field
        self.ranges = {"soft": SOFT, "sharp": SHARP, "amount": AMOUNT, "sd": SD, "low": LOW, "high": HIGH}

    def chance(self, p, *shape):
        self.asked.append(p)
        return torch.tensor([self.yes[len(self.asked) - 1]])

    def uniform(self, low, high, *shape):
        name = next(k for k, r in self.ranges.items() if r == pytest.approx((low, high), rel=1e-6))
        return torch.tensor([self.numbers.get(name, (low + high) / 2)])

    def noise(self, *shape):
        return torch.zeros(1, *shape) if self.field is None else self.field


def blurred(x, sigma, radius):
    """Along the last two axes, edges repeated."""
    for axis in (-2, -1):
        x = gaussian_filter1d(x, sigma, axis=axis, mode="nearest", radius=radius)
    return x


@pytest.fixture(params=[(4, 14, 17), (15, 18)])
def image(request):
    return 0.4 + 0.2 * torch.rand(1, 2, *request.param)


def test_probabilities_and_ranges(image):
    """Published: p = 0.5 to filter, either way alike, 0.5 for noise, 0.8 for a window; all ranges are known to the stand-in."""
    rng = Known([False] * 4)
    assert torch.equal(window_corruption(image, rng), image)
    assert rng.asked == [0.5, 0.5, 0.5, 0.8]


def test_blur(image):
    seen = window_corruption(image, Known([True, False, False, False], soft=1.5))
    np.testing.assert_allclose(seen.numpy(), blurred(image.double().numpy(), 1.5, 5), atol=1e-5)


def test_sharpening(image):
    """What a narrow blur still takes away from the blurred image is added to it ten to thirty times."""
    image = 0.5 + 0.02 * (image - 0.5)  # so that nothing is cut off
    seen = window_corruption(image, Known([True, True, False, False], sharp=0.7, amount=12.0))
    soft = blurred(image.double().numpy(), 0.7, 5)
    np.testing.assert_allclose(seen.numpy(), soft + 12 * (soft - blurred(soft, 0.5, 2)), atol=1e-5)


def test_noise(image):
    field = torch.randn(image.shape)
    seen = window_corruption(image, Known([False, False, True, False], field, sd=0.01))
    torch.testing.assert_close(seen, image + 0.01 * field)
    assert torch.equal(window_corruption(image, Known([False] * 4, field, sd=0.01)), image)


def test_window(image):
    """The window's ends become 0 and 1, and what lies outside of it too."""
    image[0, 0, 0, 0], image[0, 1, 0, 0] = 0.05, 0.9
    seen = window_corruption(image, Known([False, False, False, True], low=0.1, high=0.8))
    torch.testing.assert_close(seen, ((image - 0.1) / 0.7).clamp(0, 1))
    assert (seen[0, 0, 0, 0] == 0).all() and (seen[0, 1, 0, 0] == 1).all()
