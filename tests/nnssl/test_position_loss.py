"""The position loss, the regularisation and their levels (spec 4 and tests 10 to 22)."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from nnssl.losses.overlap import overlap_labels
from nnssl.losses.position import EPS, NEGATIVES, WEIGHTINGS, PositionLoss, orthogonality, similarity
from nnssl.pretrain.methods.voco.levels import chance_levels


def labels(b=2, s=3, grid=(1, 3, 2), size=(4, 5, 6), seed=0):
    generator = torch.Generator().manual_seed(seed)
    room = torch.tensor([(g - 1) * c + 1 for g, c in zip(grid, size)])
    offset = (torch.rand(b, s, len(grid), generator=generator) * room).long()
    return overlap_labels(offset, size, grid), torch.rand(b, s, math.prod(grid), generator=generator)


def naive(y, s, weighting, negatives, pool):
    """Double loop over the formula, in Python floats."""
    volumes = [list(range(len(y)))] if pool == "batch" else [[i] for i in range(len(y))]
    losses = []
    for members in volumes:
        pairs = [(float(a), float(b)) for i in members for a, b in zip(y[i].flatten(), s[i].flatten())]
        cost = [-math.log(max(1 - abs(a - b), 0) + EPS) for a, b in pairs]
        zeros = [b for a, b in pairs if a == 0]
        if weighting == "overlap":
            positive = sum(a * c for (a, _), c in zip(pairs, cost)) / (sum(a for a, _ in pairs) + EPS)
        else:
            chosen = [c for (a, _), c in zip(pairs, cost) if a > 0 or weighting == "all"]
            positive = sum(chosen) / len(chosen)
        if weighting == "all":
            negative = 0.0
        elif negatives == "square":
            negative = sum(b * b for b in zeros) / len(zeros)
        else:
            negative = sum(-math.log(max(1 - b, 0) + EPS) for b in zeros) / (len(zeros) + EPS)
        losses.append(positive + negative)
    return sum(losses) / len(losses)


@pytest.mark.parametrize("switches", list(itertools.product(WEIGHTINGS, NEGATIVES, ("volume", "batch"))))
def test_equals_the_double_loop(switches):
    """(17, 18) Each switch; a batch is the mean of its volumes' losses, but for pool=batch."""
    weighting, negatives, pool = switches
    y, s = labels()
    loss = PositionLoss(weighting=weighting, negatives=negatives, pool=pool)
    assert float(loss(y, s)) == pytest.approx(naive(y, s, *switches), rel=1e-5)
    assert float(loss(y.double(), s.double())) == pytest.approx(naive(y, s, *switches), rel=1e-12)  # where eps stands
    single = sum(float(loss(y[i : i + 1], s[i : i + 1])) for i in range(2)) / 2
    assert (float(loss(y, s)) == pytest.approx(single, rel=1e-5)) == (pool == "volume" or weighting == "all")


def test_perfect_prediction_costs_nothing():
    """(10) eps makes it slightly negative."""
    y, _ = labels()
    assert -2e-6 <= float(PositionLoss()(y, y)) <= 2e-6


def test_hand_values():
    """(11, 12)"""
    y, s = torch.tensor([[[0.0, 1.0, 0.0]]]), torch.zeros(1, 1, 3)
    assert float(PositionLoss()(y, s)) == pytest.approx(13.8155, abs=1e-3)
    y, s = torch.tensor([[[0.5, 0.5, 0, 0]]]), torch.tensor([[[0.5, 0, 0.2, 0]]])
    assert float(PositionLoss()(y, s)) == pytest.approx(0.346574 + 0.111572, abs=1e-5)


def test_nearer_is_never_worse():
    """(13) Moving any similarity towards its overlap does not raise the loss."""
    y, s = labels(1, 2)
    loss = PositionLoss()
    before = float(loss(y, s))
    for i, j in itertools.product(range(2), range(y.shape[-1])):
        for share in (0.1, 0.5, 1.0):
            moved = s.clone()
            moved[0, i, j] += share * (y[0, i, j] - s[0, i, j])
            assert float(loss(y, moved)) <= before + 1e-6


def test_parts_see_their_own_cells():
    """(14) The positive part has gradients only where y > 0, the negative part only where y == 0."""
    y, s = labels()
    gradients = []
    for weighting, negatives in (("overlap", "log"), ("overlap", "square"), ("binary", "log")):
        moving = s.clone().requires_grad_()
        PositionLoss(weighting=weighting, negatives=negatives)(y, moving).backward()
        gradients.append(moving.grad)
    both, other_negative, other_positive = gradients
    assert torch.equal(both != other_negative, y == 0)
    assert torch.equal(both[y == 0], other_positive[y == 0]) and bool((both != other_positive)[y > 0].any())


def test_target_without_any_overlap():
    """(15) What the teacher's dead similarities look like."""
    _, s = labels()
    value = PositionLoss()(torch.zeros_like(s), s)
    assert float(value) == pytest.approx(float(-(1 - s + EPS).log().mean()), rel=1e-5)
    assert float(PositionLoss()(torch.zeros_like(s), torch.zeros_like(s))) == pytest.approx(0, abs=2e-6)


def test_masked_pairs_do_not_count():
    y, s = labels()
    valid = torch.ones_like(y, dtype=torch.bool)
    valid[1] = False
    garbage = torch.where(valid, s, math.nan).requires_grad_()
    loss = PositionLoss()(y, garbage, valid)
    assert float(loss) == pytest.approx(float(PositionLoss()(y[:1], s[:1])), rel=1e-6)
    loss.backward()
    assert bool((garbage.grad[1] == 0).all()) and bool((garbage.grad[0] != 0).any())
    nothing = PositionLoss()(y, s.clone().requires_grad_(), torch.zeros_like(valid))
    assert float(nothing) == 0 and nothing.requires_grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision(dtype):
    """(19) Also at s = 1 for a cell without overlap, and with a cosine of -1."""
    u, v = torch.randn(2, 3, 8, dtype=dtype), torch.randn(2, 6, 8, dtype=dtype)
    u[0, 0], v[0, 0] = 1.0, 1.0
    with torch.autocast("cpu", dtype=torch.bfloat16):
        s = similarity(u, v, relu=False)
    assert s.dtype == torch.float32 and float(s[0, 0, 0]) == pytest.approx(1, abs=1e-5)
    y = torch.zeros(2, 3, 6)
    y[..., 2] = 1
    for weighting in WEIGHTINGS:
        loss = PositionLoss(weighting=weighting)(y.to(dtype), s.to(dtype))
        assert loss.dtype == torch.float32 and bool(loss.isfinite())


def test_similarity():
    u, v = torch.randn(2, 3, 5), torch.randn(2, 4, 5)
    expected = torch.cosine_similarity(u[:, :, None], v[:, None], dim=-1)
    torch.testing.assert_close(similarity(u, v, relu=False), expected)
    torch.testing.assert_close(similarity(u, v), expected.relu())
    assert float(similarity(torch.zeros(1, 5), v[0]).abs().max()) == 0


def test_orthogonality():
    """(16, 17) 0 for orthogonal and antiparallel bases, 1 for equal ones; order and lengths do not matter."""
    eye = torch.eye(4)[None]
    assert float(orthogonality(eye)) == 0
    assert float(orthogonality(torch.ones(1, 4, 5))) == pytest.approx(1)
    assert float(orthogonality(torch.stack([eye[0, 0], -eye[0, 0]])[None])) == 0
    assert float(orthogonality(torch.stack([eye[0, 0], -eye[0, 0]])[None], relu=False, kind="linear")) == 1
    q = torch.randn(2, 5, 6)
    value = float(orthogonality(q))
    s = torch.cosine_similarity(q[:, :, None], q[:, None], dim=-1).relu()
    slow = [float(s[b, i, j]) for b in range(2) for i in range(5) for j in range(i + 1, 5)]
    assert value == pytest.approx(sum(x * x for x in slow) / 20, rel=1e-5)
    assert float(orthogonality(q, kind="linear")) == pytest.approx(sum(slow) / 20, rel=1e-5)
    assert float(orthogonality(q[:, torch.randperm(5)] * torch.rand(2, 5, 1).add(0.5))) == pytest.approx(
        value, rel=1e-5
    )
    valid = torch.tensor([[True, True, False, True, False]] * 2)
    assert float(orthogonality(q, valid=valid)) == pytest.approx(float(orthogonality(q[:, [0, 1, 3]])), rel=1e-5)


def test_gradient_of_the_regularisation():
    """(22) Every base gets one; with ``detach``, as released, the last one gets none and the first all of its pairs."""
    for detach in (False, True):
        q = torch.rand(1, 4, 6, requires_grad=True)
        orthogonality(q, detach=detach).backward()
        size = q.grad.norm(dim=-1)[0]
        assert bool((size[:-1] > 0).all()) and (float(size[-1]) == 0) == detach
    q = torch.rand(1, 4, 6, requires_grad=True)
    orthogonality(q).backward()
    assert float(q.grad[0, -1].norm()) > 0  # the default


def test_gradient_of_the_position_loss():
    """(20) None for the target and, through a detached teacher, none for the base crops."""
    r, q = torch.randn(1, 3, 8, requires_grad=True), torch.randn(1, 6, 8, requires_grad=True)
    y = labels(1)[0].requires_grad_()
    PositionLoss()(y, similarity(r, q.detach())).backward()
    assert y.grad is None and q.grad is None and float(r.grad.abs().sum()) > 0


MEASURED = [  # 64 voxels, two random crops: orthogonal, constant (log, square), collapse
    ((3, 3, 1), 0.735, 0.592, 0.367, 14.81),
    ((4, 4, 1), 0.715, 0.591, 0.366, 14.82),
    ((2, 2, 1), 0.759, 0.304, 0.257, 2.55),
    ((2, 2, 2), 0.420, 0.243, 0.201, 3.65),
]


@pytest.mark.parametrize(("grid", "orthogonal", "log", "square", "collapse"), MEASURED)
def test_levels_are_those_measured_by_sampling(grid, orthogonal, log, square, collapse):
    levels = chance_levels((64, 64, 64), grid, crops=2)
    assert levels.orthogonal == pytest.approx(orthogonal, rel=0.03)
    assert levels.constant == pytest.approx(log, rel=0.03)
    assert levels.collapse == pytest.approx(collapse, rel=0.06)
    assert chance_levels((64, 64, 64), grid, crops=2, negatives="square").constant == pytest.approx(square, rel=0.03)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_levels_are_the_mean_loss_over_all_offsets(weighting):
    size, grid = (4, 3), (2, 3)
    room = [range((g - 1) * c + 1) for g, c in zip(grid, size)]
    offset = torch.tensor(list(itertools.product(*room)))
    y = overlap_labels(offset, size, grid)[:, None]
    levels = chance_levels(size, grid, weighting=weighting)
    loss = PositionLoss(weighting=weighting)

    def mean(s):
        return float(loss(y, torch.full_like(y, s)))

    assert levels.orthogonal == pytest.approx(mean(0.0), abs=1e-4)
    assert levels.collapse == pytest.approx(mean(1.0), rel=1e-4)
    assert levels.constant == pytest.approx(min(mean(s / 200) for s in range(200)), abs=1e-3)
    assert mean(levels.similarity) == pytest.approx(levels.constant, abs=1e-4)


def test_unknown_switches():
    for bad in ({"weighting": "sum"}, {"negatives": "abs"}, {"pool": "all"}):
        with pytest.raises(ValueError, match="none of"):
            PositionLoss(**bad)
    with pytest.raises(ValueError, match="none of"):
        orthogonality(torch.zeros(1, 2, 3), kind="cubic")


def test_orthonormal_bases_can_be_predicted_exactly():
    """Feasibility: intra and reg are 0 together."""
    y, _ = labels(1, 3, (1, 2, 2), (4, 4, 4))
    q = torch.eye(8)[None, :4]
    y = y / y.norm(dim=-1, keepdim=True) * 0.9
    r = torch.cat([y, (1 - y.square().sum(-1, keepdim=True)).sqrt(), torch.zeros(1, 3, 3)], -1)
    assert float(PositionLoss()(y, similarity(r, q))) == pytest.approx(0, abs=3e-6)
    assert float(orthogonality(q)) == 0
    assert float(F.normalize(r, dim=-1).norm(dim=-1).min()) == pytest.approx(1)


def test_masked_pairs_and_targets_that_do_not_add_up():
    """By hand: the weights of what counts are normalised, and nothing else weighs."""
    y, s, valid = torch.tensor([[[0.5, 0.5]]]), torch.tensor([[[0.25, 0.0]]]), torch.tensor([[[True, False]]])
    for weighting in WEIGHTINGS:  # one pair counts: -ln(1 - 0.25)
        assert float(PositionLoss(weighting=weighting)(y, s, valid)) == pytest.approx(0.28768, abs=1e-5)
    y, s = torch.tensor([[[0.2, 0.0]]]), torch.tensor([[[0.1, 0.0]]])
    assert float(PositionLoss()(y, s)) == pytest.approx(0.10536, abs=1e-5)  # -ln(1 - 0.1), whatever y adds up to
    y, s = torch.tensor([[[0.4, 0.0, 0.0]]]), torch.tensor([[[0.4, 0.5, 0.9]]])
    valid = torch.tensor([[[True, True, False]]])  # of the cells without overlap only one counts
    assert float(PositionLoss()(y, s, valid)) == pytest.approx(math.log(2), abs=1e-5)
    assert float(PositionLoss(negatives="square")(y, s, valid)) == pytest.approx(0.25, abs=1e-5)


@pytest.mark.parametrize("switches", list(itertools.product(WEIGHTINGS, NEGATIVES, ("volume", "batch"))))
def test_what_is_masked_is_as_if_it_were_not_there(switches):
    weighting, negatives, pool = switches
    y, s = labels(2, 4)
    y[:, :, 0] = 0  # so that both kinds of cells are left in each volume
    valid = torch.ones_like(y, dtype=torch.bool)
    valid[:, 1] = False
    loss = PositionLoss(weighting=weighting, negatives=negatives, pool=pool)
    left = [0, 2, 3]
    assert float(loss(y, s, valid)) == pytest.approx(float(loss(y[:, left], s[:, left])), rel=1e-5)


@pytest.mark.parametrize("kind", ["square", "linear"])
def test_regularisation_without_a_masked_base(kind):
    q, valid = torch.randn(2, 5, 8), torch.ones(2, 5, dtype=torch.bool)
    valid[:, 3] = False
    left = [0, 1, 2, 4]
    expected = float(orthogonality(q[:, left], kind=kind))
    assert float(orthogonality(q, kind=kind, valid=valid)) == pytest.approx(expected, rel=1e-5)
    valid[0, 1:] = False  # one base is left: no pair, and the volume does not count
    assert float(orthogonality(q, kind=kind, valid=valid)) == pytest.approx(
        float(orthogonality(q[1:, left], kind=kind)), rel=1e-5
    )
