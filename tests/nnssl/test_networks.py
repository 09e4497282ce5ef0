import pytest
import torch
from torch import nn

from nnssl.networks import (
    alias_map,
    build_network,
    canonical_state_dict,
    decoder_channels,
    encoder_channels,
    forward_features,
    full_state_dict,
    own_padding,
    partial_decode,
    set_padding,
    unwrap,
)
from nnssl.plans import Plan

ANISOTROPIC = {
    "strides": ((1, 1, 1), (1, 2, 2), (2, 2, 2), (1, 2, 2)),
    "kernels": ((1, 3, 3), (3, 3, 3), (3, 3, 3), (3, 3, 3)),
    "features": (4, 6, 8, 10),
    "patch": (8, 16, 24),
}


@pytest.fixture(params=[("plain", 3), ("plain", 2), ("resenc", 3), ("resenc", 2)], ids=lambda p: f"{p[0]}{p[1]}d")
def plan(request, tiny_plans, tiny_dataset_json):
    arch, dim = request.param
    plans = tiny_plans(dim, arch, 2, **ANISOTROPIC)
    return Plan.from_dicts(plans, "2d" if dim == 2 else "3d_fullres", tiny_dataset_json(2))


def _input(plan, batch=2):
    size = (4, 16, 24)[-plan.dim :]  # three different sizes
    return torch.randn(batch, plan.n_channels, *size)


def test_levels_are_those_of_the_networks_own_deep_supervision(plan):
    network = build_network(plan, deep_supervision=True)
    x = _input(plan)
    with torch.no_grad():
        expected = network(x)
        levels = forward_features(network, x).levels[1:]
        heads = network.decoder.seg_layers
        ours = [heads[i](level) for i, level in enumerate(levels)][::-1]
    assert len(expected) == len(ours) == plan.n_stages - 1
    for a, b in zip(expected, ours):
        assert torch.equal(a, b)


def test_skips_and_shapes(plan):
    network = build_network(plan)
    x = _input(plan)
    pyramid = forward_features(network, x, 2)
    for skip, reference in zip(pyramid.skips, network.encoder(x), strict=True):
        assert torch.equal(skip, reference)
    assert pyramid.levels[0] is pyramid.skips[-1]
    assert len(pyramid.levels) == 3
    assert [s.shape[1] for s in pyramid.skips] == list(encoder_channels(plan))
    assert [level.shape[1] for level in pyramid.levels[1:]] == list(decoder_channels(plan))[:2]
    for skip, stride in zip(pyramid.skips, plan.cumulative_strides):
        assert tuple(skip.shape[2:]) == tuple(n // s for n, s in zip(x.shape[2:], stride))
    for i, level in enumerate(pyramid.levels[1:]):
        assert level.shape == pyramid.skips[-(i + 2)].shape


def test_only_the_stages_asked_for_run_and_no_head_does(plan):
    network = build_network(plan, deep_supervision=True)
    called = []
    for name, module in network.named_modules():
        if name.startswith(("decoder.stages.", "decoder.seg_layers.", "decoder.transpconvs.")) and name.count(".") == 2:
            module.register_forward_hook(lambda *_, name=name: called.append(name))
    network.decoder.register_forward_hook(lambda *_: called.append("decoder"))
    forward_features(network, _input(plan), 1)
    assert called == ["decoder.transpconvs.0", "decoder.stages.0"]
    called.clear()
    assert forward_features(network, _input(plan), 0).levels[1:] == []
    assert called == []


def test_gradients_reach_exactly_the_parts_that_ran(plan):
    network = build_network(plan)
    forward_features(network, _input(plan), 1).levels[-1].square().mean().backward()
    for name, parameter in network.named_parameters():
        ran = name.startswith(("encoder.", "decoder.stages.0.", "decoder.transpconvs.0."))
        assert (parameter.grad is not None) == ran, name


def test_illegal_sizes_and_stages_are_refused_with_numbers(plan):
    network = build_network(plan)
    x = _input(plan)
    with pytest.raises(ValueError, match="axis .* has 15 voxels, which the total stride 8 does not divide"):
        forward_features(network, x[..., :15])
    with pytest.raises(ValueError, match="3 stages, 4 were asked for"):
        forward_features(network, x, 4)
    with pytest.raises(ValueError, match="-1 were asked for"):
        partial_decode(network, forward_features(network, x, 0).skips, -1)


def test_number_of_classes_and_deep_supervision(plan):
    x = _input(plan, 1)
    assert build_network(plan)(x).shape[1] == 3  # background, liver, spleen
    assert build_network(plan, n_classes=7)(x).shape[1] == 7
    deep, plain = build_network(plan, deep_supervision=True), build_network(plan)
    assert len(deep(x)) == plan.n_stages - 1
    assert deep.state_dict().keys() == plain.state_dict().keys()


def test_canonical_names_are_one_per_tensor(plan):
    network = build_network(plan)
    canonical = canonical_state_dict(network)
    parameters = dict(network.named_parameters())
    assert list(canonical) == list(parameters)
    assert all(canonical[name].data_ptr() == parameters[name].data_ptr() for name in canonical)
    assert not any(name.startswith("decoder.encoder.") or ".all_modules." in name for name in canonical)
    aliases = alias_map(network)
    assert aliases.keys() == network.state_dict().keys()
    assert set(aliases.values()) == set(canonical)
    first = next(iter(canonical))
    assert aliases["decoder." + first] == first


def test_full_state_dict_is_a_snapshot_with_every_alias_shared(plan):
    network = build_network(plan)
    full = full_state_dict(network)
    assert list(full) == list(network.state_dict())
    for name, canonical in alias_map(network).items():
        assert full[name] is full[canonical]
    name = next(iter(full))
    before = full[name].clone()
    with torch.no_grad():
        next(network.parameters()).add_(1)
    assert torch.equal(full[name], before)


class _Compiled(nn.Module):
    """Wraps as torch.compile does, without compiling."""

    def __init__(self, inner):
        super().__init__()
        self._orig_mod = inner

    def forward(self, x):
        return self._orig_mod(x)


def test_wrapped_networks_have_the_same_names_and_levels(plan):
    network = build_network(plan)
    wrapped = nn.DataParallel(_Compiled(network))
    assert unwrap(wrapped) is network
    assert list(full_state_dict(wrapped)) == list(network.state_dict())
    assert list(canonical_state_dict(wrapped)) == list(canonical_state_dict(network))
    x = _input(plan)
    assert torch.equal(forward_features(wrapped, x, 1).levels[-1], forward_features(network, x, 1).levels[-1])


def test_batchnorm_statistics_are_part_of_the_state(tiny_plans, tiny_dataset_json):
    plans = tiny_plans(2)
    kwargs = plans["configurations"]["2d"]["architecture"]["arch_kwargs"]
    kwargs["norm_op"] = "torch.nn.BatchNorm2d"
    network = build_network(Plan.from_dicts(plans, "2d", tiny_dataset_json()))
    canonical = canonical_state_dict(network)
    assert "encoder.stages.0.0.convs.0.norm.running_mean" in canonical
    assert len(canonical) == len(list(network.parameters())) + len(list(network.buffers()))


@pytest.mark.parametrize("mode", ["replicate", "circular"])
def test_with_repeated_voxels_an_image_without_content_shows_no_place(plan, mode):
    """Of a constant image each voxel's features are alike, where zeros at the border tell how far away it is."""
    network = build_network(plan).eval()
    for m in network.modules():  # InstanceNorm would amplify the rounding of what is constant
        if isinstance(m, nn.modules.instancenorm._InstanceNorm):
            m.eps = 1.0
    x, names = torch.ones_like(_input(plan)), list(network.state_dict())

    def spread():
        with torch.no_grad():
            return [float(f.flatten(2).std(2).max()) for f in forward_features(network, x, 0).skips]

    with_zeros = spread()
    set_padding(network, mode)
    assert max(spread()) < 1e-6 and min(with_zeros[:-1]) > 1e-3, (spread(), with_zeros)
    with own_padding(network):
        assert spread() == with_zeros
    assert max(spread()) < 1e-6 and list(network.state_dict()) == names
    set_padding(network, "zeros")
    assert spread() == with_zeros
    with pytest.raises(ValueError, match="zeros, replicate, circular"):
        set_padding(network, "mirror")


def test_circular_padding_makes_features_follow_a_shift_by_the_total_stride(tiny_plans, tiny_dataset_json):
    plan = Plan.from_dicts(tiny_plans(), "3d_fullres", tiny_dataset_json())
    network, stride = build_network(plan).eval(), plan.total_stride
    set_padding(network, "circular")
    x, axes = torch.randn(1, plan.n_channels, *[4 * s for s in stride]), (2, 3, 4)
    with torch.no_grad():
        at, moved = (forward_features(network, v).levels for v in (x, x.roll(stride, axes)))
    for low, high in zip(at, moved, strict=True):
        shift = [s * n // v for s, n, v in zip(stride, low.shape[2:], x.shape[2:])]
        torch.testing.assert_close(high, low.roll(shift, axes), atol=1e-4, rtol=1e-4)
