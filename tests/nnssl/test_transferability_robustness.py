"""The criterion itself: values worked out by hand and properties P1-P12, P14."""

import math

import numpy as np
import pytest
import torch

from nnssl.errors import NnsslError
from nnssl.transferability import (
    degenerate,
    distance_matrix,
    hinge,
    pool,
    robustness_loss,
    robustness_score,
    separate,
)
from nnssl.transferability.robustness import mirror_index

KINDS = ("cosine", "l2", "pearson")


def random_pair(n=8, size=5, seed=0, positive=False):
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(n, size, generator=g, dtype=torch.float64)
    p = q + 0.7 * torch.randn(n, size, generator=g, dtype=torch.float64)
    return (q.abs(), p.abs()) if positive else (q, p)


def loss(q, p, margin=0.5, **kwargs):
    return float(robustness_loss(separate(q, p, **kwargs), margin))


def slow_distance(x, y, kind):
    x, y = np.asarray(x, float), np.asarray(y, float)
    if kind == "l2":
        return ((x - y) ** 2).mean()
    if kind == "pearson":
        return 1 - np.corrcoef(x, y)[0, 1]
    return 1 - x @ y / math.sqrt(x @ x) / math.sqrt(y @ y)


def slow_loss(q, p, margin, kind, negatives):
    n, total = len(q), 0.0
    for i in range(n):
        near = slow_distance(q[i], p[i], kind)
        others = [(1 - i) % n] if negatives == "mirror" else [j for j in range(n) if j != i]
        total += sum(max(0.0, near - slow_distance(q[i], p[j], kind) + margin) for j in others) / len(others)
    return total / n


@pytest.mark.parametrize("negatives", ["all", "mirror"])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_a_double_loop(kind, negatives):
    q, p = random_pair()
    for margin in (0, 0.25, 1.0, 2.5):
        expected = slow_loss(q, p, margin, kind, negatives)
        assert loss(q, p, margin, distance=kind, negatives=negatives) == pytest.approx(expected, abs=1e-12)


def test_p1_collapse_gives_the_margin():
    v = torch.tensor([[1.0, 2.0, -3.0]], dtype=torch.float64).repeat(6, 1)
    for kind in KINDS:
        for negatives in ("all", "mirror"):
            s = separate(v, v, distance=kind, negatives=negatives)
            assert float(robustness_loss(s, 0.5)) == pytest.approx(0.5, abs=1e-6)
            assert float(robustness_score(s, 0.5)) == pytest.approx(0.0, abs=1e-6)


def test_p2_perfect_views_of_orthogonal_volumes():
    q = torch.eye(6, dtype=torch.float64)
    assert [loss(q, q, m) for m in (0.5, 1.0, 1.5)] == pytest.approx([0, 0, 0.5], abs=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_p3_shape_of_the_curve_over_margins(kind):
    q, p = random_pair()
    s = separate(q, p, distance=kind)
    m = torch.linspace(0, 8, 81, dtype=torch.float64)
    r = torch.stack([robustness_loss(s, float(x)) for x in m])
    step = r.diff()
    assert (r >= 0).all() and (step >= -1e-12).all() and (step <= 0.1 + 1e-12).all() and (step.diff() >= -1e-12).all()
    delta = s.delta[s.mask]
    edge = max(0.0, float((-delta).max()))
    for margin in (edge, edge + 1):
        assert float(robustness_loss(s, margin)) == pytest.approx(margin + float(delta.mean()), abs=1e-9)


def test_p4_range():
    for seed in range(20):
        q, p = random_pair(seed=seed)
        for kind in ("cosine", "pearson"):
            s = separate(q, p, distance=kind)
            for m in (0.0, 0.5, 2.0):
                assert 0 <= robustness_loss(s, m) <= m + 2
                assert -2 <= robustness_score(s, m) <= m
        q, p = random_pair(seed=seed, positive=True)
        assert loss(q, p, 0.5) <= 1.5


def test_p5_scaling_and_shift():
    q, p = random_pair()
    scale = torch.rand(8, 1, dtype=torch.float64) + 0.1
    for kind in ("cosine", "pearson"):
        assert loss(q * scale, p * scale.flip(0), distance=kind) == pytest.approx(loss(q, p, distance=kind), abs=1e-6)
    assert loss(q * scale + 3, p + 5, distance="pearson") == pytest.approx(loss(q, p, distance="pearson"), abs=1e-6)
    assert loss(q + 3, p + 5) != pytest.approx(loss(q, p), abs=1e-3)
    assert loss(3 * q, 3 * p, 0.0, distance="l2") == pytest.approx(9 * loss(q, p, 0.0, distance="l2"), abs=1e-6)


def test_p6_rotation():
    q, p = random_pair()
    rotation = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))[0]
    for kind in ("cosine", "l2"):
        assert loss(q @ rotation, p @ rotation, distance=kind) == pytest.approx(loss(q, p, distance=kind), abs=1e-6)
    assert abs(loss(q @ rotation, p @ rotation, distance="pearson") - loss(q, p, distance="pearson")) > 1e-3


def test_p7_order_matters_to_mirror_only():
    q, p = random_pair()
    order = torch.tensor([3, 0, 6, 1, 7, 2, 5, 4])
    assert loss(q[order], p[order]) == pytest.approx(loss(q, p), abs=1e-9)
    assert abs(loss(q[order], p[order], negatives="mirror") - loss(q, p, negatives="mirror")) > 1e-3


def test_p8_mirror_index():
    assert mirror_index(6).tolist() == [1, 0, 5, 4, 3, 2]
    assert [i for i, j in enumerate(mirror_index(5).tolist()) if i == j] == [3]
    for n in range(2, 102):
        index = mirror_index(n)
        assert torch.equal(index[index], torch.arange(n))
        assert bool((index == torch.arange(n)).any()) == (n % 2 == 1)
    q, p = random_pair(n=5)
    with pytest.raises(NnsslError, match="even number"):
        separate(q, p, negatives="mirror")


def test_p9_direction():
    g = torch.Generator().manual_seed(3)
    q = torch.randn(16, 12, generator=g, dtype=torch.float64)
    noise = torch.randn(40, 16, 12, generator=g, dtype=torch.float64)

    def mean(level):
        return sum(loss(q, (1 - level) * q + level * n) for n in noise) / len(noise)

    assert mean(0.0) < mean(0.3) < mean(0.6) < mean(0.9)
    p = q + 0.1 * noise[0]
    p[1] = q[0]  # the mirrored negative of sample 0 becomes its anchor
    s = separate(q, p, negatives="mirror")
    assert float(hinge(s, 0.5)[0]) == pytest.approx(0.5 + float(s.positive[0]), abs=1e-9)


Q10 = [(1, 0), (0, 1), (-1, 0), (1, 0)]
P10 = [(2, 0), (1, 0), (-1, 0), (0, 3)]


def test_p10_hand_example():
    q, p = (torch.tensor(x, dtype=torch.float64) for x in (Q10, P10))
    s = separate(q, p, negatives="mirror")
    assert s.positive.tolist() == [0, 1, 0, 1] and s.negative.tolist() == [0, 1, 1, 2]
    assert s.delta.flatten().tolist() == [0, 0, -1, -1]
    margins = (0, 0.25, 0.5, 0.75, 1, 2)
    assert [float(robustness_loss(s, m)) for m in margins] == pytest.approx([0, 0.125, 0.25, 0.375, 0.5, 1.5], abs=1e-6)
    assert [loss(q, p, m) for m in (0, 0.5, 1, 2)] == pytest.approx([0.25, 0.5, 0.75, 1.5], abs=1e-6)
    s = separate(q, p, distance="l2", negatives="mirror")
    assert s.positive.tolist() == pytest.approx([0.5, 1, 0, 5]) and s.negative.tolist() == pytest.approx([0, 2.5, 5, 2])
    assert [float(robustness_loss(s, m)) for m in (0, 0.5)] == pytest.approx([0.875, 1.125], abs=1e-6)
    assert loss(q, p, 0.5, distance="l2") == pytest.approx(1.291667, abs=1e-6)


@pytest.mark.parametrize(
    ("kind", "mirror", "pairs"), [("cosine", 0.176777, 0.330809), ("l2", 0.291667, 0.388889), ("pearson", 0, 0.125)]
)
def test_p11_three_dimensions(kind, mirror, pairs):
    q = torch.tensor([(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0)], dtype=torch.float64)
    p = torch.tensor([(2, 1, 1), (0, 1, 0), (1, 0, 0), (1, 1, 0)], dtype=torch.float64)
    assert loss(q, p, distance=kind, negatives="mirror") == pytest.approx(mirror, abs=1e-6)
    assert loss(q, p, distance=kind) == pytest.approx(pairs, abs=1e-6)


def test_p12_worst_case():
    q, p = torch.eye(2, dtype=torch.float64), torch.eye(2, dtype=torch.float64).flip(0)
    for m in (0.0, 0.5, 2.0):
        assert loss(q, p, m) == pytest.approx(1 + m) == loss(q, p, m, negatives="mirror")


def test_p14_precision_and_zero_vectors():
    q, p = random_pair()
    s = separate(q.bfloat16(), p.bfloat16())
    assert s.delta.dtype == torch.float32
    assert float(robustness_loss(s)) == pytest.approx(loss(q.bfloat16().double(), p.bfloat16().double()), abs=1e-6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert float(robustness_loss(separate(q.float(), p.float()))) == pytest.approx(loss(q, p), abs=1e-6)
    q[2] = 0
    with pytest.raises(NnsslError, match="1 of 8 .*samples 2"):
        separate(q, p)
    assert math.isfinite(loss(q, p, check=False))
    assert degenerate(q).nonzero().flatten().tolist() == [2]
    q[2] = 4.2
    assert degenerate(q, "pearson").nonzero().flatten().tolist() == [2] and not degenerate(q).any()
    q[2, 0] = math.nan
    assert degenerate(q, "l2").nonzero().flatten().tolist() == [2]


def test_a_case_is_never_its_own_negative():
    q, p = random_pair(n=4)
    q[1], p[1] = q[0], p[0]
    groups = ["a", "a", "b", "c"]
    s = separate(q, p, groups=groups)
    assert s.mask.int().tolist() == [[0, 0, 1, 1], [0, 0, 1, 1], [1, 1, 0, 1], [1, 1, 1, 0]]
    by_hand = [[2, 3], [2, 3], [0, 1, 3], [0, 1, 2]]
    table = distance_matrix(q, p)
    expected = sum(
        sum(max(0.0, float(table[i, i] - table[i, j]) + 0.5) for j in js) / len(js) for i, js in enumerate(by_hand)
    )
    assert float(robustness_loss(s, 0.5)) == pytest.approx(expected / 4, abs=1e-9)
    with pytest.raises(NnsslError, match="one case"):
        separate(q, p, groups=["a"] * 4)
    with pytest.raises(NnsslError, match="two samples of one case"):
        separate(q, p, groups=groups, negatives="mirror")


@pytest.mark.parametrize("options", [{"distance": "cosin"}, {"negatives": "al"}])
def test_unknown_options_name_the_nearest(options):
    with pytest.raises(NnsslError, match="Did you mean"):
        separate(*random_pair(), **options)


def test_pooling_keeps_positions_apart():
    x = torch.randn(2, 3, 4, 6, 2, generator=torch.Generator().manual_seed(0))
    assert pool(x, "gap").shape == (2, 3)
    assert pool(x, "flat").shape == (2, 3 * 48)
    grid = pool(x, "grid", grid=2).reshape(2, 3, 2, 2, 2)
    torch.testing.assert_close(grid[:, :, 1, 0, 1], x[:, :, 2:, :3, 1].mean(dim=(2, 3)))
    assert pool(x, "grid", grid=4).shape == (2, 3 * 4 * 4 * 2)
    torch.testing.assert_close(pool(x, "gap"), x.mean(dim=(2, 3, 4)))
    assert pool(x.bfloat16(), "gap").dtype == torch.float32
    with pytest.raises(NnsslError, match="Did you mean 'grid'"):
        pool(x, "gridd")


@pytest.mark.parametrize("kind", KINDS)
def test_distances_to_positive_and_negatives_against_a_loop(kind):
    q, p = random_pair(6)
    groups = "aabcca"
    s = separate(q, p, distance=kind, groups=list(groups))
    for i in range(6):
        near = slow_distance(q[i], p[i], kind)
        far = [slow_distance(q[i], p[j], kind) for j in range(6) if groups[i] != groups[j]]
        assert float(s.positive[i]) == pytest.approx(near, abs=1e-12)
        assert float(s.negative[i]) == pytest.approx(sum(far) / len(far), abs=1e-12)
        assert float(hinge(s, 0.3)[i]) == pytest.approx(sum(max(0, near - f + 0.3) for f in far) / len(far), abs=1e-12)
    mirrored = separate(q, p, distance=kind, negatives="mirror")
    for i, j in enumerate(mirror_index(6).tolist()):
        assert float(mirrored.negative[i]) == pytest.approx(slow_distance(q[i], p[j], kind), abs=1e-12)


def test_pearson_of_constants_is_that_of_strangers():
    """Rounding leaves a constant vector a direction; it has no correlation with anything."""
    x = torch.stack([torch.full((7,), 0.1), torch.full((7,), 1e6 / 3), torch.arange(7.0), torch.zeros(7)])
    assert degenerate(x, "pearson").tolist() == [True, True, False, True]
    assert degenerate(x, "cosine").tolist() == [False, False, False, True]
    assert degenerate(x, "l2").tolist() == [False, False, False, False]
    assert degenerate(torch.tensor([[1.0, math.nan], [math.inf, 1.0]]), "l2").tolist() == [True, True]
    exact = torch.tensor([[0.5] * 8, [float(i) for i in range(8)]])
    assert distance_matrix(exact, exact, "pearson").flatten().tolist() == pytest.approx([1, 1, 1, 0], abs=1e-6)
    slightly = torch.full((1, 7), 100.0) + 1e-3 * torch.arange(7.0)
    assert not degenerate(slightly, "pearson").any()
