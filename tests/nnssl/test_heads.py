"""Image heads, their pooling and standardisation, and the pixel projector."""

import pytest
import torch
from torch import nn

from nnssl.errors import NnsslError
from nnssl.heads import POOLINGS, ImageHead, mlp, norm_of, pixel_projector, pool, standardise
from nnssl.heads.image import pooled_width

SHAPES = {2: (3, 5), 3: (1, 3, 2)}


@pytest.mark.parametrize("dim", [2, 3])
@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("batch_standardise", [False, True])
def test_shapes_and_gradients(dim, pooling, batch_standardise):
    head = ImageHead(4, SHAPES[dim], out=6, hidden=5, pooling=pooling, batch_standardise=batch_standardise)
    x = torch.randn(3, 4, *SHAPES[dim], requires_grad=True)
    z = head(x)
    assert z.shape == (3, 6)
    z.square().sum().backward()
    assert torch.isfinite(x.grad).all() and x.grad.abs().sum() > 0
    assert pool(x, pooling).shape == (3, pooled_width(4, SHAPES[dim], pooling))


def test_pooling_by_hand():
    x = torch.arange(12.0).view(1, 1, 3, 4)
    assert pool(x, "gap").tolist() == [[5.5]]
    assert pool(x, "gap+gmp").tolist() == [[5.5, 11.0]]
    assert pool(x, "flatten").tolist() == [list(range(12))]
    assert pool(x, "grid").tolist() == [[2.5, 4.5, 6.5, 8.5]]


def test_unknown_pooling():
    with pytest.raises(NnsslError, match="unknown pooling 'gdp'.*gap"):
        ImageHead(4, (2, 2), pooling="gdp")


def test_standardise():
    x = torch.randn(16, 5) * 3 + 7
    z = standardise(x)
    assert torch.allclose(z.mean(0), torch.zeros(5), atol=1e-5)
    assert torch.allclose(z.var(0, unbiased=False), torch.ones(5), atol=1e-3)
    assert torch.isfinite(standardise(torch.ones(4, 3))).all()
    assert standardise(x.half()).dtype == torch.float32


def test_mlp():
    head = mlp(7, 3, hidden=5, layers=3)
    assert [m.out_features for m in head if isinstance(m, nn.Linear)] == [5, 5, 3]
    assert isinstance(mlp(7, 3, layers=1)[-1], nn.Linear)


@pytest.mark.parametrize("dim", [2, 3])
@pytest.mark.parametrize("norm", ["InstanceNorm", "BatchNorm"])
def test_pixel_projector(dim, norm):
    norm = getattr(nn, f"{norm}{dim}d")
    network = nn.Sequential(norm(3), nn.Identity())
    assert norm_of(network, dim) is norm
    head = pixel_projector(4, 6, dim=dim, norm=norm, hidden=5)
    x = torch.randn(2, 4, *SHAPES[dim])
    assert head(x).shape == (2, 6, *SHAPES[dim])
    assert any(isinstance(m, norm) for m in head.modules())
    assert norm_of(nn.Identity(), dim) is getattr(nn, f"InstanceNorm{dim}d")
