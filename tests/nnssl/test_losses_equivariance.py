"""L_ER and the alignment of what it compares (spec T11, T12, T21)."""

import pytest
import torch
import torch.nn.functional as F

from nnssl.errors import NnsslError
from nnssl.losses import equivariance_loss, shrink

FACTORS = {1: (2,), 2: (2, 4), 3: (1, 2, 3)}
SIZES = {1: (8,), 2: (4, 12), 3: (3, 4, 9)}


def maps(dim, **kwargs):
    big = torch.randn(2, 3, *[n * f for n, f in zip(SIZES[dim], FACTORS[dim])], **kwargs)
    return torch.randn(2, 3, *SIZES[dim], **kwargs), big


@pytest.mark.parametrize("dim", [1, 2, 3])
@pytest.mark.parametrize("aligned", [False, True])
def test_zero_exactly_where_features_agree(dim, aligned):
    y, big = maps(dim)
    assert equivariance_loss(shrink(big, FACTORS[dim], aligned), big, FACTORS[dim], aligned) == 0
    assert equivariance_loss(y, big, FACTORS[dim], aligned) > 0


def test_area_is_the_mean_of_blocks():
    x = torch.arange(24.0).view(1, 1, 4, 6)
    expected = torch.tensor([[[[4.0, 7.0], [16.0, 19.0]]]])
    assert torch.equal(shrink(x, (2, 3)), expected)


@pytest.mark.parametrize("dim", [2, 3])
def test_scale_mean_and_gradient(dim):
    y, big = maps(dim)
    factor = FACTORS[dim]
    loss = equivariance_loss(y, big, factor)
    assert torch.allclose(equivariance_loss(3 * y, 3 * big, factor), 3 * loss)
    for axis in (0, 1):
        twice = [torch.cat([t, t], axis) for t in (y, big)]
        assert torch.allclose(equivariance_loss(*twice, factor), loss)
    y.requires_grad_(), big.requires_grad_()
    equivariance_loss(y, big, factor).backward()
    assert torch.allclose(y.grad.abs(), torch.full_like(y, 1 / y.numel()))
    assert big.grad.abs().sum() > 0  # no stop-gradient


def test_finite_differences():
    y, big = (t.requires_grad_() for t in maps(3, dtype=torch.float64))
    assert torch.autograd.gradcheck(lambda a, b: equivariance_loss(a, b, FACTORS[3]), (y, big))


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(NnsslError, match=r"\(4, 5\) voxels cannot be shrunk by \(2, 2\)"):
        shrink(torch.zeros(1, 1, 4, 5), (2, 2))
    with pytest.raises(NnsslError, match="bottlenecks differ"):
        equivariance_loss(torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 4, 4), (2, 2))


def test_nothing_to_shrink():
    x = torch.randn(1, 2, 4, 4)
    assert shrink(x, (1, 1)) is x


def cells(x, n):
    return F.avg_pool2d(x, n)


@pytest.mark.parametrize(("aligned", "dense", "er"), [(False, 0.0, 0.0), (True, 1.46, 22.7)])
def test_alignment_of_what_is_compared(aligned, dense, er):  # T12
    """A map of its own coordinates, 512 wide, network stride 16, shrunk by 4: distance of the centres compared."""
    ramp = torch.arange(512.0).view(1, 1, 1, 512).expand(1, 1, 512, 512).double()
    small = shrink(ramp, (4, 4), aligned)
    # Dense maps: 4 voxels of the small image against 16 of the full one.
    offset = cells(small, 4) - cells(ramp, 16)
    assert float(offset.abs().max()) == pytest.approx(dense, abs=1e-4 if not aligned else 0.01)
    # L_ER: 16 voxels of the small image against shrunk cells of 16 voxels.
    offset = cells(small, 16) - shrink(cells(ramp, 16), (4, 4), aligned)
    assert float(offset.abs().max()) == pytest.approx(er, abs=1e-4 if not aligned else 0.05)


def test_alignment_per_axis():  # T12, three sizes and factors
    size, factor, stride = (16, 48, 96), (1, 2, 4), (2, 4, 4)
    axes = torch.meshgrid(*[torch.arange(float(n)) for n in size], indexing="ij")
    ramp = torch.stack(axes)[None]
    small = shrink(ramp, factor)
    dense = F.avg_pool3d(small, stride) - F.avg_pool3d(ramp, tuple(s * f for s, f in zip(stride, factor)))
    er = F.avg_pool3d(small, stride) - shrink(F.avg_pool3d(ramp, stride), factor)
    assert dense.abs().max() < 1e-4 and er.abs().max() < 1e-4


def test_only_what_both_branches_saw_counts():
    big, y = torch.randn(2, 3, 4, 6), torch.randn(2, 3, 2, 3)
    all_seen, all_both = torch.ones(2, 4, 6, dtype=torch.bool), torch.ones(2, 2, 3, dtype=torch.bool)
    whole = equivariance_loss(y, big, (2, 2))
    assert torch.allclose(equivariance_loss(y, big, (2, 2), seen=all_seen, both=all_both), whole)
    seen, both = all_seen.clone(), all_both.clone()
    seen[0, :, 3:] = False  # of sample 0 the first column of cells is seen, and half of the second
    both[1, 0] = False
    masked = torch.where(seen[:, None], big, 0.0)
    half = (y[0, :, :, 1] - big[0, :, :, 2].unflatten(1, (2, 2)).mean(2)).abs().mean(0)
    full = (y[0, :, :, 0] - shrink(big, (2, 2))[0, :, :, 0]).abs().mean(0)
    first = (full.sum() + 0.5 * half.sum()) / 3
    second = (y[1, :, 1] - shrink(big, (2, 2))[1, :, 1]).abs().mean()
    assert torch.allclose(equivariance_loss(y, masked, (2, 2), seen=seen, both=both), (first + second) / 2)
    with pytest.raises(NnsslError, match="corners aligned"):
        equivariance_loss(y, big, (2, 2), True, seen, both)
    y.requires_grad_(True)
    equivariance_loss(y, masked, (2, 2), seen=seen, both=both).backward()
    assert (y.grad[1, :, 0] == 0).all() and (y.grad[0, :, :, 2] == 0).all() and (y.grad[0, :, :, 0] != 0).all()
