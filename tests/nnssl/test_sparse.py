"""Sparse encoders: dense where all is visible, blind to what is hidden, and gone without a trace."""

import copy

import pytest
import torch
from torch import nn

from nnssl.errors import NnsslError
from nnssl.masking import mask_blocks, to_voxels
from nnssl.networks import build_network, encoder_channels, forward_features
from nnssl.networks.sparse import Active, Densify, check_sparse, masked_instance_norm, sparse_encoder
from nnssl.plans import Plan

ISO = ((1, 1, 1), (2, 2, 2), (2, 2, 2))
ANISO = ((1, 1, 1), (1, 2, 2), (2, 2, 2))
STRIDED = ((1, 2, 2), (2, 2, 2), (1, 2, 2))
CASES = [
    ("plain", ISO, (8, 12, 16), (4, 4, 4), 3),
    ("resenc", ISO, (16, 8, 12), (2, 2, 2), 3),
    ("plain", ANISO, (4, 16, 8), (1, 2, 2), 3),
    ("resenc", ANISO, (6, 8, 20), (2, 4, 4), 3),
    ("resenc", STRIDED, (4, 8, 16), (2, 4, 4), 3),
    ("plain", ISO, (12, 20), (4, 4), 2),
]


@pytest.fixture(params=CASES, ids=lambda c: f"{c[0]}{c[4]}d{c[2]}")
def case(request, tiny_plans, tiny_dataset_json):
    arch, strides, size, block, dim = request.param
    plans = tiny_plans(dim, arch, 2, strides=strides, features=(4, 6, 8))
    plan = Plan.from_dicts(plans, "3d_fullres" if dim == 3 else "2d", tiny_dataset_json(2))
    network = build_network(plan)
    for name, p in network.named_parameters():
        if "norm" in name:
            nn.init.normal_(p, 0.5, 0.5)
    grid = [n // b for n, b in zip(size, block)]
    mask = to_voxels(mask_blocks(torch.rand(3, *grid), torch.tensor([0.5, 0.7, 0.9]))[:, None], block)
    return plan, network, torch.randn(3, 2, *size), mask


def run(network, x, mask):
    with sparse_encoder(network.encoder, ~mask) as active:
        skips = forward_features(network, torch.where(mask, 0.0, x), 0).skips
    return skips, [active.at(s.shape[2:]) for s in skips]


def test_all_visible_is_dense(case):
    _, network, x, mask = case
    dense = forward_features(network, x, 0).skips
    for a, b in zip(dense, run(network, x, torch.zeros_like(mask))[0]):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_features_are_zero_off_the_mask_and_alive_on_it(case):
    _, network, x, mask = case
    for skip, active in zip(*run(network, x, mask)):
        assert (skip.masked_select(~active) == 0).all()
        assert skip.masked_select(active).abs().mean() > 0


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan, 50.0])
def test_nothing_leaks(case, value):
    _, network, x, mask = case
    hidden = torch.where(mask, torch.full_like(x, value), x)
    for a, b in zip(run(network, x, mask)[0], run(network, hidden, mask)[0]):
        assert torch.equal(a, b)
    seen = x.clone()
    place = tuple(torch.nonzero(~mask)[0].tolist())
    seen[(place[0], slice(None), *place[2:])] += 3.0
    assert not torch.equal(run(network, x, mask)[0][-1], run(network, seen, mask)[0][-1])


def test_leaves_no_trace(case):
    _, network, x, mask = case
    before, keys = forward_features(network, x, 0).skips, list(network.state_dict())
    run(network, x, mask)
    with pytest.raises(RuntimeError, match="stop"), sparse_encoder(network.encoder, ~mask):
        raise RuntimeError("stop")
    assert all(torch.equal(a, b) for a, b in zip(before, forward_features(network, x, 0).skips))
    assert list(network.state_dict()) == keys
    assert not any(m._forward_hooks for m in network.modules())


def test_every_encoder_parameter_learns(case):
    _, network, x, mask = case
    sum(s.square().sum() for s in run(network, x, mask)[0]).backward()
    for name, p in network.encoder.named_parameters():
        assert p.grad is not None and torch.isfinite(p.grad).all(), name


def test_statistics_are_those_of_gathered_voxels():
    norm = nn.InstanceNorm3d(2, affine=True)
    nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    x, active = torch.randn(3, 2, 4, 5, 6), torch.rand(3, 1, 4, 5, 6) < 0.4
    active[2] = False
    out = masked_instance_norm(norm, x, active)
    for b in range(2):
        for c in range(2):
            values = x[b, c][active[b, 0]]
            expected = (values - values.mean()) / (values.var(unbiased=False) + norm.eps).sqrt()
            torch.testing.assert_close(out[b, c][active[b, 0]], expected * norm.weight[c] + norm.bias[c])
    assert (out[2] == 0).all()


@pytest.mark.parametrize("shape", [(2, 4, 8), (4, 2, 2), (8, 8, 16)])
def test_active_where_any_voxel_is_visible(shape):
    visible = torch.rand(2, 1, 8, 8, 16) < 0.1
    active = Active(visible).at(shape)
    step = [n // s for n, s in zip((8, 8, 16), shape)]
    for place in torch.cartesian_prod(*[torch.arange(s) for s in shape]).tolist():
        part = tuple(slice(i * k, (i + 1) * k) for i, k in zip(place, step))
        assert active[(0, 0, *place)] == visible[(0, 0, *part)].any()


def test_tokens_fill_what_is_hidden_and_nothing_else(case):
    plan, network, x, mask = case
    densify = Densify(encoder_channels(plan))
    with sparse_encoder(network.encoder, ~mask) as active:
        skips = forward_features(network, torch.where(mask, 0.0, x), 0).skips
    for skip, full, token in zip(skips, densify(skips, active), densify.tokens):
        on = active.at(skip.shape[2:]).expand_as(skip)
        assert torch.equal(full[on], skip[on])
        wide = token.detach().view(1, -1, *[1] * (skip.ndim - 2)).expand_as(skip)
        assert torch.equal(full[~on], wide[~on])


def test_layers_without_a_sparse_counterpart_are_refused(case):
    network = copy.deepcopy(case[1])
    check_sparse(network.encoder)
    network.encoder.extra = nn.BatchNorm3d(4)
    with pytest.raises(NnsslError, match="BatchNorm3d"):
        check_sparse(network.encoder)
    network.encoder.extra = nn.AdaptiveAvgPool3d(1)
    with pytest.raises(NnsslError, match="AdaptiveAvgPool3d"):
        check_sparse(network.encoder)


def test_mixed_precision(case):
    _, network, x, mask = case
    with torch.autocast("cpu", dtype=torch.bfloat16):
        skips, active = run(network, x, mask)
    for skip, on in zip(skips, active):
        assert torch.isfinite(skip).all() and (skip.masked_select(~on) == 0).all()
