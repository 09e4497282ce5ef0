"""Learning rates, weights and intervals at the edges: first step, end of the warm-up, last step, nothing to do."""

import math
from types import SimpleNamespace

import pytest

from nnssl.ema import cosine_momentum
from nnssl.pretrain.methods import get_method
from nnssl.pretrain.methods.base import Method
from nnssl.transferability.schedule import Schedule


def factor(step, steps, **config):
    return Method.lr_factor(SimpleNamespace(config=SimpleNamespace(**config)), step, steps)


def test_warm_up_then_half_a_cosine():
    """100 steps, 5 of them rising: fifths up to 1, 1 again where the cosine begins, a half in its middle, 0 at the end."""
    assert [factor(s, 100, warmup=0.05) for s in (0, 1, 4, 5)] == pytest.approx([0.2, 0.4, 1.0, 1.0])
    assert factor(52, 99, warmup=0.0505) == pytest.approx(0.5)  # round(5.0) of 99: 94 steps from 5 on
    assert factor(99, 100, warmup=0.05) == pytest.approx(0.5 * (1 + math.cos(math.pi * 94 / 95)))
    assert factor(100, 100, warmup=0.05) == pytest.approx(0.0)
    assert factor(0, 100, warmup=0.0) == factor(0, 100) == 1.0
    assert factor(50, 100) == pytest.approx(0.5)
    assert factor(0, 1, warmup=0.5) == 1.0 and factor(0, 0) == 1.0
    assert factor(0, 4, warmup=0.5) == pytest.approx(0.5) and factor(1, 4, warmup=0.5) == 1.0


@pytest.mark.parametrize("name", ["macl", "voco", "robust"])
def test_who_has_this_schedule(name):
    assert get_method(name).lr_factor is Method.lr_factor and get_method(name).Config().warmup == 0.05


def masked(step, steps, primus=False, optimiser="auto", warmup=0.1):
    cls = get_method("mae")
    method = cls.__new__(cls)
    method.__dict__.update(
        config=cls.Config(optimiser=optimiser, warmup=warmup), plan=SimpleNamespace(is_primus=primus)
    )
    return method.lr_factor(step, steps)


def test_masked_reconstruction():
    """SGD: polynomial without warm-up. AdamW: warm-up, then a cosine, of a Primus the polynomial."""
    assert [masked(s, 50) for s in (0, 25, 50, 60)] == pytest.approx([1.0, 0.5**0.9, 0.0, 0.0])
    assert [masked(s, 50, optimiser="adamw") for s in (0, 4, 5, 50)] == pytest.approx([0.2, 1.0, 1.0, 0.0], abs=1e-12)
    assert masked(27, 49, optimiser="adamw") == pytest.approx(0.5)
    assert [masked(s, 50, primus=True) for s in (0, 4, 5, 50, 51)] == pytest.approx([0.2, 1.0, 1.0, 0.0, 0.0])
    assert masked(20, 50, primus=True) == pytest.approx((2 / 3) ** 0.9)
    assert masked(0, 50, primus=True, optimiser="sgd") == 1.0


def test_momentum_of_a_teacher():
    assert cosine_momentum(0, 10) == pytest.approx(0.996) and cosine_momentum(10, 10) == 1.0
    assert cosine_momentum(5, 10, 0.9) == pytest.approx(0.95) and cosine_momentum(5, 10, 0.9, 0.99) == pytest.approx(
        0.945
    )
    assert cosine_momentum(99, 10) == 1.0 and cosine_momentum(-3, 10) == pytest.approx(0.996)
    assert cosine_momentum(0, 0) == pytest.approx(0.996) and cosine_momentum(1, 0) == 1.0


def test_when_robustness_is_measured():
    schedule = Schedule(epochs=23, every=10, crops=8, early=(1, 2))
    assert [e for e in range(24) if schedule.due(e)] == [0, 1, 2, 10, 20, 23] and schedule.evaluations == 6
    slower = schedule.slowed(1.25)
    assert (slower.every, slower.early, slower.crops, slower.epochs) == (13, (), 8, 23)
    assert schedule.slowed(1.0).every == schedule.slowed(1.05).every == 11  # by one epoch at least
    assert Schedule.from_dict(schedule.to_dict()) == schedule and schedule.to_dict()["early"] == [1, 2]
