import torch

from nnssl.pretrain.augment import Draws


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
