"""The contrast kernel: hand values, a slow reference, invariances, degenerate input (spec T2 to T10, T17, T21)."""

import math

import pytest
import torch
import torch.nn.functional as F

from nnssl.errors import NnsslError
from nnssl.losses import collapse_value, dense_supcon, position_positives, safe_normalise, site_contrast, supcon

E = torch.eye(4, dtype=torch.float64)
ONE = {"temperature": 1.0, "base_temperature": 1.0}


def near(p, t=0.1):
    return position_positives(torch.tensor(p, dtype=torch.float64), t)


def slow(aux, dominant, positions, t, tau, base, contrast="all"):
    """Double loop over anchors and contrasts, written from the formula."""
    z, n = torch.cat([aux, dominant]), len(aux)
    s = F.cosine_similarity(z[:, None], z[None], dim=-1) / tau
    total = 0.0
    for a in range(2 * n):
        others = [b for b in range(2 * n) if (b != a if contrast == "all" else (a < n) != (b < n))]
        pos = [b for b in others if b % n == a % n or abs(positions[a % n] - positions[b % n]) < t]
        denominator = sum(math.exp(s[a, c]) for c in others)
        total -= sum(float(s[a, b]) - math.log(denominator) for b in pos) / len(pos)
    return tau / base * total / (2 * n)


@pytest.mark.parametrize(
    ("vectors", "p", "expected"),
    [
        (E[[0, 0]], (0.1, 0.9), math.log(3)),
        (E[[0, 1]], (0.1, 0.9), math.log(1 + 2 / math.e)),
        (E[[0, 1]], (0.1, 0.15), math.log(1 + 2 / math.e) / 3 + 2 / 3 * math.log(math.e + 2)),
        (E[[0, 0, 1]], (0.1, 0.15, 0.9), (4 * math.log(3 + 2 / math.e) + 2 * math.log(1 + 4 / math.e)) / 6),
    ],
)
def test_values_by_hand(vectors, p, expected):  # T2, T3
    assert float(supcon(vectors, vectors, near(p), **ONE)) == pytest.approx(expected, abs=2e-6)


def test_antipodes_by_hand():  # T2
    a = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    b = torch.tensor([[0.5, math.sqrt(0.75)], [-0.5, -math.sqrt(0.75)]])
    expected = math.log(1 + (math.exp(-1) + math.exp(-0.5)) / math.exp(0.5))
    assert expected == pytest.approx(0.4643688, abs=1e-7)
    assert float(supcon(a, b, near((0.1, 0.9)), **ONE)) == pytest.approx(expected, abs=2e-6)


@pytest.mark.parametrize("b", [2, 4, 9])
@pytest.mark.parametrize("contrast", ["all", "cross"])
def test_collapse_is_known_for_any_positives(b, contrast):  # T4
    z, p = torch.ones(b, 5), torch.rand(b)
    loss = supcon(z, z, position_positives(p, 0.3), contrast=contrast)
    assert float(loss) == pytest.approx(collapse_value(b, 0.1, 0.07, contrast), rel=1e-5)


def test_collapse_of_four():  # T4
    assert collapse_value(4, 0.1, 0.07) == pytest.approx(math.log(7) / 0.7) == pytest.approx(2.7798716)
    assert torch.allclose(collapse_value(torch.tensor([1, 4]), 0.1, 0.07), torch.tensor([0.0, 2.7798716]))


@pytest.mark.parametrize("contrast", ["all", "cross"])
def test_equals_slow_reference(contrast):
    a, d, p = torch.randn(6, 7).double(), torch.randn(6, 7).double(), torch.rand(6).double()
    loss = supcon(a, d, position_positives(p, 0.2), temperature=0.3, contrast=contrast)
    assert float(loss) == pytest.approx(slow(a, d, p, 0.2, 0.3, 0.07, contrast), rel=1e-5)


def test_without_shared_positions_it_is_nt_xent():  # T5
    a, d = torch.randn(5, 8), torch.randn(5, 8)
    z = F.normalize(torch.cat([a, d]), dim=1)
    logits = z @ z.T / 0.1
    logits.fill_diagonal_(-math.inf)
    expected = F.cross_entropy(logits, (torch.arange(10) + 5) % 10)
    assert torch.allclose(supcon(a, d, near(torch.rand(5).tolist(), 1e-9), base_temperature=0.1), expected, atol=1e-5)


def test_large_threshold_makes_everything_positive():  # T5
    p = torch.rand(5)
    assert position_positives(p, 1.5).all()
    a, d = torch.randn(5, 8), torch.randn(5, 8)
    everything = torch.ones(5, 5, dtype=torch.bool)
    assert torch.equal(supcon(a, d, position_positives(p, 1.5)), supcon(a, d, everything))


def test_one_sample_is_refused():  # T5
    with pytest.raises(NnsslError, match="at least 2 crops.*has 1.*batch_size"):
        supcon(torch.randn(1, 4), torch.randn(1, 4), torch.ones(1, 1, dtype=torch.bool))
    with pytest.raises(NnsslError, match="contrast 'most' is unknown"):
        supcon(E, E, near((0.1, 0.2, 0.3, 0.4)), contrast="most")


@pytest.mark.parametrize("contrast", ["all", "cross"])
def test_invariances(contrast):  # T6
    a, d, p = torch.randn(6, 5).double(), torch.randn(6, 5).double(), torch.tensor([0.1, 0.17, 0.3, 0.52, 0.55, 0.9])

    def value(x, y, q):
        return supcon(x, y, position_positives(q.double(), 0.1), contrast=contrast)

    loss, order = value(a, d, p), torch.randperm(6)
    turn = torch.linalg.qr(torch.randn(5, 5).double())[0]
    assert torch.allclose(value(d, a, p), loss)
    assert torch.allclose(value(a[order], d[order], p[order]), loss)
    assert torch.allclose(value(a * torch.linspace(2, 9, 6).double()[:, None], d, p), loss, atol=1e-4)
    assert torch.allclose(value(a @ turn, d @ turn, p), loss)
    assert torch.allclose(value(a, d, p + 0.037), loss)
    assert not torch.allclose(value(a, d, p.flip(0)), loss)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_threshold_is_strict_whatever_the_rounding(dtype):  # T7
    p = (torch.arange(10, dtype=dtype) + 1) / 10
    assert torch.equal(position_positives(p, 0.1), torch.eye(10, dtype=torch.bool))
    naive = (p[:, None] - p[None]).abs() < 0.1
    assert not torch.equal(naive, torch.eye(10, dtype=torch.bool))
    assert position_positives(p, 0.1001)[0, 1]


def test_positives_on_several_axes_and_without_a_position():
    p = torch.tensor([[0.1, 0.1, 0.1], [0.15, 0.12, 0.11], [0.15, 0.12, 0.4], [math.nan, 0.1, 0.1]])
    expected = torch.eye(4, dtype=torch.bool)
    expected[0, 1] = expected[1, 0] = True
    assert torch.equal(position_positives(p, 0.1), expected)


def test_number_of_positives():  # T8
    positives = near((0.1, 0.15, 0.18, 0.9))
    z = torch.eye(8).double()
    a, d = z[:4].clone().requires_grad_(), z[4:].clone().requires_grad_()
    supcon(a, d, positives, **ONE).backward()
    # All vectors are orthogonal: the pull towards a contrast is 1/|P| for positives less 1/7 for all, both ways.
    n = positives.sum(1)
    assert n.tolist() == [3, 3, 3, 1]
    gradient = torch.cat([a.grad, d.grad]) * 8
    pairs = 2 * n - 1
    pull = torch.where(positives.repeat(2, 2), 1 / pairs.repeat(2)[:, None], 0.0) - 1 / 7
    expected = -(pull + pull.T) * (1 - torch.eye(8))
    assert torch.allclose(gradient * (1 - torch.eye(8)), expected.double(), atol=1e-5)


@pytest.mark.parametrize("contrast", ["all", "cross"])
def test_dense_equals_a_loop_over_sites(contrast):  # T9
    a, d, p = torch.randn(4, 6, 2, 3, 5), torch.randn(4, 6, 2, 3, 5), torch.rand(4)
    positives = position_positives(p, 0.3)
    loss, collapse = dense_supcon(a, d, positives, contrast=contrast)
    sites = [supcon(x, y, positives, contrast=contrast) for x, y in zip(a.flatten(2).unbind(2), d.flatten(2).unbind(2))]
    assert torch.allclose(loss, torch.stack(sites).mean(), atol=1e-5)
    assert float(collapse) == pytest.approx(collapse_value(4, 0.1, 0.07, contrast), rel=1e-5)


def test_dense_and_image_level_agree():  # T9
    a, d, positives = torch.randn(4, 6), torch.randn(4, 6), near((0.1, 0.15, 0.5, 0.8))
    image = supcon(a, d, positives)
    assert torch.allclose(dense_supcon(a[..., None], d[..., None], positives)[0], image)
    spread = [z[:, :, None, None, None].expand(-1, -1, 2, 3, 5) for z in (a, d)]
    assert torch.allclose(dense_supcon(*spread, positives)[0], image, atol=1e-5)


def test_dense_compares_equal_sites_only():  # T9, T10
    a, d = torch.randn(3, 4, 6, requires_grad=True), torch.randn(3, 4, 6)
    positives, order = near((0.1, 0.15, 0.8)), torch.randperm(6)
    loss, _ = dense_supcon(a, d, positives)
    assert torch.allclose(dense_supcon(a[..., order], d[..., order], positives)[0], loss, atol=1e-6)
    assert not torch.allclose(dense_supcon(a, d.roll(1, -1), positives)[0], loss)
    assert torch.allclose(dense_supcon(a.repeat(1, 1, 2), d.repeat(1, 1, 2), positives)[0], loss, atol=1e-6)
    # The gradient at a site does not change when all other sites do.
    (gradient,) = torch.autograd.grad(loss, a)
    other = a.detach().clone()
    other[..., 1:] = torch.randn(3, 4, 5)
    other.requires_grad_()
    (changed,) = torch.autograd.grad(dense_supcon(other, d, positives)[0], other)
    assert torch.allclose(changed[..., 0], gradient[..., 0], atol=1e-6)
    assert not torch.allclose(changed[..., 1:], gradient[..., 1:])


def test_masked_samples_are_neither_anchors_nor_contrasts():
    a, d, positives = torch.randn(5, 6), torch.randn(5, 6), near((0.1, 0.15, 0.5, 0.55, 0.9))
    valid = torch.tensor([True, False, True, True, True])
    expected = supcon(a[valid], d[valid], positives[valid][:, valid])
    assert torch.allclose(supcon(a, d, positives, valid=valid), expected, atol=1e-6)
    a2 = a.clone()
    a2[1] = 1e6
    assert torch.allclose(supcon(a2, d, positives, valid=valid), expected, atol=1e-6)


def test_masked_sites_are_left_out():
    a, d, positives = torch.randn(3, 4, 4), torch.randn(3, 4, 4), near((0.1, 0.15, 0.8))
    valid = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0], [1, 0, 0, 0]]).bool()
    loss, collapse = dense_supcon(a, d, positives, valid=valid)
    first = supcon(a[..., 0], d[..., 0], positives)
    second = supcon(a[:2, :, 1], d[:2, :, 1], positives[:2, :2])
    assert torch.allclose(loss, (first + second) / 2, atol=1e-6)
    assert float(collapse) == pytest.approx((math.log(5) + math.log(3)) / 2 / 0.7, rel=1e-5)


def test_maps_of_different_shape_are_refused():
    with pytest.raises(NnsslError, match=r"\(2, 3, 4\) and \(2, 3, 5\)"):
        dense_supcon(torch.randn(2, 3, 4), torch.randn(2, 3, 5), near((0.1, 0.2)))


@pytest.mark.parametrize("contrast", ["all", "cross"])
@pytest.mark.parametrize(
    "case", ["zeros", "one zero", "one view zero", "equal", "nothing valid", "nan position", "huge"]
)
def test_degenerate_input_stays_finite(case, contrast):  # T17
    a, d, p = torch.randn(4, 6), torch.randn(4, 6), torch.tensor([0.1, 0.15, 0.5, 0.9])
    valid = None
    if case == "zeros":
        a, d = torch.zeros(4, 6), torch.zeros(4, 6)
    elif case == "one zero":
        a[2], d[2] = 0.0, 0.0
    elif case == "one view zero":
        a[2] = 0.0
    elif case == "equal":
        a, d = torch.ones(4, 6), torch.ones(4, 6)
    elif case == "nothing valid":
        valid = torch.zeros(4, dtype=torch.bool)
    elif case == "nan position":
        p[1] = math.nan
    elif case == "huge":
        a, d = a * 1e18, d * 1e18
    a.requires_grad_(), d.requires_grad_()
    loss = supcon(a, d, position_positives(p, 0.1), valid=valid, contrast=contrast)
    loss.backward()
    for x in (loss, a.grad, d.grad):
        assert torch.isfinite(x).all()
    assert max(a.grad.abs().max(), d.grad.abs().max()) < 1e3
    if case in ("zeros", "nothing valid"):
        assert loss == 0


def test_safe_normalise_at_zero():
    z = torch.zeros(2, 3, requires_grad=True)
    safe_normalise(z).sum().backward()
    assert z.grad.abs().max() <= 1e3 + 1
    assert safe_normalise(torch.ones(1, 4).half()).dtype == torch.float32


@pytest.mark.parametrize("contrast", ["all", "cross"])
def test_finite_differences(contrast):  # T21
    a, d = torch.randn(3, 4).double().requires_grad_(), torch.randn(3, 4).double().requires_grad_()
    positives, valid = near((0.1, 0.15, 0.8)), torch.tensor([True, True, True])
    assert torch.autograd.gradcheck(lambda x, y: supcon(x, y, positives, contrast=contrast, valid=valid), (a, d))


def test_bounds():  # T21
    for seed in range(5):
        torch.manual_seed(seed)
        a, d = torch.randn(4, 3), torch.randn(4, 3)
        scaled = float(supcon(a, d, position_positives(torch.rand(4), 0.3))) * 0.7
        assert 0 <= scaled <= math.log(7) + 20
    # Two places with two samples each, opposite: P positives at cosine 1, the rest at -1.
    z = (
        E[[0, 0, 1, 1]] * torch.tensor([1.0, 1.0, 0, 0])[:, None]
        - E[[0, 0, 0, 0]] * torch.tensor([0, 0, 1.0, 1.0])[:, None]
    )
    expected = math.log(3 + 4 * math.exp(-2 / 0.5))
    loss = supcon(z, z, near((0.1, 0.15, 0.8, 0.85)), temperature=0.5, base_temperature=0.5)
    assert float(loss) == pytest.approx(expected, abs=1e-5)


def test_computed_in_float32_under_autocast():
    a, d, positives = torch.randn(4, 8), torch.randn(4, 8), near((0.1, 0.15, 0.5, 0.9))
    expected = supcon(a, d, positives)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = supcon(a, d, positives)
    assert loss.dtype == torch.float32 and torch.equal(loss, expected)


@pytest.mark.parametrize("contrast", ["all", "cross"])
def test_a_vector_counts_from_a_norm_of_1e_4_on(contrast):
    a, d, positives = (
        F.normalize(torch.randn(3, 5), dim=1),
        F.normalize(torch.randn(3, 5), dim=1),
        near((0.1, 0.15, 0.8)),
    )
    two = supcon(a[:2], d[:2], positives[:2, :2], contrast=contrast)
    for norm, counts in ((1e-5, False), (0.9e-4, False), (1.1e-4, True), (1e-3, True)):
        for short, whole in ((a, d), (d, a)):  # either view
            small = torch.cat([short[:2], norm * short[2:]])
            pair = (small, whole) if short is a else (whole, small)
            loss, collapse = dense_supcon(*(z[..., None] for z in pair), positives, contrast=contrast)
            assert float(collapse) == pytest.approx(collapse_value(3 if counts else 2, 0.1, 0.07, contrast), rel=1e-5)
            assert torch.allclose(loss, two, atol=1e-5) != counts


def test_contrast_among_sites_by_hand():
    e = torch.eye(2)
    same, swapped = e[None], e[None, :, [1, 0]]  # (1, 2, 2): one crop, two channels, two sites
    kernel = {"temperature": 1.0, "base_temperature": 1.0}
    loss, collapse = site_contrast(same, same, **kernel)
    assert float(loss) == pytest.approx(math.log(1 + math.exp(-1)), abs=1e-5) and float(collapse) == pytest.approx(
        math.log(2)
    )
    assert float(site_contrast(same, swapped, **kernel)[0]) == pytest.approx(math.log(1 + math.e), abs=1e-5)
    flat = torch.ones(3, 4, 2, 3, 2)
    loss, collapse = site_contrast(flat, flat, temperature=0.1, base_temperature=0.07)
    assert float(loss) == pytest.approx(math.log(12) / 0.7, abs=1e-4) == float(collapse)


def test_contrast_among_sites_equals_a_loop_over_crops_and_leaves_out_sites():
    g = torch.Generator().manual_seed(0)
    a, d = torch.randn(2, 3, 5, 2, 3, 2, generator=g).double().unbind(0)
    valid = torch.rand(3, 2, 3, 2, generator=g) > 0.4
    valid[2] = False
    valid[2, 0, 0, 0] = True  # a crop with one site has nothing to compare
    got, _ = site_contrast(a, d, temperature=0.1, base_temperature=0.07, valid=valid)
    each = []
    for b in range(2):
        x, y = (torch.nn.functional.normalize(m[b][:, valid[b]].T, dim=1) for m in (a, d))
        logits, own = x @ y.T / 0.1, torch.arange(len(x))
        ce = torch.nn.functional.cross_entropy
        each.append((ce(logits, own) + ce(logits.T, own)) / 2 / 0.7)
    assert float(got) == pytest.approx(float(sum(each) / 2), rel=1e-4)
    order = torch.randperm(12, generator=g)
    shuffled = (m.flatten(2)[..., order] for m in (a, d))
    again, _ = site_contrast(*shuffled, temperature=0.1, base_temperature=0.07, valid=valid.flatten(1)[:, order])
    assert float(again) == pytest.approx(float(got), rel=1e-6)
    with pytest.raises(NnsslError, match="aligned maps"):
        site_contrast(a, d[..., :1])


def test_the_place_in_the_crop_does_not_help_among_shifted_sites():
    """Features of the place alone: perfect where both crops lie alike, useless where one is shifted."""
    place = torch.nn.functional.one_hot(torch.arange(4)).double().T[None]  # (1, 4 channels, 4 places)
    alike, _ = site_contrast(place, place)
    shifted, collapse = site_contrast(place[..., 1:], place[..., :-1])  # site i lies at place i + 1 and at place i
    assert float(alike) < 0.01 and float(shifted) > 2 * float(collapse)


def test_temperatures_are_the_papers_unless_told_otherwise():
    """0.1, and 0.07 below the scale."""
    a, d = torch.randn(2, 3, 4, 2, 3).unbind(0)
    own, paper = torch.eye(3, dtype=torch.bool), {"temperature": 0.1, "base_temperature": 0.07}
    for mine, told in (
        (supcon(a[..., 0, 0], d[..., 0, 0], own), supcon(a[..., 0, 0], d[..., 0, 0], own, **paper)),
        (dense_supcon(a, d, own)[0], dense_supcon(a, d, own, **paper)[0]),
        (dense_supcon(a, d, own)[1], dense_supcon(a, d, own, **paper)[1]),
        (site_contrast(a, d)[0], site_contrast(a, d, **paper)[0]),
        (site_contrast(a, d)[1], site_contrast(a, d, **paper)[1]),
    ):
        assert torch.equal(mine, told) and mine > 0
