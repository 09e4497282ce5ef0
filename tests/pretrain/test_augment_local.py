import math

import numpy as np
import pytest
import torch
from scipy.ndimage import label

from nnssl.pretrain.augment.rng import StepRNG
from nnssl.pretrain.methods.hdense import HDenseConfig
from nnssl.pretrain.methods.hdense.local import (
    SHUFFLE_SHARE,
    _block,
    _look_up,
    _look_up_at_once,
    _look_up_chosen,
    _on_grid,
    _order,
    _paint_at_once,
    _paint_blocks,
    _read_at_once,
    _sources,
    _write_in_order,
    genesis_transforms,
    inpaint,
    inpaint_size_range,
    monotone_intensity,
    pixel_shuffle,
    shuffle_block,
)

SIZES = [(20, 40, 60), (16, 45, 48), (8, 12, 16)]


def genesis(u, rng, **options):
    return genesis_transforms(u, rng, HDenseConfig(**options))


def _ids(size, batch=1, channels=1):
    """Every voxel has its own value."""
    n = math.prod(size)
    return (torch.arange(batch * channels * n) / (batch * channels * n)).view(batch, channels, *size)


@pytest.mark.parametrize(
    ("size", "block"),
    [
        ((128, 128, 32), (6, 6, 1)),
        ((16, 128, 128), (1, 6, 6)),
        ((20, 45, 60), (1, 2, 3)),
        ((24, 32, 24), (2, 2, 2)),
        ((4, 32, 24), (1, 2, 2)),
        ((64, 80), (3, 4)),
        ((39, 39), (2, 2)),
        ((40, 39), (2, 1)),
        ((8, 7, 9), (2, 1, 2)),
        ((7, 7, 7), (2, 2, 2)),
        ((4, 4, 1), (2, 2, 1)),
    ],
)
def test_block_sizes_never_shuffle_nothing(size, block):
    assert shuffle_block(size) == block


@pytest.mark.parametrize("size", SIZES)
def test_one_block_is_a_permutation_of_its_window(size):
    u = _ids(size)
    out = pixel_shuffle(u, StepRNG(3, 0, 1), p=1.0, blocks=1)
    changed = torch.nonzero((out != u)[0, 0])
    extent = changed.amax(0) - changed.amin(0) + 1
    assert len(changed) > 0 and all(e <= b for e, b in zip(extent.tolist(), shuffle_block(size)))
    assert torch.equal(out.flatten().sort().values, u.flatten())


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("independent", [True, False])
def test_many_blocks_move_values_less_than_a_block(size, independent):
    u = _ids(size, batch=2, channels=2)
    out = pixel_shuffle(u, StepRNG(3, 0, 2), p=1.0, independent=independent)
    n = math.prod(size)
    source = (out * (4 * n)).round().long()
    own = (u * (4 * n)).round().long()
    assert torch.equal(source // n, own // n)  # no value leaves its sample or channel
    assert torch.equal((source % n)[:, 0], (source % n)[:, 1])  # channels move together
    for axis, block in enumerate(shuffle_block(size)):
        step = math.prod(size[axis + 1 :])
        moved = (source % n) // step % size[axis] - (own % n) // step % size[axis]
        assert moved.abs().max() == block - 1
    share = (out != u).float().mean().item()
    inside = math.prod(shuffle_block(size))
    assert abs(share - (1 - math.exp(-0.343)) * (1 - 1 / inside)) < 0.06


def test_the_last_voxel_can_move_and_the_permutation_can_be_shared():
    u = _ids((8, 8))
    moved = [(pixel_shuffle(u, StepRNG(s, 0, 1), p=1.0, blocks=40) != u)[0, 0, -1, -1].item() for s in range(20)]
    assert any(moved)
    out = pixel_shuffle(_ids((40, 400)), StepRNG(0, 0, 1), p=1.0, blocks=30, independent=False)
    shifts = ((out - _ids((40, 400))) * 16000).round().long().flatten()
    patterns = len(set(shifts[shifts != 0].tolist()))
    other = pixel_shuffle(_ids((40, 400)), StepRNG(0, 0, 1), p=1.0, blocks=30)
    shifts = ((other - _ids((40, 400))) * 16000).round().long().flatten()
    assert patterns < len(set(shifts[shifts != 0].tolist()))


def test_published_coverage_on_the_published_crop():
    u = _ids((128, 128, 32))
    out = pixel_shuffle(u, StepRNG(0, 0, 1), p=1.0, blocks=5000)
    assert (out != u).float().mean() == pytest.approx(0.285, abs=0.01)
    assert torch.equal(pixel_shuffle(u, StepRNG(0, 0, 1), p=1.0), out)  # 5000 by itself
    assert pytest.approx(0.34332, abs=1e-5) == SHUFFLE_SHARE


def test_the_smallest_crops_get_one_block():
    """0.34 of four voxels are less than one block of four; of 48 voxels they are eight blocks of two."""
    for size, blocks in (((2, 2), 1), ((8, 6), 8)):
        u = _ids(size, 20)
        assert torch.equal(
            pixel_shuffle(u, StepRNG(0, 0, 20), p=1.0), pixel_shuffle(u, StepRNG(0, 0, 20), p=1.0, blocks=blocks)
        )


def test_both_ways_to_shuffle_agree():
    """What parallel writes give on a GPU, and what writing in order gives on a CPU; blocks overlap, one sample is left out."""
    g = torch.Generator().manual_seed(3)
    target, source = (torch.randint(50, (4, 120), generator=g) for _ in range(2))
    chosen = torch.tensor([True, False, True, True])
    index = _sources(target, source, chosen, 50)
    assert torch.equal(index[1], torch.arange(50)) and not torch.equal(index[0], torch.arange(50))
    assert int(index[0][target[0, -1]]) == int(source[0, -1])
    image = torch.rand(4, 3, 5, 10)
    kept = image.clone()
    written = _write_in_order(image, target, source, chosen)
    assert torch.equal(written, image.flatten(2).gather(2, index[:, None].expand(-1, 3, -1)).view_as(image))
    assert torch.equal(_read_at_once(image, target, source, chosen), written)
    assert torch.equal(image, kept)


def test_the_last_of_several_writes_counts_and_a_single_one_too():
    target, source = torch.tensor([[3, 1, 1]]), torch.tensor([[0, 2, 4]])
    assert _sources(target, source, torch.tensor([True]), 5).tolist() == [[0, 4, 2, 0, 4]]
    assert _sources(target, source, torch.tensor([False]), 5).tolist() == [[0, 1, 2, 3, 4]]


@pytest.mark.parametrize("inside", [1, 2, 8, 64, 65, 300])
def test_keys_are_sorted_as_argsort_does(inside):
    keys = torch.stack([torch.randperm(4096)[:inside] for _ in range(50)]) / 4096
    assert torch.equal(_order(keys), keys.argsort(1))


@pytest.mark.parametrize("size", [(30, 40, 60), (9, 12, 16), (50, 30)])
def test_blocks_are_painted_alike_one_by_one_and_at_once(size):
    g = torch.Generator().manual_seed(1)
    u = torch.full((6, 2, *size), 2.0)
    painted = torch.arange(12) < torch.tensor([0, 1, 3, 5, 12, 7])[:, None]
    extent, place = (torch.rand(6, 12, len(size), generator=g) for _ in range(2))
    ways = [
        paint(u, painted, extent, place, [torch.Generator().manual_seed(i) for i in range(6)])
        for paint in (_paint_blocks, _paint_at_once)
    ]
    assert torch.equal(*[way == 2 for way in ways])
    assert torch.equal(ways[0][0], u[0]) and bool((ways[0][4] != 2).any())
    noise = ways[0][(ways[0] != 2)]
    assert noise.min() >= 0 and noise.max() < 1 and abs(noise.mean() - 0.5) < 0.02 and abs(noise.var() - 1 / 12) < 0.01
    assert not torch.equal(ways[0][4, 0], ways[0][4, 1])


def test_intensities_are_looked_up_between_the_values_of_the_table():
    table = torch.rand(2048).cumsum(0) / 1100
    u = torch.cat([torch.rand(100_000), torch.tensor([-0.5, 0.0, 1.0, 1.5])])
    mapped = u.clone()
    _look_up(mapped, table)
    expected = np.interp(u.clamp(0, 1).double().numpy(), np.linspace(0, 1, 2048), table.double().numpy())
    np.testing.assert_allclose(mapped.numpy(), expected, atol=1e-4 * float(table.max()))


def test_both_ways_to_map_intensities_agree():
    """All channels at once, as on a GPU, and one after the other: each by its own table, and only where it is chosen."""
    table = torch.rand(3, 2, 2048).cumsum(2)
    table = (table - table[..., :1]) / (table[..., -1:] - table[..., :1])
    chosen = torch.tensor([[True, False], [True, True], [False, True]])
    u = torch.rand(3, 2, 5, 6, 7) * 1.2 - 0.1
    u[:, :, 0, 0, 0], u[:, :, 0, 0, 1] = 0.0, 1.0
    kept = u.clone()
    by_one, at_once = _look_up_chosen(u, table, chosen), _look_up_at_once(u, table, chosen)
    torch.testing.assert_close(by_one, at_once, atol=1e-5, rtol=0)
    assert (
        torch.equal(u, kept) and torch.equal(by_one[~chosen], u[~chosen]) and torch.equal(at_once[~chosen], u[~chosen])
    )
    for out in (by_one, at_once):
        assert (out[chosen][:, 0, 0, 0] == 0).all() and (out[chosen][:, 0, 0, 1] == 1).all()
        for i, c in torch.nonzero(chosen).tolist():
            places = u[i, c].clamp(0, 1).double().numpy()
            expected = np.interp(places, np.linspace(0, 1, 2048), table[i, c].double().numpy())
            np.testing.assert_allclose(out[i, c].numpy(), expected, atol=1e-5)


def test_a_curve_is_read_at_even_places_of_its_first_axis():
    """By hand: between (0.2, 0.6) and (0.9, 0.7) the curve rises by a seventh of the way."""
    x, y = torch.tensor([0.0, 0.1, 0.2, 0.9, 1.0]), torch.tensor([0.0, 0.4, 0.6, 0.7, 1.0])
    expected = torch.tensor([0.0, 0.6 + 0.05 / 7, 0.6 + 0.3 / 7, 0.6 + 0.55 / 7, 1.0])
    torch.testing.assert_close(_on_grid(x.expand(2, 3, 5), y.expand(2, 3, 5)), expected.expand(2, 3, 5))
    steep, end = torch.tensor([0.0, 0.5, 0.5, 1.0, 1.0]), torch.tensor([0.0, 0.2, 0.8, 1.0, 1.0])
    expected = torch.tensor([[[0.0, 0.1, 0.8, 0.9, 1.0]]])  # neither a step nor a curve that ends early divides by 0
    torch.testing.assert_close(_on_grid(steep.view(1, 1, 5), end.view(1, 1, 5)), expected)


def test_defaults_are_the_published_numbers():
    u = torch.rand(60, 2, 8, 12, 10)

    def rng():
        return StepRNG(4, 0, 60)

    shuffled = pixel_shuffle(u, rng(), p=0.8, blocks=0, independent=True)
    assert torch.equal(pixel_shuffle(u, rng()), shuffled)
    assert torch.equal(monotone_intensity(u, rng()), monotone_intensity(u, rng(), p=0.9))
    assert torch.equal(inpaint(u, rng()), inpaint(u, rng(), most=30, again=0.95))
    published = {"shuffle_p": 0.8, "shuffle_blocks": 0, "independent_permutations": True}
    published |= {"nonlinear_p": 0.9, "inpaint_max": 30, "inpaint_p": 0.95}
    assert torch.equal(genesis(u, rng()), genesis(u, rng(), **published))


def test_each_option_reaches_its_step():
    u, off = torch.rand(8, 1, 8, 12, 10), {"shuffle_p": 0.0, "nonlinear_p": 0.0, "inpaint_p": 0.0}
    shuffled = genesis(u, StepRNG(0, 0, 8), **{**off, "shuffle_p": 1.0})
    assert torch.isin(shuffled, u).all() and not torch.equal(shuffled, u)
    fewer = genesis(u, StepRNG(0, 0, 8), **{**off, "shuffle_p": 1.0, "shuffle_blocks": 1})
    assert 0 < (fewer != u).flatten(1).sum(1).max() <= math.prod(shuffle_block(u.shape[2:]))
    mapped = genesis(u, StepRNG(0, 0, 8), **{**off, "nonlinear_p": 1.0})
    for a, b in zip(u.flatten(1), mapped.flatten(1)):
        assert (b[a.argsort()].diff() >= 0).all() and not torch.equal(a, b)
    painted = genesis(u, StepRNG(0, 0, 8), **{**off, "inpaint_p": 1.0, "inpaint_max": 1})
    boxes = (painted != u).flatten(1).sum(1)
    assert (boxes > 0).all() and (boxes <= math.prod(inpaint_size_range(s)[1] for s in u.shape[2:])).all()


@pytest.mark.parametrize(
    ("size", "extents", "starts"),
    [
        (30, (3, 5), ((3, 24), (3, 22))),  # a tenth to under a fifth, three voxels from each border
        (100, (10, 19), ((3, 87), (3, 78))),
        (8, (1, 1), ((3, 4), (3, 4))),
        (6, (1, 1), ((2, 3), (2, 3))),  # three voxels do not fit
        (1, (1, 1), ((0, 0), (0, 0))),
    ],
)
def test_a_painted_block_by_hand(size, extents, starts):
    """Its smallest and largest extent, and for both its first and last place."""
    least, most = torch.tensor(0.0), torch.tensor(1 - 2**-24)
    for share, extent, (first, last) in zip((least, most), extents, starts):
        assert [int(v) for v in _block(size, share, least)] == [first, extent]
        assert [int(v) for v in _block(size, share, most)] == [last, extent]


def test_probability_zero_is_the_identity():
    u = torch.rand(3, 2, 8, 12, 10)
    out = genesis(u, StepRNG(0, 0, 3), shuffle_p=0, nonlinear_p=0, inpaint_max=1, inpaint_p=0)
    assert torch.equal(out, u)
    shuffled = pixel_shuffle(u.repeat(100, 1, 1, 1, 1), StepRNG(0, 0, 300), p=0.8)
    assert ((shuffled != u.repeat(100, 1, 1, 1, 1)).flatten(1).any(1).float().mean() - 0.8).abs() < 0.08


@pytest.mark.parametrize("size", [(30, 40, 60), (16, 45, 48), (9, 12, 16), (50, 30)])
def test_painted_voxels_lie_in_legal_boxes(size):
    u = torch.full((60, 1, *size), 2.0)
    out = inpaint(u, StepRNG(1, 0, 60), most=1, again=1.0)
    seen = [set() for _ in size]
    for image in out[:, 0]:
        box = torch.nonzero(image != 2)
        low, high = box.amin(0), box.amax(0)
        extent = (high - low + 1).tolist()
        assert len(box) == math.prod(extent)  # one full box
        assert image[image != 2].min() >= 0 and image[image != 2].max() < 1
        for axis, (e, s) in enumerate(zip(extent, size)):
            smallest, largest = inpaint_size_range(s)
            assert smallest <= e <= largest
            margin = min(3, (s - e) // 2)
            assert low[axis] >= margin and high[axis] <= s - 1 - margin
            seen[axis].add(e)
    assert all(len(s) == b - a + 1 for s, (a, b) in zip(seen, map(inpaint_size_range, size)))


def test_painted_extents_of_the_published_crop():
    assert [inpaint_size_range(s) for s in (128, 32, 16, 8, 1)] == [(12, 24), (3, 5), (1, 2), (1, 1), (1, 1)]


def test_number_of_painted_blocks():
    """The number before the union: blocks that touch cannot be counted afterwards."""
    rng = StepRNG(0, 0, 2000)
    number = (rng.uniform(0, 1, 30) < 0.95).cumprod(1).sum(1).float()
    assert number.mean().item() == pytest.approx(14.9, abs=1.0)
    out = inpaint(torch.full((2000, 1, 12, 10), 2.0), StepRNG(0, 0, 2000))
    painted = (out != 2).flatten(1)
    assert (~painted.any(1)).float().mean().item() == pytest.approx(0.05, abs=0.02)
    assert torch.equal(painted.any(1), number > 0)
    for image in out[:50, 0]:
        assert label((image != 2).numpy())[1] <= 30


def test_painted_share():
    """3.6 % of the voxels on average, as in the authors' code: 14.9 blocks of 0.25 % each, less what overlaps."""
    out = inpaint(torch.full((400, 1, 40, 50, 30), 2.0), StepRNG(2, 0, 400))
    assert (out != 2).float().mean().item() == pytest.approx(0.037, abs=0.004)


def test_intensity_curves():
    u = torch.linspace(0, 1, 500).view(1, 1, 20, 25).expand(300, 2, -1, -1).clone()
    out = monotone_intensity(u, StepRNG(0, 0, 300), p=1.0)
    curve = out.flatten(2)
    assert out.shape == u.shape and out.dtype == torch.float32
    assert (curve[..., 0] == 0).all() and (curve[..., -1] == 1).all()
    assert (curve.diff(dim=2) >= 0).all() and curve.min() >= 0 and curve.max() <= 1
    assert curve[..., 250].mean().item() == pytest.approx(0.49, abs=0.04)
    assert curve[..., 250].std().item() == pytest.approx(0.19, abs=0.04)
    assert (curve[:, 0] != curve[:, 1]).flatten(1).any(1).all()  # channels have their own
    share = (monotone_intensity(u, StepRNG(1, 0, 300), p=0.9) != u).flatten(2).any(2).float().mean().item()
    assert share == pytest.approx(0.9, abs=0.05)
    outside = monotone_intensity(torch.tensor([-0.5, 1.5]).view(1, 1, 2), StepRNG(0, 0, 1), p=1.0)
    assert outside.flatten().tolist() == [0, 1]


def test_intensity_keeps_the_order_of_voxels():
    u = torch.rand(4, 1, 6, 7, 5)
    out = monotone_intensity(u, StepRNG(5, 0, 4), p=1.0)
    for a, b in zip(u.flatten(1), out.flatten(1)):
        assert (b[a.argsort()].diff() >= 0).all()


def test_intensity_equals_a_slow_bezier():
    u = torch.linspace(0.01, 0.99, 40).view(1, 1, 40)
    rng = StepRNG(7, 0, 1)
    p1, p2 = rng.uniform(0, 1, 1, 2, 2)[0, 0].double()
    out = monotone_intensity(u, StepRNG(7, 0, 1), p=1.0).flatten()
    for value, mapped in zip(u.flatten().double(), out):
        low, high = 0.0, 1.0
        for _ in range(60):  # bisection for the curve's parameter
            t = (low + high) / 2
            x = 3 * (1 - t) ** 2 * t * p1[0] + 3 * (1 - t) * t**2 * p2[0] + t**3
            low, high = (t, high) if x < value else (low, t)
        y = 3 * (1 - t) ** 2 * t * p1[1] + 3 * (1 - t) * t**2 * p2[1] + t**3
        assert mapped.item() == pytest.approx(y.item(), abs=2e-3)


def test_the_clean_image_stays_clean():
    """Over many seeds, since some draws skip the steps that copy."""
    u = torch.rand(250, 1, 6, 8, 10)
    kept = u.clone()
    for step in range(2):
        genesis(u, StepRNG(0, step, 250))
    assert torch.equal(u, kept)


def test_streams():
    u = torch.rand(4, 1, 10, 12, 8)
    rng = StepRNG(0, 0, 4)
    a, b = genesis(u, rng), genesis(u, rng)
    assert not torch.equal(a, b)
    assert torch.equal(a, genesis(u, StepRNG(0, 0, 4)))
    assert not torch.equal(a, genesis(u, StepRNG(0, 1, 4)))
    assert not torch.equal(a, genesis(u, StepRNG(1, 0, 4)))


def test_two_ranks_draw_what_one_process_draws():
    u = torch.rand(4, 1, 10, 12, 8)
    whole = genesis(u, StepRNG(0, 0, 4))
    parts = [genesis(u[i : i + 2], StepRNG(0, 0, 4, i, 2)) for i in (0, 2)]
    assert torch.equal(torch.cat(parts), whole)
