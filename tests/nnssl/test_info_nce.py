import math

import pytest
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F

from nnssl.losses import info_nce as module
from nnssl.losses.info_nce import InfoNCE, chance_level, info_nce, nearest_share, similarities

EYE = [[1.0, 0.0], [0.0, 1.0]]


def _unit(n, d=8, seed=0):
    z = torch.randn(2, n, d, generator=torch.Generator().manual_seed(seed))
    return F.normalize(z, dim=2).unbind(0)


def _slow(a, b, tau):
    """Double loop over the formula of the docstring."""
    views, n, total = (a, b), len(a), 0.0
    for k in (0, 1):
        for i in range(n):
            positive = math.exp(float(views[k][i] @ views[1 - k][i]) / tau)
            negatives = sum(
                math.exp(float(views[k][i] @ views[m][j]) / tau) for j in range(n) if j != i for m in (0, 1)
            )
            total += math.log(positive + negatives) - math.log(positive)
    return total / (2 * n)


@pytest.mark.parametrize(
    ("a", "b", "tau", "value"),
    [
        (EYE, EYE, 1.0, 0.551445),
        (EYE, EYE, 0.1, 9.0796e-5),
        (EYE, EYE[::-1], 1.0, 1.551445),
        (EYE, EYE[::-1], 0.1, 10.000091),
        ([[1.0, 0.0], [1.0, 0.0]], EYE, 1.0, 1.171149),  # anchors of one view only would give 1.361995
        (EYE, [[0.6, 0.8], [0.0, 1.0]], 1.0, 0.885449),
        (EYE, [[0.6, 0.8], [0.0, 1.0]], 0.5, 0.758885),
        (EYE, [[0.6, 0.8], [0.0, 1.0]], 0.1, 0.754376),
    ],
)
def test_by_hand(a, b, tau, value):
    loss = InfoNCE(temperature=tau)(torch.tensor(a), torch.tensor(b))
    assert loss.item() == pytest.approx(value, abs=1e-5)


@pytest.mark.parametrize("tau", [1.0, 0.1])
@pytest.mark.parametrize("n", [2, 7])
def test_equal_vectors_give_the_chance_level(tau, n):
    z = F.normalize(torch.ones(n, 4), dim=1).requires_grad_()
    loss = InfoNCE(temperature=tau)(z, z)
    assert loss.item() == pytest.approx(math.log(2 * n - 1), abs=1e-5) == pytest.approx(chance_level(n), abs=1e-5)
    loss.backward()
    assert torch.isfinite(z.grad).all()


def test_one_pair_is_exactly_zero_and_none_has_a_graph():
    a, b = _unit(1)
    a = a.clone().requires_grad_()
    loss = InfoNCE(temperature=0.1)(a, b)
    loss.backward()
    assert loss.item() == 0 and torch.isfinite(a.grad).all()
    empty = torch.zeros(0, 4, requires_grad=True)
    loss = InfoNCE()(empty, empty)
    loss.backward()
    assert loss.item() == 0 and chance_level(0) == 0


@pytest.mark.parametrize("n", [1, 5, 12])
def test_equals_a_double_loop_and_a_cross_entropy(n):
    a, b = _unit(n)
    loss = info_nce(a, b, 0.3)
    assert loss.item() == pytest.approx(_slow(a, b, 0.3), abs=1e-5)
    rows = []
    for first, second in ((a, b), (b, a)):
        for i in range(n):
            others = [j for j in range(n) if j != i]
            rows.append(
                torch.cat([(first[i] @ second[i])[None], first[others] @ first[i], second[others] @ first[i]]) / 0.3
            )
    logits = torch.stack(rows)
    assert logits.shape == (2 * n, 2 * n - 1)
    assert loss.item() == pytest.approx(F.cross_entropy(logits, torch.zeros(2 * n, dtype=torch.long)).item(), abs=1e-5)


def test_invariances():
    a, b = _unit(9)
    loss = InfoNCE()(a, b)
    order = torch.randperm(9)
    scale = torch.rand(9, 1) + 0.5
    torch.testing.assert_close(InfoNCE()(b, a), loss)
    torch.testing.assert_close(InfoNCE()(a[order], b[order]), loss)
    torch.testing.assert_close(InfoNCE()(a * scale, 3 * b), loss)
    assert abs(InfoNCE()(a, b.flip(0)) - loss) > 1e-2


@pytest.mark.parametrize("chunk", [1, 5, 7, 24, 100])
def test_blocks_equal_the_whole_in_value_and_gradient(chunk):
    grads = []
    for c in (10**6, chunk):
        a, b = (z.clone().requires_grad_() for z in _unit(12))
        loss = info_nce(a, b, 0.1, c)
        loss.backward()
        grads.append((loss.detach(), a.grad, b.grad))
    for whole, blocks in zip(*grads):
        torch.testing.assert_close(blocks, whole)


@pytest.mark.parametrize(("chunk", "grad", "blocks"), [(24, True, 0), (23, True, 2), (8, True, 3), (8, False, 0)])
def test_only_several_blocks_with_a_gradient_are_computed_twice(chunk, grad, blocks, monkeypatch):
    """12 pairs are 24 anchors; what fits into one block, or needs no gradient, would be computed again for nothing."""
    taken = []
    monkeypatch.setattr(module, "checkpoint", lambda f, *args, **_: taken.append(args) or f(*args))
    a, b = (z.clone().requires_grad_(grad) for z in _unit(12))
    assert info_nce(a, b, 0.1, chunk).item() == pytest.approx(_slow(a.detach(), b.detach(), 0.1), abs=1e-5)
    assert len(taken) == blocks


def test_an_anchor_is_not_compared_with_itself():
    a, b = (z.double() for z in _unit(4))
    a.requires_grad_()
    # With vectors longer than 1 a self-similarity would dominate each sum.
    scaled = info_nce(a * 3, b * 3, 1.0)
    assert scaled.item() == pytest.approx(_slow(a.detach() * 3, b * 3, 1.0), abs=1e-9)


def test_scope_of_the_negatives():
    a, b = _unit(10)
    group = torch.tensor([0, 1, 1, 0, 1, 1, 1, 0, 2, 1])
    apart = sum(info_nce(a[group == g], b[group == g], 0.1) * (group == g).sum() for g in (0, 1, 2)) / 10
    torch.testing.assert_close(InfoNCE()(a, b, group), apart)
    torch.testing.assert_close(InfoNCE()(a, b, torch.zeros(10, dtype=torch.long)), InfoNCE()(a, b))
    assert InfoNCE()(a, b, torch.arange(10)).item() == 0


def test_half_precision_input_is_compared_in_float32():
    a, b = _unit(6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = InfoNCE()(a, b)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, InfoNCE()(a, b))


def test_nearest_share():
    a, b = _unit(50, d=32)
    assert nearest_share(a, a).item() == 1
    assert nearest_share(a, b, chunk=7).item() < 0.2
    ones = F.normalize(torch.ones(10, 3), dim=1)
    assert nearest_share(ones, ones).item() == pytest.approx(0.1)
    expected = sum(int((a[i] @ b.T).argmax()) == i for i in range(50)) / 50
    assert nearest_share(a, b, chunk=7).item() == pytest.approx(expected)


def test_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match="positive"):
        InfoNCE(temperature=0)
    with pytest.raises(ValueError, match=r"\(N, D\)"):
        info_nce(torch.zeros(2, 3), torch.zeros(3, 3), 0.1)


@pytest.mark.slow
def test_ten_thousand_pairs_fit_in_memory(tmp_path):
    """Peak memory of a process that takes the loss and gradient of 10,240 pairs; all at once it is 5 GB."""
    context = mp.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=_big, args=(results,))
    process.start()
    loss, extra = results.get(timeout=300)
    process.join()
    assert abs(loss - math.log(2 * 10240 - 1)) < 1
    assert extra < 1.0e9


def _big(results):
    import resource

    torch.set_num_threads(2)
    a, b = (torch.randn(10240, 128).requires_grad_() for _ in range(2))
    InfoNCE()(a[:64], b[:64]).backward()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    loss = InfoNCE(temperature=1.0)(a, b)
    loss.backward()
    results.put((loss.item(), 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)))


@pytest.mark.parametrize("n", [2, 7])
def test_similarities_against_a_double_loop(n):
    """Positive pairs are rows; the others are all pairs of different rows, within a view and across."""
    a, b = _unit(n, seed=3)
    positive, other = similarities(a, b)
    assert positive.item() == pytest.approx(sum(float(a[i] @ b[i]) for i in range(n)) / n, abs=1e-6)
    z, row = torch.cat([a, b]), [*range(n), *range(n)]
    pairs = [float(z[i] @ z[j]) for i in range(2 * n) for j in range(2 * n) if row[i] != row[j]]
    assert len(pairs) == 2 * n * (2 * n - 2)
    assert other.item() == pytest.approx(sum(pairs) / len(pairs), abs=1e-6)


def test_rows_count_as_equally_similar_within_rounding_only():
    """Two rows of b that differ in similarity by 5e-5, and by 5e-8."""
    for angle, share in ((0.01, 1.0), (3e-4, 0.5)):
        b = torch.tensor([[1.0, 0.0], [math.cos(angle), math.sin(angle)]])
        a = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        assert nearest_share(a[:1], b).item() == pytest.approx(share)
        assert nearest_share(a[:1], b.flip(0)).item() == pytest.approx(0.0 if share == 1 else 0.5)
