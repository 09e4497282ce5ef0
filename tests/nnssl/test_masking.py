"""Which blocks fit a plan, how many are hidden, where their voxels are, and the guesses of somebody who learnt nothing."""

import itertools

import numpy as np
import pytest
import torch

from nnssl.errors import NnsslError
from nnssl.masking import (
    block_means,
    block_sum,
    choose_block,
    inpaint,
    mask_blocks,
    mostly,
    picture,
    surrounding_means,
    to_voxels,
)


def cumulative(*strides):
    out, total = [], (1,) * len(strides[0])
    for s in strides:
        total = tuple(a * b for a, b in zip(total, s))
        out.append(total)
    return out


ISO = cumulative((1, 1, 1), *[(2, 2, 2)] * 5)
FLAT = cumulative((1, 1, 1), (1, 2, 2), (2, 2, 2), (2, 2, 2), (2, 2, 2), (1, 2, 2))
THICK = cumulative((1, 1, 1), (1, 2, 2), (1, 2, 2), (2, 2, 2), (2, 2, 2), (1, 2, 2))


@pytest.mark.parametrize(
    ("size", "strides", "block", "count"),
    [
        ((160, 160, 160), ISO, (16, 16, 16), 1000),
        ((48, 192, 192), FLAT, (8, 16, 16), 864),
        ((20, 256, 224), THICK, (4, 16, 16), 1120),
        ((40, 56, 40), cumulative((1, 1, 1), (2, 2, 2), (2, 2, 2), (2, 2, 2)), (4, 4, 4), 1400),
        ((256, 320), cumulative((1, 1), *[(2, 2)] * 6), (32, 32), 80),
    ],
)
def test_block_follows_the_strides(size, strides, block, count):
    assert choose_block(size, strides) == block
    assert torch.tensor([n // b for n, b in zip(size, block)]).prod() == count


def test_small_crops_get_smaller_blocks_and_what_does_not_fit_is_refused():
    assert choose_block((16, 16, 16), ISO[:4]) == (4, 4, 4)
    assert choose_block((8, 4, 4), ISO[:4]) == (1, 1, 1)
    assert choose_block((4, 2, 2), ISO[:3]) == (1, 1, 1)
    assert choose_block((8, 8, 8), cumulative((2, 2, 2), (2, 2, 2))) == (2, 2, 2)
    assert choose_block((16, 16, 16), cumulative((2, 2, 2), (2, 2, 2))) == (2, 2, 2)  # the last stage is never taken
    assert choose_block((4, 2), [(2, 2), (4, 4)]) == (2, 2)  # two blocks are enough
    assert choose_block((20, 30, 40), ISO, block=(5, 6, 8)) == (5, 6, 8)
    assert choose_block((20, 30, 40), ISO, block=(1, 6, 8)) == (1, 6, 8)
    assert choose_block((16, 16, 16), ISO, block=(8, 16, 16)) == (8, 16, 16)
    for block in ((3, 4, 4), (16, 16, 16), (4, 4), (0, 4, 4)):
        with pytest.raises(NnsslError, match="1x1x1, 2x2x2, 4x4x4, 8x8x8"):
            choose_block((16, 16, 16), ISO, block=block)
    with pytest.raises(NnsslError, match="--crop"):
        choose_block((2, 2), [(2, 2), (4, 4)])


@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.6, 0.75, 0.8, 0.9])
@pytest.mark.parametrize("grid", [(4, 4, 4), (6, 6, 6), (10, 10, 10), (5, 16, 14), (15, 15, 15), (4, 16)])
def test_exact_counts(ratio, grid):
    n = int(torch.tensor(grid).prod())
    mask = mask_blocks(torch.rand(5, *grid), ratio)
    assert (mask.flatten(1).sum(1) == min(max(round(ratio * n), 1), n - 1)).all()
    assert not torch.equal(mask[0], mask[1])


def test_counts_are_clamped_and_per_sample():
    scores = torch.rand(4, 2, 2)
    assert (mask_blocks(scores, 0.99).flatten(1).sum(1) == 3).all()
    assert (mask_blocks(scores, 0.01).flatten(1).sum(1) == 1).all()
    ratio = torch.tensor([0.25, 0.5, 0.75, 0.5])
    assert mask_blocks(scores, ratio).flatten(1).sum(1).tolist() == [1, 2, 3, 2]
    equal = torch.zeros(1, 4, 4)  # ties do not change the count
    assert mask_blocks(equal, 0.75).sum() == 12
    assert torch.equal(mask_blocks(scores, 0.5), mask_blocks(scores.clone(), 0.5))


def test_each_block_is_hidden_equally_often():
    share = mask_blocks(torch.rand(2000, 3, 4, 5), 0.75).double().mean(0)
    assert (share - 0.75).abs().max() < 4 * (0.75 * 0.25 / 2000) ** 0.5


def test_only_eligible_blocks_are_hidden():
    eligible = torch.rand(50, 3, 4, 5) < 0.4
    eligible[0] = False
    eligible[1] = False
    eligible[1, 0, 0, 0] = True
    mask = mask_blocks(torch.rand(50, 3, 4, 5), 0.75, eligible)
    n = eligible.flatten(1).sum(1)
    assert not (mask & ~eligible).any()
    assert mask.flatten(1).sum(1).tolist() == [min(max(round(0.75 * k), 1), k - 1) if k > 1 else 0 for k in n.tolist()]


@pytest.mark.parametrize(("grid", "block"), [((2, 3, 4), (4, 2, 3)), ((5, 2, 3), (1, 5, 2)), ((3, 4), (2, 5))])
def test_voxels_are_the_blocks(grid, block):
    blocks = torch.randn(2, 3, *grid)
    voxels = to_voxels(blocks, block)
    for _ in range(200):
        place = [int(torch.randint(g * b, ())) for g, b in zip(grid, block)]
        cell = [p // b for p, b in zip(place, block)]
        assert torch.equal(voxels[(..., *place)], blocks[(..., *cell)])
    size = int(torch.tensor(block).prod())
    torch.testing.assert_close(block_sum(voxels, block), blocks * size)
    valid = torch.zeros(1, 1, *voxels.shape[2:], dtype=torch.bool)
    valid[..., : block[-1] // 2 if block[-1] > 1 else 1] = True
    expected = (block_sum(valid.float(), block) >= size / 2)[0, 0]
    assert torch.equal(mostly(valid, block)[0, 0], expected)


def test_surrounding_means_against_a_loop():
    block, grid = (2, 3, 2), (3, 4, 5)
    size = [g * b for g, b in zip(grid, block)]
    x = torch.randn(2, 2, *size, dtype=torch.float64)
    visible = to_voxels(mask_blocks(torch.rand(2, *grid), 0.5)[:, None], block)
    visible = visible & (torch.rand(2, 1, *size) < 0.7)
    got = surrounding_means(x, visible, block)
    for b in range(2):
        for cell in torch.cartesian_prod(*[torch.arange(g) for g in grid]).tolist():
            for radius in (1, 2, 4, 8):
                part = tuple(
                    slice(max(0, i - radius) * n, min(g, i + radius + 1) * n) for i, n, g in zip(cell, block, grid)
                )
                seen = visible[(b, 0, *part)]
                if seen.any():
                    break
            for c in range(2):
                expected = x[(b, c, *part)][seen].mean()
                place = tuple(i * n for i, n in zip(cell, block))
                torch.testing.assert_close(got[(b, c, *place)], expected)


def test_surrounding_means_looks_farther_where_nothing_is_near():
    x, visible = torch.randn(1, 1, 12, 2), torch.zeros(1, 1, 12, 2, dtype=torch.bool)
    assert (surrounding_means(x, visible, (1, 2)) == 0).all()
    visible[..., 0, :] = True
    torch.testing.assert_close(surrounding_means(x, visible, (1, 2)), x[:, :, :1].mean().expand_as(x))


@pytest.mark.parametrize("size", [(16, 24, 12), (9, 13, 7), (20, 30)])
def test_interpolation_follows_a_slope_and_the_oracle_knows_the_means(size):
    axes = [torch.linspace(0, s, s) for s in size]
    ramp = sum(a.view([-1 if i == k else 1 for k in range(len(size))]) for i, a in enumerate(axes))[None, None]
    visible = torch.rand(1, 1, *size) < 0.3
    guess = inpaint(torch.where(visible, ramp, torch.nan), visible)
    assert torch.equal(guess[visible], ramp[visible])
    assert torch.isfinite(guess).all()
    hidden = ~visible
    assert (guess - ramp)[hidden].abs().mean() < 0.15 * (ramp - ramp.mean())[hidden].abs().mean()
    constant = torch.full_like(ramp, 3.0)
    torch.testing.assert_close(inpaint(constant, visible), constant)
    blocks = torch.randn(1, 2, *[s // 1 for s in size])
    torch.testing.assert_close(block_means(blocks, torch.ones_like(blocks, dtype=torch.bool), (1,) * len(size)), blocks)


def test_block_means_over_a_region():
    x = torch.arange(16.0).view(1, 1, 4, 4)
    region = torch.zeros(1, 1, 4, 4, dtype=torch.bool)
    region[..., 0, :2] = True
    means = block_means(x, region, (2, 2))
    assert (means[..., :2, :2] == 0.5).all() and (means[..., 2:, :] == 0).all()


def test_guesses_ignore_what_is_hidden():
    x, visible = torch.randn(2, 1, 8, 12, 4), torch.rand(2, 1, 8, 12, 4) < 0.3
    other = torch.where(visible, x, torch.inf)
    assert torch.equal(inpaint(x, visible), inpaint(other, visible))
    assert torch.equal(surrounding_means(x, visible, (2, 2, 2)), surrounding_means(other, visible, (2, 2, 2)))


@pytest.mark.parametrize(
    ("size", "block", "count"),
    [
        ((16, 16, 8), (2, 2, 2), 256),
        ((12, 28, 12), (2, 2, 2), 504),
        ((16, 16, 16), (4, 4, 4), 64),
        ((12, 28, 16), (4, 4, 4), 84),
    ],
)
def test_a_stage_has_to_give_64_blocks(size, block, count):
    """The next coarser stage would give 32, 63, 8 and 10 blocks."""
    strides = cumulative((1, 1, 1), (2, 2, 2), (2, 2, 2), (2, 2, 2), (1, 1, 1))
    assert choose_block(size, strides) == block
    assert torch.tensor([n // b for n, b in zip(size, block)]).prod() == count
    assert choose_block((8, 8, 4), strides) == (1, 1, 1) and choose_block((4, 4, 3), strides) == (1, 1, 1)
    assert choose_block(size, strides, least=1) == max(
        (s for s in strides if all(n % b == 0 for n, b in zip(size, s)) and s != tuple(size)), key=lambda s: s[0]
    )


def slow_inpaint(value, known, smoothing):
    """Push and pull by loops: means of what is known in 2x2(x2) voxels, filled, up again, then Jacobi steps; ``(*size)`` each."""
    size = value.shape
    if all(n == 1 for n in size):
        return value.copy()
    step = [min(2, n) for n in size]
    grid = [-(-n // s) for n, s in zip(size, step)]
    mean, there = np.zeros(grid), np.zeros(grid, dtype=bool)
    for cell in np.ndindex(*grid):
        part = tuple(slice(c * s, min(c * s + s, n)) for c, s, n in zip(cell, step, size))
        if known[part].any():
            mean[cell], there[cell] = value[part][known[part]].mean(), True
    coarse, out = slow_inpaint(mean, there, smoothing), np.zeros(size)
    for place in np.ndindex(*size):
        places = [max(0.0, (p + 0.5) * g / n - 0.5) for p, g, n in zip(place, grid, size)]  # of the middle of a voxel
        for corner in itertools.product((0, 1), repeat=len(size)):
            at = tuple(min(int(p) + c, g - 1) for p, c, g in zip(places, corner, grid))
            out[place] += coarse[at] * np.prod([p % 1 if c else 1 - p % 1 for p, c in zip(places, corner)])
    out = np.where(known, value, out)
    for _ in range(smoothing):
        padded = np.pad(out, 1, mode="edge")
        inner = [slice(1, -1)] * len(size)
        sides = []
        for axis in range(len(size)):
            for shift in (slice(0, -2), slice(2, None)):
                sides.append(padded[tuple(shift if a == axis else s for a, s in enumerate(inner))])
        out = np.where(known, value, np.mean(sides, axis=0))
    return out


@pytest.mark.parametrize("size", [(5, 4, 3), (1, 6, 7), (6, 9), (2, 3)])
@pytest.mark.parametrize("smoothing", [0, 1, 3])
def test_interpolation_against_a_loop(size, smoothing):
    x, visible = torch.randn(2, 2, *size, dtype=torch.float64), torch.rand(2, 2, *size) < 0.25
    visible[..., :2] |= torch.rand(2, 2, *size[:-1], 2) < 0.2
    got = inpaint(x, visible, smoothing)
    for b, c in itertools.product(range(2), range(2)):
        seen, value = visible[b, c].numpy(), x[b, c].numpy()
        expected = slow_inpaint(np.where(seen, value, 0.0), seen, smoothing)
        np.testing.assert_allclose(got[b, c].numpy(), expected, atol=1e-12)
    assert torch.equal(inpaint(x, visible), inpaint(x, visible, 32))
    nothing = torch.zeros_like(visible)
    assert not inpaint(x, nothing).any() and not inpaint(x[..., :1, :1][:, :, :1], nothing[..., :1, :1][:, :, :1]).any()


def test_farther_blocks_are_asked_only_where_nearer_ones_show_nothing():
    """Of eight blocks in a row 0 and 5 are visible: one to each side is looked at, then two, then four."""
    x, visible = torch.full((1, 1, 8), torch.nan), torch.zeros(1, 1, 8, dtype=torch.bool)
    x[..., 0], x[..., 5] = 0.0, 10.0
    visible[..., 0] = visible[..., 5] = True
    x, visible = x[..., None].expand(-1, -1, -1, 2), visible[..., None].expand(-1, -1, -1, 2)
    got = surrounding_means(x, visible, (1, 2))[0, 0, :, 0]
    assert got.tolist() == pytest.approx([0, 0, 0, 10, 10, 10, 10, 10])


def test_the_number_of_hidden_blocks_is_rounded_as_it_is_written():
    """0.7 of 5 blocks are 3.5, which rounds to 4; in single precision 0.7 is a little less, and 3 would be hidden."""
    assert mask_blocks(torch.rand(3, 5), 0.7).sum(1).tolist() == [4, 4, 4]
    assert mask_blocks(torch.rand(1, 2), 0.9).sum() == 1 and mask_blocks(torch.rand(1, 1), 0.9).sum() == 0


def test_half_a_block_is_mostly():
    valid = torch.zeros(1, 1, 2, 6, dtype=torch.bool)
    valid[..., 0, :2] = True  # two of four voxels
    valid[..., 0, 2] = True  # one
    valid[..., :, 4] = valid[..., 0, 5] = True  # three
    assert mostly(valid, (2, 2))[0, 0].tolist() == [[True, False, True]]
    assert mostly(valid, (2, 2), 0.75)[0, 0].tolist() == [[False, False, True]]


@pytest.mark.parametrize("dim", [2, 3])
def test_the_picture_shows_what_was_hidden_and_how_far_the_guess_is_off(dim):
    """0 to 10 is the range of the image's first channel, but for one bright pixel; what is painted is 2 too bright."""
    image = torch.full((1, 2, 20, 20), 5.0)
    image[0, 0, :, :5], image[0, 0, :, 5:10], image[0, 0, 0, 0], image[0, 1] = 0, 10, 1000, torch.randn(20, 20)
    mask, valid = torch.zeros(1, 2, 20, 20, dtype=torch.bool), torch.ones(1, 1, 20, 20, dtype=torch.bool)
    mask[0, 0, 10:], mask[0, 1, :10], valid[..., 15:, :] = True, True, False
    if dim == 3:  # the slice in the middle of five
        around = [torch.randn(1, 2, 20, 20) for _ in range(4)]
        image = torch.stack([*around[:2], image, *around[2:]], 2)
        mask, valid = (torch.stack([m, ~m, m, ~m, m], 2) for m in (mask, valid))
    panel = picture.masked_panel(image, torch.where(mask, image + 2, torch.nan), mask, valid)

    def middle(x):
        return (x[0, 0] if dim == 2 else x[0, 0, 2]).numpy()

    def scaled(x):
        return np.clip(middle(x) / 10, 0, 1)

    hidden, counted = middle(mask), middle(mask[:, :1] & valid)
    painted, guess = scaled(torch.where(mask, image + 2, image)), inpaint(image, valid & ~mask)
    filled = scaled(torch.where(mask, guess, image))
    shown = panel.columns[picture.SHOWN][0]
    np.testing.assert_allclose(panel.columns[picture.REAL][0], scaled(image), atol=1e-6)
    np.testing.assert_allclose(panel.columns[picture.PAINTED][0], painted, atol=1e-6)
    np.testing.assert_allclose(panel.columns[picture.FILLED][0], filled, atol=1e-6)
    np.testing.assert_allclose(shown[hidden], np.broadcast_to([0.15, 0.3, 0.6], shown[hidden].shape), atol=1e-6)
    np.testing.assert_allclose(shown[~hidden], np.repeat(scaled(image)[~hidden][:, None], 3, 1), atol=1e-6)
    error = np.where(counted, np.abs(painted - scaled(image)), 0)
    np.testing.assert_allclose(panel.columns[picture.ERROR][0], error, atol=1e-6)
    assert error[10:15, :5] == pytest.approx(0.2) and not error[10:15, 5:10].any() and not error[15:].any()
    missed = np.abs(filled - scaled(image))[counted].mean()
    assert panel.tags == {
        picture.PAINTED: ["mean error 15 % of the range"],  # 0.2 of three quarters
        picture.FILLED: [f"mean error {100 * missed:.0f} % of the range"],
    }


def test_the_picture_of_an_image_without_contrast_or_without_hidden_pixels():
    image, mask = torch.full((2, 1, 6, 8), 3.0), torch.zeros(2, 1, 6, 8, dtype=torch.bool)
    mask[0, :, :3] = True
    panel = picture.masked_panel(image, image + 1, mask, torch.ones_like(mask))
    assert all(np.isfinite(c).all() and c.min() >= 0 and c.max() <= 1 for c in panel.columns.values())
    assert panel.tags[picture.PAINTED] == ["mean error 100 % of the range", "mean error 0 % of the range"]


def test_each_picture_has_its_own_scale_without_the_outermost_of_a_thousand_pixels():
    """Of 0 to 999 the 0.5th percentile is 4.995, the 99.5th 994.005; an image of a tiny range looks the same."""
    ramp, mask = torch.arange(1000.0).view(1, 1, 20, 50), torch.zeros(1, 1, 20, 50, dtype=torch.bool)
    mask[0, 0, 10, 0] = True  # a tenth of the range too bright
    width = 994.005 - 4.995
    for scale in (1.0, 2e-8):
        panel = picture.masked_panel(ramp * scale, (ramp + 0.1 * width) * scale, mask, torch.ones_like(mask))
        expected = np.clip((np.arange(1000) - 4.995) / width, 0, 1)
        np.testing.assert_allclose(panel.columns[picture.REAL][0].ravel(), expected, atol=1e-5)
        assert panel.tags[picture.PAINTED] == ["mean error 10 % of the range"]
