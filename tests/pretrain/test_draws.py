import torch

from nnssl.pretrain.augment import Draws
from nnssl.pretrain.augment.draws import HELD_OUT_STEP


def everything(draws):
    return [
        draws.uniform(-1, 1, 2, 3),
        draws.normal(4),
        draws.integers(0, 10, 5),
        draws.chance(0.5, 7).float(),
        draws.noise(3, 4),
    ]


def test_a_pure_function_of_seed_and_step():
    for a, b in zip(everything(Draws(1, 5, 4)), everything(Draws(1, 5, 4))):
        assert torch.equal(a, b)
    assert not torch.equal(Draws(1, 5, 4).uniform(0, 1, 9), Draws(1, 6, 4).uniform(0, 1, 9))
    assert not torch.equal(Draws(1, 5, 4).uniform(0, 1, 9), Draws(2, 5, 4).uniform(0, 1, 9))


def test_two_ranks_draw_what_one_does():
    whole = everything(Draws(3, 7, 6))
    first = everything(Draws(3, 7, 6, first=0, count=3))
    second = everything(Draws(3, 7, 6, first=3, count=3))
    for w, a, b in zip(whole, first, second):
        assert torch.equal(w, torch.cat([a, b]))


def test_ranges_and_samples_differ():
    u = Draws(0, 0, 64).uniform(2, 5, 50)
    assert 2 <= u.min() < 2.1 < 4.9 < u.max() < 5
    assert len({tuple(row.tolist()) for row in u}) == 64
    assert abs(Draws(0, 1, 64).chance(0.25, 100).float().mean() - 0.25) < 0.02
    assert set(Draws(0, 2, 64).integers(3, 6, 20).unique().tolist()) == {3, 4, 5}
    g = Draws(0, 3, 2).generators()
    assert g[0].initial_seed() != g[1].initial_seed()


def test_no_two_steps_forks_or_samples_draw_the_same():
    def numbers(draws):
        return tuple(draws.uniform(0, 1, 3)[0].tolist())

    steps = [*range(300), *(HELD_OUT_STEP + k for k in range(100))]
    assert len({numbers(Draws(0, t, 1)) for t in steps}) == 400 and HELD_OUT_STEP > 10**9
    assert len({numbers(Draws(s, 0, 1)) for s in range(300)}) == 300
    step = Draws(0, 0, 1)
    assert len({numbers(step.fork(1)) for _ in range(300)}) == 300
    assert len({g.initial_seed() for g in Draws(0, 0, 300).generators()}) == 300
    assert len({tuple(row.tolist()) for row in Draws(0, 0, 300).noise(3)}) == 300


def test_a_fork_has_a_batch_and_a_device_of_its_own():
    whole, part = Draws(4, 2, 6).fork(8), Draws(4, 2, 6, 3, 3).fork(8, 5, 2)
    assert part.total == 8 and part.count == 2 and part.device == torch.device("cpu")
    assert torch.equal(part.uniform(0, 1, 2), whole.uniform(0, 1, 2)[5:7])


def test_normal_numbers_are_standard_normal():
    for x in (Draws(0, 0, 200).normal(50), Draws(0, 0, 200).noise(50)):
        assert x.shape == (200, 50) and abs(float(x.mean())) < 0.04 and abs(float(x.std()) - 1) < 0.03
