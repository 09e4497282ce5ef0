"""Image heads, their pooling and standardisation, and the pixel projector."""

import pytest
import torch
from torch import nn

from nnssl.errors import NnsslError
from nnssl.heads import POOLINGS, ImageHead, mlp, norm_of, pixel_projector, pool, standardise
from nnssl.heads.balanced import ScaleProjections, voxel_projector
from nnssl.heads.batch_norm import standardise_rows
from nnssl.heads.dino import DinoHead, pool_stages
from nnssl.heads.image import pooled_width
from nnssl.heads.restoration import restoration_head

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


def test_what_all_crops_share_is_gone_only_where_it_was_asked_for():
    x = torch.randn(5, 4, 3, 2)
    shared = x + torch.randn(1, 4, 1, 1)
    for asked in (False, True):
        head = ImageHead(4, (3, 2), out=6, pooling="gap", batch_standardise=asked)
        assert torch.allclose(head(x), head(shared), atol=1e-5) == asked


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


@pytest.mark.parametrize("standardise", [standardise, standardise_rows])
def test_features_far_smaller_than_one_are_standardised_too(standardise):
    """SD 0.01: the variance of 1e-4 counts with 1e-5 more."""
    z = standardise(torch.tensor([[0.5], [0.52]], dtype=torch.float64))
    assert z.flatten().tolist() == pytest.approx([-1 / 1.1**0.5, 1 / 1.1**0.5], rel=1e-9)


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
    norms = [m for m in head.modules() if isinstance(m, norm)]
    assert len(norms) == 2 and all(m.affine and m.eps == 1e-5 for m in norms)
    assert norm_of(nn.Identity(), dim) is getattr(nn, f"InstanceNorm{dim}d")


@pytest.mark.parametrize("which", ["image", "rows", "rows that count"])
def test_gradients_run_through_both_moments(which):
    """A shift or a scale that all samples share changes nothing, so that no gradient points along either."""
    x = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    weight, rows = torch.randn(7, 3, dtype=torch.float64), torch.ones(7, dtype=torch.bool)
    out = {
        "image": lambda: standardise(x, eps=0.0),
        "rows": lambda: standardise_rows(x, eps=0.0),
        "rows that count": lambda: standardise_rows(x, rows, eps=0.0),
    }[which]()
    (out * weight).sum().backward()
    assert x.grad.abs().max() > 0.05
    torch.testing.assert_close(x.grad.sum(0), torch.zeros(3, dtype=torch.float64), atol=1e-12, rtol=0)
    torch.testing.assert_close((x.grad * x.detach()).sum(0), torch.zeros(3, dtype=torch.float64), atol=1e-12, rtol=0)


def test_layers_of_the_projectors():
    """What stands between the linear maps: without it two of them are one."""
    linear, relu, gelu, norm = nn.Linear, nn.ReLU, nn.GELU, nn.BatchNorm1d

    def layers(module):
        return [type(m) for m in module]

    assert layers(mlp(7, 3)) == [linear, relu, linear] and layers(mlp(7, 3, layers=1)) == [linear]
    assert layers(mlp(7, 3, layers=3)) == [linear, relu, linear, relu, linear]
    assert layers(ImageHead(4, (2, 2), out=6).mlp) == [linear, relu, linear]
    assert layers(DinoHead(7, 5).mlp) == [linear, gelu, linear, gelu, linear]
    assert layers(voxel_projector(7, 3)) == [linear, norm, relu, linear, norm, relu, linear]
    assert [m.out_features for m in voxel_projector(7, 3) if isinstance(m, linear)] == [7, 7, 3]
    assert [m.out_features for m in DinoHead(7, 5, hidden=6, bottleneck=4).mlp if isinstance(m, linear)] == [6, 6, 4]
    assert mlp(7)[0].out_features == 128 and mlp(7)[-1].out_features == 128
    for kind, dim in ((nn.Conv2d, 2), (nn.Conv3d, 3)):
        one = restoration_head(8, 3, dim=dim)
        assert type(one) is kind and (one.in_channels, one.out_channels, one.kernel_size) == (8, 3, (1,) * dim)
    two = restoration_head(8, 3, dim=3, layers=2)
    assert layers(two) == [nn.InstanceNorm3d, relu, nn.Conv3d, nn.InstanceNorm3d, relu, nn.Conv3d]
    assert (two[2].out_channels, two[2].kernel_size, two[2].padding) == (4, (3, 3, 3), (1, 1, 1))
    assert (two[5].out_channels, two[5].kernel_size) == (3, (1, 1, 1)) and two[0].affine and two[3].affine
    assert [restoration_head(n, 1, dim=2, layers=2)[2].out_channels for n in (1, 3, 4)] == [1, 1, 2]


def test_the_masked_maximum_is_over_active_places():
    x = torch.randn(2, 3, 2, 4, 3)
    on = torch.rand(2, 1, 2, 4, 3) < 0.5
    on[:, :, 0, 0, 0] = True
    seen = torch.where(on, x, 100.0)  # larger than anything that is active
    mean, most = pool_stages([seen], [on]).split(3, 1)
    for b in range(2):
        values = x[b][:, on[b, 0]]
        torch.testing.assert_close(mean[b], values.mean(1))
        assert torch.equal(most[b], values.amax(1))
    assert torch.equal(pool_stages([seen], [on], maximum=False), mean)


def test_defaults_and_first_weights():
    assert ScaleProjections(channels=(4, 8)).width == 64 and ScaleProjections(channels=(4, 8), dim=5).width == 10
    head = DinoHead(400, 500, hidden=300)
    for weight in (*(m.weight for m in head.mlp if isinstance(m, nn.Linear)), head.prototypes):
        assert float(weight.detach().std()) == pytest.approx(0.02, rel=0.03)
    assert all(not m.bias.any() for m in head.mlp if isinstance(m, nn.Linear))
    assert DinoHead(4).prototypes.shape == (4096, 256) and DinoHead(4).mlp[0].out_features == 1024


def test_norms_of_the_heads_are_nnunets():
    head = pixel_projector(4, 6, dim=3, norm=nn.InstanceNorm3d, hidden=5, layers=3)
    norms = [m for m in head.modules() if isinstance(m, nn.InstanceNorm3d)]
    assert [(n.num_features, n.eps, n.affine) for n in norms] == [(5, 1e-5, True), (5, 1e-5, True), (6, 1e-5, True)]
    assert all(m.bias is not None for m in head.modules() if isinstance(m, nn.Conv3d))
    norms = [m for m in restoration_head(8, 2, dim=2, layers=2) if isinstance(m, nn.InstanceNorm2d)]
    assert [(n.num_features, n.affine) for n in norms] == [(8, True), (4, True)]
