import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nnssl.heads.balanced import ScaleProjections, gather_pyramid, voxel_projector

ISOTROPIC = [(1, 1, 1), (2, 2, 2), (4, 4, 4)]
ANISOTROPIC = [(1, 1, 1), (1, 2, 2), (2, 4, 4)]
STRIDED_INPUT = [(1, 2, 2), (2, 4, 4)]


def _size(size, stride):
    return tuple(s // k for s, k in zip(size, stride))


def _voxels(size, batch, n):
    return torch.stack([torch.randint(0, s, (batch, n)) for s in size], -1)


@pytest.mark.parametrize("strides", [ISOTROPIC, ANISOTROPIC, STRIDED_INPUT])
@pytest.mark.parametrize("size", [(8, 12, 16), (16, 8, 4), (4, 20, 8)])
def test_gathering_equals_nearest_upsampling(size, strides):
    levels = [torch.randn(2, 3 + i, *_size(size, s)) for i, s in enumerate(strides)]
    voxels = _voxels(size, 2, 30)
    features = gather_pyramid(levels, voxels, strides)
    for level, feature in zip(levels, features):
        big = F.interpolate(level, size=size, mode="nearest")
        for b in range(2):
            for i in range(30):
                torch.testing.assert_close(feature[b, i], big[(b, slice(None), *voxels[b, i].tolist())])


@pytest.mark.parametrize("size", [(8, 12, 16), (16, 24, 4)])
@pytest.mark.parametrize("strides", [ISOTROPIC, ANISOTROPIC])
def test_levels_of_cell_coordinates_return_the_cell(size, strides):
    levels = []
    for stride in strides:
        axes = [torch.arange(s, dtype=torch.float32) for s in _size(size, stride)]
        levels.append(torch.stack(torch.meshgrid(*axes, indexing="ij"))[None])
    voxels = _voxels(size, 1, 40)
    for feature, stride in zip(gather_pyramid(levels, voxels, strides), strides):
        assert torch.equal(feature.long(), voxels // torch.tensor(stride))


def test_gathering_in_two_axes():
    level = torch.arange(24.0).view(1, 1, 4, 6)
    (feature,) = gather_pyramid([level], torch.tensor([[[3, 5], [7, 11]]]), [(2, 2)])
    assert feature.flatten().tolist() == [level[0, 0, 1, 2], level[0, 0, 3, 5]]
    with pytest.raises(ValueError, match="2 strides"):
        gather_pyramid([level], torch.zeros(1, 1, 2, dtype=torch.long), [(1, 1), (2, 2)])


def test_a_flip_moves_cells_only_where_the_stride_divides():
    for size in (8, 12, 20):
        i = torch.arange(size)
        for stride in range(1, size + 1):
            same = torch.equal((size - 1 - i) // stride, size // stride - 1 - i // stride)
            assert same == (size % stride == 0)


def test_each_level_fills_its_own_slots():
    channels, dim = (32, 64, 128, 256, 512), 32
    maps = ScaleProjections(channels=channels, dim=dim)
    features = [torch.randn(2000, c) for c in channels]
    z = maps(features)
    assert z.shape == (2000, 160) and maps.width == 160
    for i in range(5):
        slots = slice(i * dim, (i + 1) * dim)
        assert 0.25 < z[:, slots].var().item() < 0.42  # a third: balanced from the start
        changed = [f + 1.0 if i == j else f for j, f in enumerate(features)]
        moved = (maps(changed) - z).abs().amax(0) > 1e-6
        assert moved[slots].all() and moved.sum() == dim
    assert [m.bias is not None for m in maps.maps] == [True, False, False, False, False]
    assert sum(p.numel() for p in maps.parameters()) == 31_776


def test_features_of_single_voxels_of_a_batch_are_mapped_one_by_one():
    maps = ScaleProjections(channels=(4, 8), dim=3)
    features = [torch.randn(2, 5, c) for c in (4, 8)]
    z = maps(features)
    assert z.shape == (2, 5, 6)
    torch.testing.assert_close(z[1, 2], torch.cat([m(f[1, 2]) for m, f in zip(maps.maps, features)]))


def test_projections_are_registered_trained_or_frozen():
    for trainable in (True, False):
        maps = ScaleProjections(channels=(4, 8), dim=3, trainable=trainable)
        assert set(maps.state_dict()) == {"maps.0.weight", "maps.0.bias", "maps.1.weight"}
        assert all(p.requires_grad == trainable for p in maps.parameters())


def test_projector_has_the_published_size():
    assert sum(p.numel() for p in voxel_projector(160).parameters()) == 72_768
    assert round(sum(p.numel() for p in voxel_projector(1008).parameters()) / 1e6, 2) == 2.17
    net = voxel_projector(6, 4, layers=2)
    assert [type(m) for m in net] == [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear]
    assert net(torch.randn(5, 6)).shape == (5, 4)
