"""The teacher follows its student exactly, each tensor once."""

import pytest
import torch
from torch import nn

from nnssl.ema import EMA, cosine_momentum
from nnssl.networks import build_network
from nnssl.plans import Plan


class Shared(nn.Module):
    """One layer under two names, and a buffer."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(3, 4)
        self.b = self.a
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        return self.b(x)


def test_schedule():
    assert cosine_momentum(0, 100) == pytest.approx(0.996)
    assert cosine_momentum(100, 100) == pytest.approx(1.0)
    assert cosine_momentum(50, 100, 0.9) == pytest.approx(0.95)
    assert cosine_momentum(200, 100) == 1.0 and cosine_momentum(0, 0) == 0.996
    values = [cosine_momentum(t, 20, 0.5) for t in range(21)]
    assert values == sorted(values)


def test_closed_form_and_each_tensor_once():
    student = Shared()
    teacher = EMA(student)
    expected = student.a.weight.detach().double().clone()
    for t in range(30):
        with torch.no_grad():
            student.a.weight.add_(torch.randn(4, 3))
            student.seen += 1
        mu = cosine_momentum(t, 30, 0.9)
        teacher.update(student, mu)
        expected = mu * expected + (1 - mu) * student.a.weight.detach().double()
    torch.testing.assert_close(teacher.module.a.weight.double(), expected, atol=1e-6, rtol=0)
    assert teacher.module.a.weight is teacher.module.b.weight
    assert teacher.module.seen == 30


def test_a_networks_aliases_move_once(tiny_plans, tiny_dataset_json):
    network = build_network(Plan.from_dicts(tiny_plans(), "3d_fullres", tiny_dataset_json()))
    teacher = EMA(network)
    before = {k: v.clone() for k, v in teacher.module.state_dict().items()}
    with torch.no_grad():
        for p in network.parameters():
            p.add_(1.0)
    teacher.update(network, 0.9)
    for key, value in teacher.module.state_dict().items():
        torch.testing.assert_close(value, before[key] + 0.1, atol=1e-5, rtol=0)


def test_is_apart_from_training():
    student = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5))
    teacher = EMA(student)
    teacher.train()
    assert not any(m.training for m in teacher.modules())
    x = torch.randn(2, 3, requires_grad=True)
    out = teacher(x)
    assert not out.requires_grad
    torch.testing.assert_close(out, student[0](x).detach())
    (student(x) - out).square().sum().backward()
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert student[0].weight.grad is not None
    with torch.no_grad():
        student[0].weight.add_(1)
    assert not torch.equal(teacher.module[0].weight, student[0].weight)


def test_bfloat16_students_are_followed_in_float32():
    student = nn.Linear(4, 4).bfloat16()
    teacher = EMA(student)
    assert teacher.module.weight.dtype == torch.float32
    before = teacher.module.weight.clone()
    with torch.no_grad():
        student.weight.add_(1.0)
    teacher.update(student, 0.996)
    moved = teacher.module.weight - before
    torch.testing.assert_close(moved, 0.004 * (student.weight.float() - before), atol=1e-6, rtol=1e-3)


def test_another_structure_is_refused():
    teacher = EMA(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="bias"):
        teacher.update(nn.Linear(2, 2, bias=False), 0.9)
