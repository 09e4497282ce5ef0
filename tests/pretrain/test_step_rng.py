import torch

from nnssl.pretrain.augment import StepRNG
from nnssl.pretrain.augment.rng import HELD_OUT_STEP


def everything(rng):
    return [
        rng.uniform(-1, 1, 2, 3),
        rng.normal(4),
        rng.integers(0, 10, 5),
        rng.chance(0.5, 7).float(),
        rng.noise(3, 4),
    ]


def test_a_pure_function_of_seed_and_step():
    for a, b in zip(everything(StepRNG(1, 5, 4)), everything(StepRNG(1, 5, 4))):
        assert torch.equal(a, b)
    assert not torch.equal(StepRNG(1, 5, 4).uniform(0, 1, 9), StepRNG(1, 6, 4).uniform(0, 1, 9))
    assert not torch.equal(StepRNG(1, 5, 4).uniform(0, 1, 9), StepRNG(2, 5, 4).uniform(0, 1, 9))


def test_two_ranks_draw_what_one_does():
    whole = everything(StepRNG(3, 7, 6))
    first = everything(StepRNG(3, 7, 6, first=0, count=3))
    second = everything(StepRNG(3, 7, 6, first=3, count=3))
    for w, a, b in zip(whole, first, second):
        assert torch.equal(w, torch.cat([a, b]))


def test_ranges_and_samples_differ():
    u = StepRNG(0, 0, 64).uniform(2, 5, 50)
    assert 2 <= u.min() < 2.1 < 4.9 < u.max() < 5
    assert len({tuple(row.tolist()) for row in u}) == 64
    assert abs(StepRNG(0, 1, 64).chance(0.25, 100).float().mean() - 0.25) < 0.02
    assert set(StepRNG(0, 2, 64).integers(3, 6, 20).unique().tolist()) == {3, 4, 5}
    g = StepRNG(0, 3, 2).generators()
    assert g[0].initial_seed() != g[1].initial_seed()


def test_no_two_steps_forks_or_samples_draw_the_same():
    def numbers(rng):
        return tuple(rng.uniform(0, 1, 3)[0].tolist())

    steps = [*range(300), *(HELD_OUT_STEP + k for k in range(100))]
    assert len({numbers(StepRNG(0, t, 1)) for t in steps}) == 400 and HELD_OUT_STEP > 10**9
    assert len({numbers(StepRNG(s, 0, 1)) for s in range(300)}) == 300
    step = StepRNG(0, 0, 1)
    assert len({numbers(step.fork(1)) for _ in range(300)}) == 300
    assert len({g.initial_seed() for g in StepRNG(0, 0, 300).generators()}) == 300
    assert len({tuple(row.tolist()) for row in StepRNG(0, 0, 300).noise(3)}) == 300


def test_a_fork_has_a_batch_and_a_device_of_its_own():
    whole, part = StepRNG(4, 2, 6).fork(8), StepRNG(4, 2, 6, 3, 3).fork(8, 5, 2)
    assert part.total == 8 and part.count == 2 and part.device == torch.device("cpu")
    assert torch.equal(part.uniform(0, 1, 2), whole.uniform(0, 1, 2)[5:7])


def test_normal_numbers_are_standard_normal():
    for x in (StepRNG(0, 0, 200).normal(50), StepRNG(0, 0, 200).noise(50)):
        assert x.shape == (200, 50) and abs(float(x.mean())) < 0.04 and abs(float(x.std()) - 1) < 0.03
