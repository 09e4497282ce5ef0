"""DINO's form of agreement: values, invariances, the order of the centre, and what tells that it went wrong."""

import math
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F

from nnssl.heads.dino import DinoHead, RunningStandardisation, pool_stages
from nnssl.losses.consistency import (
    Centre,
    Health,
    alignment,
    consistency,
    diagnose,
    embedding_spread,
    entropy,
    koleo,
    retrieval,
    teacher_targets,
    variance_hinge,
)

K = 12


@pytest.mark.parametrize(("p", "v", "b"), [(1, 1, 3), (2, 2, 4), (2, 5, 3), (3, 1, 2)])
def test_all_pairs_against_a_loop(p, v, b):
    said, logits, centre = torch.randn(p, b, K), torch.randn(v, b, K), torch.randn(K)
    q = teacher_targets(said, centre, 0.04)
    torch.testing.assert_close(q.sum(-1), torch.ones(p, b))
    total = 0.0
    for i in range(p):
        for j in range(v):
            for n in range(b):
                target = F.softmax((said[i, n] - centre) / 0.04, 0)
                total += -(target * F.log_softmax(logits[j, n] / 0.1, 0)).sum()
    torch.testing.assert_close(consistency(q, logits, 0.1), total / (p * v * b))
    order = torch.randperm(v)
    torch.testing.assert_close(consistency(q, logits[order], 0.1), consistency(q, logits, 0.1))


def test_values_that_are_known():
    q = teacher_targets(torch.randn(1, 5, K), torch.zeros(K), 0.04)
    assert consistency(q, torch.zeros(2, 5, K), 0.1).item() == pytest.approx(math.log(K), rel=1e-5)
    logits = torch.randn(1, 5, K)
    assert consistency(q, logits, 0.1) >= entropy(q).mean()
    said, centre = torch.randn(1, 5, K), torch.randn(K)
    q = teacher_targets(said, centre, 0.3)
    same = (said - centre) / 0.3 * 0.1
    torch.testing.assert_close(consistency(q, same, 0.1), entropy(q).mean())
    torch.testing.assert_close(teacher_targets(said + 7.0, centre, 0.3), q, atol=1e-5, rtol=1e-4)
    assert entropy(torch.eye(K)).abs().max() == 0


def test_gradient_reaches_the_student_only():
    said = torch.randn(1, 3, K, requires_grad=True)
    logits = torch.randn(2, 3, K, requires_grad=True)
    consistency(teacher_targets(said, torch.zeros(K), 0.04), logits, 0.1).backward()
    assert said.grad is None and torch.isfinite(logits.grad).all() and logits.grad.abs().sum() > 0


def test_centre_moves_after_the_step():
    centre, expected = Centre(K, 0.9), torch.zeros(K)
    for _ in range(5):
        logits = torch.randn(2, 3, K)
        centre.observe(logits)
        assert torch.equal(centre.value, expected)
        centre.step()
        expected = 0.9 * expected + 0.1 * logits.reshape(-1, K).mean(0)
        torch.testing.assert_close(centre.value, expected)
        expected = centre.value.clone()
    centre.step()  # a skipped step observes nothing new
    assert torch.equal(centre.value, expected)


def test_health_tells_collapse_from_plateau():
    images = torch.randn(1, 64, 256)
    cases = {
        "collapse": torch.eye(256)[torch.zeros(64, dtype=torch.long)][None],
        "plateau": F.softmax(images / 1000, -1),
        "same": F.softmax(images[:, :1].expand(1, 64, 256) / 0.7, -1),
    }
    for name, targets in cases.items():
        single, mean = Health(256)(targets)
        word = "collapse" if name == "collapse" else "plateau"
        assert diagnose(float(single), float(mean), 1.0, 256).startswith(word), name
    health = Health(256)
    for _ in range(50):
        single, mean = health(F.softmax(torch.randn(1, 4, 256) / 0.5, -1))
    assert single < 0.8 * mean and mean > 0.9 * math.log(256)
    assert diagnose(float(single), float(mean), 1.0, 256) is None
    assert diagnose(float(single), float(mean), 0.01, 256).startswith("collapse")
    before = health.mean.clone()
    health.eval()(torch.eye(256)[None, :4])
    assert torch.equal(health.mean, before)


def test_the_mean_target_is_that_of_all_steps_at_first_then_of_the_last_ones():
    """1/2 and 1/3 of the second and the third step; after a thousand steps one counts for 0.02."""
    health, here, there = Health(2), torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    shares = [(health(x), health.mean.tolist()[1])[1] for x in (here, there, there, here)]
    assert shares == pytest.approx([0, 1 / 2, 2 / 3, 1 / 2]) and health.count == 4
    health.mean.copy_(here[0]), health.count.fill_(1000)
    health(there)
    assert health.mean.tolist() == pytest.approx([0.98, 0.02])
    assert Centre(2).momentum == 0.99


def test_running_standardisation():
    norm = RunningStandardisation(3, momentum=0.9)
    scale, shift = torch.tensor([0.01, 1.0, 100.0]), torch.tensor([50.0, 0.0, -3.0])
    data = torch.randn(200, 5, 3) * scale + shift
    for i, batch in enumerate(data):
        out = norm(batch)
        if i == 0:  # the first batch's own moments
            expected = (batch - batch.mean(0)) / (batch.var(0, unbiased=False) + norm.eps).sqrt()
            torch.testing.assert_close(out, expected, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(norm.var.sqrt(), scale, rtol=0.3, atol=0)
    assert ((norm.mean - shift).abs() < 0.4 * scale).all()
    before = norm.mean.clone()
    norm.eval()
    x = torch.randn(2, 3)
    assert torch.equal(norm(x), (x - norm.mean) * (norm.var + norm.eps).rsqrt()) and torch.equal(norm.mean, before)
    fresh = RunningStandardisation(3).eval()
    assert fresh(data[0]).std() > 0.5 and fresh.count == 0


def test_from_the_first_step_on_eval_uses_what_was_kept():
    norm = RunningStandardisation(1)
    before = norm.eval()(torch.tensor([[1.0], [1.4]]))  # nothing is kept yet: the batch's own, mean 1.2 and SD 0.2
    assert before.flatten().tolist() == pytest.approx([-1.0, 1.0], rel=1e-4)
    norm.train()
    norm(torch.tensor([[1.0], [3.0]]))  # mean 2, variance 1
    assert norm.eval()(torch.tensor([[7.0], [9.0]])).flatten().tolist() == pytest.approx([5.0, 7.0], rel=1e-5)


def test_features_far_smaller_than_one_are_standardised_too():
    """SD 0.01: 1e-6 beside a variance of 1e-4 is half a per cent of the SD."""
    out = RunningStandardisation(1)(torch.tensor([[0.99], [1.01]]))
    assert out.flatten().tolist() == pytest.approx([-1 / 1.01**0.5, 1 / 1.01**0.5], rel=1e-3)


def test_running_moments_are_those_of_a_mixture():
    norm = RunningStandardisation(2, momentum=0.5)
    a, b = torch.randn(4, 2) + 3, 2 * torch.randn(4, 2)
    norm(a), norm(b)
    everything = torch.cat([a, b])  # half and half
    torch.testing.assert_close(norm.mean, everything.mean(0))
    torch.testing.assert_close(norm.var, everything.var(0, unbiased=False))


def test_moments_of_the_batch():
    """While training the batch's own moments, with gradient; what is kept for eval is the same as without."""
    x = torch.randn(6, 4, dtype=torch.float64).float() * 3 + 2
    own, running = RunningStandardisation(4, 0.9, batch=True), RunningStandardisation(4, 0.9)
    for i in range(3):
        y = (x + i).requires_grad_()
        out = own(y)
        running(y)
        torch.testing.assert_close(out.mean(0), torch.zeros(4), atol=1e-5, rtol=0)
        torch.testing.assert_close(out.std(0, unbiased=False), torch.ones(4), atol=1e-4, rtol=0)
        (out * torch.randn(4)).sum().backward()
        assert y.grad.abs().max() < 1e-4  # a common shift of the batch changes nothing
    torch.testing.assert_close(own.eval()(x), running.eval()(x))
    torch.testing.assert_close(own.mean, running.mean)


def test_no_gradient_runs_through_the_moments():
    norm = RunningStandardisation(2)
    x = torch.randn(4, 2, requires_grad=True)
    norm(x).sum().backward()
    torch.testing.assert_close(x.grad, (norm.var + norm.eps).rsqrt().expand(4, 2))


def test_head():
    head = DinoHead(10, 20, hidden=8, bottleneck=6)
    x = torch.randn(5, 10)

    def outputs():
        return head.logits(F.normalize(head.project(x), dim=1))

    z, logits = F.normalize(head.project(x), dim=1), outputs()
    torch.testing.assert_close(logits, F.cosine_similarity(z[:, None], head.prototypes[None], dim=-1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(outputs(), logits)
    torch.nn.init.zeros_(head.prototypes)
    logits = outputs()
    assert (logits == 0).all()
    logits.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in head.parameters())


@pytest.mark.parametrize("size", [(2, 3, 4), (5, 2), (1, 1, 1)])
def test_pooling(size):
    maps = [torch.randn(3, 2, *size), torch.randn(3, 4, *[2 * n for n in size])]
    got = pool_stages(maps)
    assert got.shape == (3, 12)
    assert torch.equal(pool_stages(maps, maximum=False), got[:, [0, 1, 4, 5, 6, 7]])
    for b in range(3):
        expected = torch.cat([t for m in maps for t in (m[b].flatten(1).mean(1), m[b].flatten(1).amax(1))])
        torch.testing.assert_close(got[b], expected)
    active = [torch.rand(3, 1, *m.shape[2:]) < 0.5 for m in maps]
    active[0][2] = False
    part = pool_stages(maps, active)
    assert torch.isfinite(part).all() and (part[2, :4] == 0).all()
    on = active[1][0, 0]
    torch.testing.assert_close(part[0, 4:8], maps[1][0][:, on].mean(1) if on.any() else torch.zeros(4))


def _worker(index, port, folder):
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=index, world_size=2)
    x = torch.randn(8, K, generator=torch.Generator().manual_seed(0))[4 * index : 4 * index + 4]
    centre, norm, health = Centre(K), RunningStandardisation(K), Health(K)
    centre.observe(x)
    centre.step()
    norm(x)
    health(F.softmax(x, -1))
    torch.save((centre.value, norm.mean, norm.var, health.mean), f"{folder}/{index}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_have_the_moments_of_one(tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.spawn(_worker, args=(port, str(tmp_path)), nprocs=2)
    x = torch.randn(8, K, generator=torch.Generator().manual_seed(0))
    centre, norm, health = Centre(K), RunningStandardisation(K), Health(K)
    centre.observe(x)
    centre.step()
    norm(x)
    health(F.softmax(x, -1))
    for i in range(2):
        for mine, theirs in zip((centre.value, norm.mean, norm.var, health.mean), torch.load(tmp_path / f"{i}.pt")):
            torch.testing.assert_close(theirs, mine, atol=1e-6, rtol=1e-5)


# ---------------------------------------------------------------------------------------------- without prototypes


@pytest.mark.parametrize("kind", ["cosine", "mse"])
def test_alignment_is_the_mean_over_all_pairs(kind):
    z, e = torch.randn(3, 4, 5), torch.randn(2, 4, 5)
    total = 0.0
    for j in range(3):
        for i in range(2):
            for b in range(4):
                a, t = z[j, b], e[i, b]
                if kind == "cosine":
                    total += float(1 - (a @ t) / (a.norm() * t.norm()))
                else:
                    total += float(((a - t) ** 2).sum() / 5)
    loss = alignment(z.requires_grad_(), e.requires_grad_(), kind)
    assert loss.item() == pytest.approx(total / 24, rel=1e-5)
    loss.backward()
    assert e.grad is None and torch.isfinite(z.grad).all()
    assert alignment(e.repeat(2, 1, 1)[:1], e[:1], kind).item() == pytest.approx(0, abs=1e-6)
    with pytest.raises(ValueError, match="'l2'"):
        alignment(z, e, "l2")


def test_variance_hinge():
    same = torch.randn(2, 1, 6).expand(2, 5, 6)
    assert variance_hinge(same).item() == pytest.approx(1 - 1e-2)  # sqrt(eps)
    assert variance_hinge(3 * torch.randn(2, 5000, 6)) == 0
    z = torch.randn(2, 5, 6)
    sd = (z.double().var(1, unbiased=False) + 1e-4).sqrt()
    assert variance_hinge(z).item() == pytest.approx((1 - sd).clamp(min=0).mean().item(), rel=1e-5)
    half = torch.tensor([[[0.5], [-0.5]]])  # SD 0.5 around 0
    assert variance_hinge(half).item() == pytest.approx(0.5, abs=1e-3)


def test_koleo():
    """By hand: distances to the nearest; views apart; single volumes and equal ones do no harm."""
    z = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]])
    assert koleo(z).item() == pytest.approx(-math.log(2**0.5))
    z = torch.tensor([[[1.0, 0.0], [0.8, 0.6], [-1.0, 0.0]]])  # nearest: 0.4^0.5, 0.4^0.5, (1.8^2 + 0.6^2)^0.5
    by_hand = -(math.log(0.4) / 2 * 2 + math.log(3.6) / 2) / 3
    assert koleo(z).item() == pytest.approx(by_hand, rel=1e-5)
    views = torch.cat([z, z.flip(1)])  # views apart: a volume's other view is no neighbour
    assert koleo(views).item() == pytest.approx(by_hand, rel=1e-5)
    assert koleo(z[:, :1]) == 0
    tight = torch.nn.functional.normalize(torch.ones(1, 4, 3) + 1e-3 * torch.randn(1, 4, 3), dim=-1)
    assert koleo(tight) > koleo(torch.nn.functional.normalize(torch.randn(1, 4, 3), dim=-1))
    same = torch.ones(1, 3, 2, requires_grad=True)
    koleo(same).backward()
    assert torch.isfinite(same.grad).all()


def test_retrieval_by_hand():
    """Two crops of one volume: either of its global views is a hit."""
    whole = torch.eye(3)
    local = torch.stack([torch.eye(3)[[0, 2, 1]], torch.eye(3)])
    hits, chance = retrieval(local, whole, torch.tensor([5, 6, 7]))
    assert hits.item() == pytest.approx(4 / 6) and chance.item() == pytest.approx(1 / 3)
    hits, chance = retrieval(local, whole, torch.tensor([5, 6, 6]))
    assert hits == 1 and chance.item() == pytest.approx(5 / 9)


def test_spread_of_embeddings():
    z = torch.nn.functional.normalize(torch.randn(2000, 16), dim=1)
    assert embedding_spread(z).item() == pytest.approx(1, abs=0.05)
    assert embedding_spread(z[:1].expand(7, 16)) == 0
    assert embedding_spread(torch.eye(2)).item() == pytest.approx(0.5 * 2**0.5)  # of the population


def test_without_prototypes_the_spread_alone_tells():
    assert diagnose(0.0, 0.0, 0.9, 0) is None and "collapse" in diagnose(0.0, 0.0, 0.01, 0)


@pytest.mark.parametrize("k", [12, 1000])
def test_the_alarm_goes_off_on_one_side_of_each_threshold(k):
    """Spread 0.05; entropy of the mean 0.1 ln K; of single targets 0.98 ln K; their difference 0.01 ln K."""
    most = math.log(k)

    def alarm(single=0.5, mean=0.9, spread=1.0):
        told = diagnose(single * most, mean * most, spread, k)
        return told and told.split(":")[0]

    assert alarm() is None
    assert alarm(spread=0.0501) is None and alarm(spread=0.0499) == "collapse"
    assert alarm(single=0.02, mean=0.1001) is None and alarm(single=0.02, mean=0.0999) == "collapse"
    assert alarm(single=0.9799, mean=1.0) is None and alarm(single=0.9801, mean=1.0) == "plateau"
    assert alarm(single=0.8899) is None and alarm(single=0.8901) == "plateau"
    assert "uniform" in diagnose(0.9801 * most, most, 1.0, k) and "same for every" in diagnose(
        0.8 * most, 0.8 * most, 1.0, k
    )
