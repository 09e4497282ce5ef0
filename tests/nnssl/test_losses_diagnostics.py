"""Numbers and pictures of embeddings."""

import pytest
import torch

from nnssl.losses import channel_std, middle_slice, off_diagonal_cosine, pair_similarity, place_share, principal_colours
from nnssl.losses.diagnostics import resemblance


def test_off_diagonal_cosine():
    assert float(off_diagonal_cosine(torch.ones(4, 3))) == pytest.approx(1, abs=1e-5)
    assert float(off_diagonal_cosine(torch.eye(4))) == 0
    z = torch.tensor([[1.0, 0], [1.0, 0], [0, 1.0]])
    assert float(off_diagonal_cosine(z)) == pytest.approx(1 / 3, abs=1e-5)
    assert float(off_diagonal_cosine(z, torch.tensor([True, True, False]))) == pytest.approx(1, abs=1e-5)
    assert float(off_diagonal_cosine(z, torch.zeros(3, dtype=torch.bool))) == 0


def test_pair_similarity():
    a, d = torch.eye(3), torch.eye(3)[[0, 1, 0]]
    positives = torch.eye(3, dtype=torch.bool)
    pos, neg = pair_similarity(a, d, positives)
    assert float(pos) == pytest.approx(2 / 3, abs=1e-5) and float(neg) == pytest.approx(1 / 6, abs=1e-5)
    pos, neg = pair_similarity(a, d, positives, torch.tensor([True, True, False]))
    assert float(pos) == pytest.approx(1, abs=1e-5) and float(neg) == 0
    assert pair_similarity(a, d, torch.ones(3, 3, dtype=torch.bool))[1] == 0


def test_channel_std():
    assert channel_std(torch.ones(2, 3, 4, 5)) == 0
    x = torch.randn(4, 3, 10, 11, 12) * torch.tensor([1.0, 2.0, 3.0]).view(1, 3, 1, 1, 1)
    assert float(channel_std(x)) == pytest.approx(2, rel=0.05)


@pytest.mark.parametrize("channels", [1, 2, 7])
def test_colours_are_shared(channels):
    a, b = torch.randn(2, channels, 2, 3, 4), torch.randn(2, channels, 4, 3, 5)
    b[0, :, 0, 0, 0] = a[1, :, 1, 2, 3]
    colours = principal_colours(a, b)
    assert [c.shape for c in colours] == [(2, 3, 2, 3, 4), (2, 3, 4, 3, 5)]
    assert all(float(c.min()) >= 0 and float(c.max()) <= 1 for c in colours)
    assert torch.allclose(colours[0][1, :, 1, 2, 3], colours[1][0, :, 0, 0, 0], atol=1e-5)


def test_middle_slice():
    x = torch.arange(6.0).view(1, 1, 3, 2, 1).expand(2, 5, 3, 2, 2)
    assert torch.equal(middle_slice(x, (6, 4, 4))[0, :, :, 0], torch.tensor([[2.0], [2.0], [3.0], [3.0]]).expand(4, 4))
    assert middle_slice(torch.zeros(2, 3, 4, 5), (8, 10)).shape == (2, 8, 10, 3)


def test_cosines_against_double_loops():
    g = torch.Generator().manual_seed(2)
    a, d = torch.randn(5, 3, generator=g), torch.randn(5, 3, generator=g)
    valid = torch.tensor([True, True, False, True, True])
    positives = torch.eye(5, dtype=torch.bool)
    positives[0, 3] = positives[3, 0] = positives[1, 2] = positives[2, 1] = True

    def cosine(x, y):
        return float(x @ y / x.norm() / y.norm())

    def mean(values):
        return sum(values) / len(values)

    used = [i for i in range(5) if valid[i]]
    own = mean([cosine(a[i], a[j]) for i in used for j in used if i != j])
    assert float(off_diagonal_cosine(a, valid)) == pytest.approx(own, abs=1e-5)
    same, other = pair_similarity(a, d, positives, valid)
    assert float(same) == pytest.approx(
        mean([cosine(a[i], d[j]) for i in used for j in used if positives[i, j]]), abs=1e-5
    )
    assert float(other) == pytest.approx(
        mean([cosine(a[i], d[j]) for i in used for j in used if not positives[i, j]]), abs=1e-5
    )


@pytest.mark.parametrize("size", [(2, 3, 4), (5, 2)])
def test_resemblance_is_the_cosine_at_each_place(size):
    vectors, maps = torch.randn(3, 6), 2 * torch.randn(3, 6, *size)
    expected = torch.cosine_similarity(vectors.view(3, 6, *[1] * len(size)), maps, dim=1)
    torch.testing.assert_close(resemblance(vectors, maps), expected, atol=1e-5, rtol=0)


def test_channel_std_by_hand():
    """Over samples and places, of the population, then the mean over channels."""
    x = torch.tensor([[[0.0, 0.0], [1.0, 1.0]], [[2.0, 2.0], [1.0, 5.0]]])  # (samples, channels, places)
    assert float(channel_std(x)) == pytest.approx((1.0 + 3.0**0.5) / 2)


def test_colours_are_the_main_directions_in_order():
    """Against a singular value decomposition of the centred unit vectors; each colour fills [0, 1]."""
    spread = torch.tensor([0.1, 0.6, 0.3, 0.05, 0.9]).view(1, 5, 1, 1)
    x = torch.randn(1, 5, 40, 1, generator=torch.Generator().manual_seed(1)) * spread + torch.tensor(1.0)
    unit = (x / x.norm(dim=1, keepdim=True))[0, :, :, 0].T
    _, size, directions = torch.linalg.svd(unit - unit.mean(0))
    assert size[0] > 1.2 * size[1] and size[1] > 1.2 * size[2]
    (colours,) = principal_colours(x)
    for colour, direction in zip(colours[0], directions):
        along = torch.corrcoef(torch.stack([colour.flatten(), unit @ direction]))[0, 1]
        assert abs(float(along)) == pytest.approx(1, abs=1e-3)
        assert float(colour.min()) == 0 and float(colour.max()) == pytest.approx(1)


def test_place_share_by_hand():
    # two crops, two sites, one channel: means 0 and 2, each +-1: MSB = 2 (1 + 1) / 1 = 4, MSW = 4 / 2 = 2, V = 1
    f = torch.tensor([[[-1.0, 1.0]], [[1.0, 3.0]]])
    assert float(place_share(f)) == pytest.approx(1 / 3)
    # the same values, but nothing common to a site: MSB = 0
    assert float(place_share(torch.tensor([[[-1.0, 1.0]], [[1.0, -1.0]]]))) == 0
    # equal crops: the place explains all, however the channels differ from each other
    ramp = torch.arange(24.0).view(1, 2, 3, 4).expand(3, 2, 3, 4)
    assert float(place_share(ramp)) == pytest.approx(1)
    assert float(place_share(torch.full((3, 2, 3, 4), 7.0))) == 0
    # channels add their variances: one of place alone (MSB 4, MSW 0), one without (MSB 0, MSW 2) -> V = (4 - 2) / 2
    both = torch.tensor([[[0.0, 2.0], [-1.0, 1.0]], [[0.0, 2.0], [1.0, -1.0]]])
    assert float(place_share(both)) == pytest.approx(1 / 3)


@pytest.mark.parametrize("share", [0.0, 0.2, 0.8])
@pytest.mark.parametrize("n", [4, 40])
def test_place_share_does_not_depend_on_the_number_of_crops(share, n):
    g = torch.Generator().manual_seed(n)
    place, rest = torch.randn(1, 16, 4, 5, 6, generator=g), torch.randn(n, 16, 4, 5, 6, generator=g)
    f = share**0.5 * place + (1 - share) ** 0.5 * rest
    assert float(place_share(f)) == pytest.approx(share, abs=0.04)
    assert float(place_share(5 * f + 3)) == pytest.approx(float(place_share(f)), abs=1e-5)
    assert float(place_share(f.flip(0).flip(3))) == pytest.approx(float(place_share(f)), abs=1e-6)
    if share == 0:
        plain = f.flatten(2).mean(0).var(1).sum() / f.flatten(2).transpose(0, 1).flatten(1).var(1).sum()
        assert float(plain) > 0.8 / n, "the plain ratio has a share where there is none"


def test_place_share_sees_the_padding_and_refuses_one_crop():
    torch.manual_seed(0)
    conv = torch.nn.Conv3d(1, 8, 3, padding=1)
    x = torch.randn(24, 1, 4, 5, 6)
    with torch.no_grad():
        padded = place_share(conv(x + 4))
        inside = place_share(torch.nn.functional.conv3d(x + 4, conv.weight, conv.bias))
    assert float(padded) > 0.5 > 0.1 > float(inside)
    with pytest.raises(ValueError, match="1 crops of 4 sites"):
        place_share(torch.zeros(1, 2, 4))
    with pytest.raises(ValueError, match="3 crops of 1 sites"):
        place_share(torch.zeros(3, 2, 1))
