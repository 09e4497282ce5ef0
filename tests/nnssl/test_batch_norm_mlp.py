"""The projector with batch statistics over the rows that count."""

import pytest
import torch
from torch import nn

from nnssl.ema import EMA
from nnssl.heads.batch_norm import BatchNormMLP, standardise_rows


def test_equals_torch_batch_norm():
    """Linear - BN(no affine, batch statistics) - ReLU, twice, and a linear map; the same in evaluation mode."""
    mlp, x = BatchNormMLP(6, 8, 5), torch.randn(10, 6)
    layers = []
    for linear in mlp.maps[:-1]:
        layers += [linear, nn.BatchNorm1d(8, affine=False, track_running_stats=False), nn.ReLU()]
    reference = nn.Sequential(*layers, mlp.maps[-1])
    torch.testing.assert_close(mlp(x), reference(x))
    torch.testing.assert_close(mlp.eval()(x), reference(x))
    assert not list(mlp.buffers())


def test_row_norm_equals_instance_norm_of_rows():
    mlp, x = BatchNormMLP(6, 8, 5, norm="row"), torch.randn(4, 6)
    reference = nn.InstanceNorm1d(8)
    y = mlp.maps[0](x)
    y = mlp.maps[1](reference(y[None])[0].relu())
    torch.testing.assert_close(mlp(x), mlp.maps[2](reference(y[None])[0].relu()), atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="none of"):
        BatchNormMLP(6, norm="layer")


def test_rows_that_do_not_count_change_nothing():
    """(27) Mean 0 and deviation 1 over the rows that count; garbage in the others leaves these as they are."""
    x, rows = 5 + 3 * torch.randn(12, 4), torch.arange(12) < 8
    out = standardise_rows(x, rows)
    torch.testing.assert_close(out[:8].mean(0), torch.zeros(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(out[:8].std(0, unbiased=False), torch.ones(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(out[:8], standardise_rows(x[:8]))
    garbage = torch.where(rows[:, None], x, 1e6)
    torch.testing.assert_close(standardise_rows(garbage, rows)[:8], out[:8])
    mlp = BatchNormMLP(4, 8, 3)
    torch.testing.assert_close(mlp(garbage, rows)[:8], mlp(x[:8]))
    assert bool(standardise_rows(x, torch.zeros(12, dtype=torch.bool)).isfinite().all())


def test_float32_under_autocast():
    mlp = BatchNormMLP(4, 8, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert mlp(torch.randn(5, 4).bfloat16()).dtype == torch.float32


def test_teacher_follows():
    """(23, 24) ``t' = rho t + (1 - rho) s`` to rounding; rho 1 freezes, 0 copies; k updates: ``rho^k t0 + (1 - rho^k) s``."""
    torch.manual_seed(1)
    student = BatchNormMLP(4, 8, 3)
    teacher = EMA(student)
    start = [p.clone() for p in teacher.parameters()]
    with torch.no_grad():
        for p in student.parameters():
            p.add_(torch.randn_like(p))
    assert not any(p.requires_grad for p in teacher.parameters())
    teacher.update(student, 1.0)
    assert all(torch.equal(a, b) for a, b in zip(start, teacher.parameters()))
    for k in range(1, 4):
        teacher.update(student, 0.9)
        for t, t0, s in zip(teacher.parameters(), start, student.parameters()):
            torch.testing.assert_close(t, 0.9**k * t0 + (1 - 0.9**k) * s, rtol=1e-6, atol=1e-7)
    teacher.update(student, 0.0)
    assert all(torch.equal(a, b) for a, b in zip(student.parameters(), teacher.parameters()))
