"""Wide views: exact averages, boxes inside the image, and what lies outside of it."""

import pytest
import torch
import torch.nn.functional as F

from nnssl.pretrain.augment.box import ImageBox
from nnssl.pretrain.augment.rng import StepRNG
from nnssl.pretrain.methods.glmae.resized_crop import (
    _box_sums,
    _first_enough,
    _first_enough_at_once,
    box_share,
    copy_box,
    resized_crop,
    sample_boxes,
)


def image_of(low, high, n=1):
    """The same image box in ``n`` windows."""
    return ImageBox(torch.tensor([low] * n), torch.tensor([high] * n), torch.full((n, 1), -2.0))


def mask_of(image, window):
    """``(B, 1, *window)`` float, 1 where the image is."""
    out = torch.zeros(len(image.low), 1, *window)
    for mask, low, high in zip(out, image.low.tolist(), image.high.tolist()):
        mask[(0, *(slice(a, b) for a, b in zip(low, high)))] = 1
    return out


def box(start, extent, n=1):
    return torch.tensor([start] * n, dtype=torch.float32), torch.tensor([extent] * n, dtype=torch.float32)


def test_whole_factors_are_averages():
    x = torch.randn(2, 2, 12, 20, 9)
    got = resized_crop(x, *box([2, 4, 0], [8, 12, 9], 2), (4, 4, 3))
    torch.testing.assert_close(got, F.avg_pool3d(x[:, :, 2:10, 4:16, :9], (2, 3, 3)))
    flat = torch.randn(1, 1, 10, 6)
    torch.testing.assert_close(resized_crop(flat, *box([0, 0], [10, 6]), (5, 2)), F.avg_pool2d(flat, (2, 3)))


def test_no_zoom_is_a_copy_and_mirrors():
    x = torch.randn(2, 1, 8, 9, 7)
    start, extent = box([1, 3, 2], [4, 6, 5], 2)
    assert torch.equal(resized_crop(x, start, extent, (4, 6, 5)), x[:, :, 1:5, 3:9, 2:7])
    mirror = torch.tensor([[True, False, True], [False, False, False]])
    got = resized_crop(x, start, extent, (4, 6, 5), mirror)
    assert torch.equal(got, copy_box(x, start, extent, (4, 6, 5), mirror))
    assert torch.equal(got[0], x[0, :, 1:5, 3:9, 2:7].flip(1, 3)) and torch.equal(got[1], x[1, :, 1:5, 3:9, 2:7])


@pytest.mark.parametrize("factor", [1.0, 1.37, 2.5])
def test_a_slope_stays_one_and_a_constant_is_exact(factor):
    size, window = (6, 8, 4), (16, 24, 12)
    extent = [factor * s for s in size]
    ramp = torch.arange(24.0).view(1, 1, 1, -1, 1).expand(1, 1, *window)
    view = resized_crop(ramp, *box([0, 2, 1], extent), size)[0, 0, 0, :, 0]
    steps = view.diff()
    assert (steps > 0).all() and abs(float(steps.mean()) - factor) < 1 / 8  # a source voxel over the size
    assert abs(float(view[0]) - (2 + factor / 2 - 0.5)) < 1 / 8
    constant = resized_crop(torch.full((1, 1, *window), 3.0), *box([0, 2, 1], extent), size)
    torch.testing.assert_close(constant, torch.full_like(constant, 3.0))
    noise = torch.randn(1, 1, *window)
    view = resized_crop(noise, *box([0, 0, 0], extent), size)
    assert view.min() >= noise.min() and view.max() <= noise.max()  # nothing overshoots


@pytest.mark.parametrize(("window", "size"), [((12, 20, 9), (4, 5, 3)), ((11, 14), (5, 4))])
def test_what_a_voxel_sees_of_the_image_is_the_zoomed_mask_of_it(window, size):
    dim, g = len(window), torch.Generator().manual_seed(0)
    extent = torch.tensor(size) * (1 + torch.rand(20, dim, generator=g))
    start = torch.rand(20, dim, generator=g) * (torch.tensor(window) - extent)
    low = (torch.rand(20, dim, generator=g) * 4).long()
    high = torch.tensor(window) - (torch.rand(20, dim, generator=g) * 4).long()
    image, mirror = ImageBox(low, high, torch.full((20, 2), -2.0)), torch.rand(20, dim, generator=g) < 0.5
    mask = mask_of(image, window)
    for flip in (None, mirror):
        share = box_share(image, start, extent, size, flip)
        torch.testing.assert_close(share, resized_crop(mask, start, extent, size, flip))
        assert ((share > 0) & (share < 1)).float().mean() > 0.01 and (share == 1).float().mean() > 0.01
    data = torch.randn(20, 2, *window, generator=g) * mask  # padding is 0, and shows the lowest intensity
    whole = torch.where(mask > 0, data, -2.0)
    seen = resized_crop(data, start, extent, size, mirror) + image.dark * (1 - share)
    torch.testing.assert_close(seen, resized_crop(whole, start, extent, size, mirror))
    place, plain = start.floor(), torch.tensor(size).expand(20, dim).float()
    copied = copy_box(data, place, plain, size, mirror) + image.dark * (
        1 - box_share(image, place, plain, size, mirror)
    )
    assert torch.equal(copied, copy_box(whole, place, plain, size, mirror))


@pytest.mark.parametrize("window", [(7, 9, 5), (8, 6)])
def test_voxels_in_boxes_are_counted_exactly(window):
    g = torch.Generator().manual_seed(1)
    body = torch.rand(3, *window, generator=g) < 0.4
    ends = torch.rand(2, 3, 11, len(window), generator=g) * (torch.tensor(window) + 1)
    start, stop = ends.amin(0).long(), ends.amax(0).long()
    expected = [
        [b[tuple(slice(x, y) for x, y in zip(*corners))].sum() for corners in zip(first.tolist(), last.tolist())]
        for b, first, last in zip(body, start, stop)
    ]
    assert torch.equal(_box_sums(body.float(), start, stop), torch.tensor(expected).float())


@pytest.mark.parametrize("least", [0.0, 0.3, 0.5, 1.1])
def test_the_first_box_with_enough_is_found_without_looking_at_all(least):
    g = torch.Generator().manual_seed(2)
    body = (torch.rand(40, 7, 9, 5, generator=g) < 0.4).float()
    start = (torch.rand(40, 6, 3, generator=g) * torch.tensor([4, 5, 3])).long()
    stop = start + torch.tensor([3, 4, 2])
    share = _box_sums(body, start, stop) / 24
    expected = torch.where((share >= least).any(1), (share >= least).int().argmax(1), share.argmax(1))
    found, at_once = (
        f(body, start, stop, torch.full((40,), 24.0), least) for f in (_first_enough, _first_enough_at_once)
    )
    assert torch.equal(share[range(40), found], share[range(40), expected]) and torch.equal(at_once, expected)
    assert least > 1 or torch.equal(found, expected)


@pytest.mark.parametrize("extent", [(3, 4, 5), (6, 9, 7), (4.5, 7.2, 3.3)])
def test_boxes_lie_in_the_image_and_reach_all_of_it(extent):
    image = image_of((2, 1, 3), (11, 12, 10), 600)
    body = torch.ones(600, 1, 12, 14, 10)
    start = sample_boxes(body, image, torch.tensor([extent]).expand(600, 3), StepRNG(0, 0, 600))
    low, high = torch.tensor([2, 1, 3]), torch.tensor([11, 12, 10])
    assert (start >= low).all() and (start + torch.tensor(extent) <= high).all() and torch.equal(start, start.round())
    for axis in range(3):
        room = int(high[axis] - low[axis] - extent[axis]) + 1
        counts = torch.bincount((start[:, axis] - low[axis]).long(), minlength=room).float()
        assert len(counts) == room
        assert (counts / 600 - 1 / room).abs().max() < 4 * (1 / room * (1 - 1 / room) / 600) ** 0.5 + 1e-9


def test_images_smaller_than_the_box_lie_in_its_middle():
    body, extent = torch.ones(4, 1, 12, 12), torch.tensor([[8.0, 6.0]]).expand(4, 2)
    start = sample_boxes(body, image_of((3, 0), (7, 12), 4), extent, StepRNG(0, 0, 4))
    assert (start[:, 0] == 1).all()
    edge = image_of((10, 0), (12, 12), 4)
    start = sample_boxes(body, edge, extent, StepRNG(0, 0, 4))
    assert (start[:, 0] == 4).all()  # the window ends there
    whole = sample_boxes(body, edge, torch.tensor([[12.0, 12.0]]).expand(4, 2), StepRNG(0, 0, 4))
    assert (whole == 0).all()


def test_boxes_of_air_are_avoided():
    body = torch.zeros(200, 1, 24, 20)
    body[..., 16:, 10:] = 1
    image = image_of((0, 0), (24, 20), 200)
    extent = torch.tensor([[8.0, 8.0]]).expand(200, 2)
    start = sample_boxes(body, image, extent, StepRNG(0, 0, 200)).long()
    share = torch.stack([b[0, i : i + 8, j : j + 8].float().mean() for b, (i, j) in zip(body, start.tolist())])
    blind = sample_boxes(body, image, extent, StepRNG(0, 0, 200), tries=1).long()
    without = torch.stack([b[0, i : i + 8, j : j + 8].float().mean() for b, (i, j) in zip(body, blind.tolist())])
    assert (share >= 0.25).float().mean() > 0.85 > 0.6 > (without >= 0.25).float().mean()
    nowhere = sample_boxes(torch.zeros_like(body), image, extent, StepRNG(0, 0, 200))
    assert torch.isfinite(nowhere).all()


def test_ranks_draw_what_one_process_draws():
    body = (torch.rand(4, 1, 12, 10) < 0.5).float()
    image, extent = image_of((0, 0), (12, 10), 4), torch.tensor([[5.0, 4.0]]).expand(4, 2)
    whole = sample_boxes(body, image, extent, StepRNG(0, 0, 4))
    rows = torch.arange(2)
    parts = [sample_boxes(body[i : i + 2], image[rows + i], extent[:2], StepRNG(0, 0, 4, i, 2)) for i in (0, 2)]
    assert torch.equal(whole, torch.cat(parts))


@pytest.mark.parametrize("least", [0.0, 0.3, 0.99])
def test_the_first_place_with_enough_body_or_the_one_with_most(least):
    """The places that are tried come from the random numbers: which one is taken, against a loop."""
    window, extent, tries, n = (12, 16, 9), (5, 6, 4), 10, 40
    body = torch.zeros(n, 1, *window)
    body[:, :, 2:9, 3:10, 1:6] = (torch.rand(n, 1, 7, 7, 5) < 0.8).float()
    image = ImageBox(torch.zeros(n, 3).long(), torch.tensor([window] * n), torch.zeros(n, 1))
    start = sample_boxes(body, image, torch.tensor([extent] * n).float(), StepRNG(0, 0, n), least=least, tries=tries)
    share = StepRNG(0, 0, n).uniform(0, 1, tries, 3)
    places = (share * (torch.tensor(window) - torch.tensor(extent) + 1)).floor().long()
    later = 0
    for i in range(n):
        found = [
            float(body[i, 0][tuple(slice(a, a + e) for a, e in zip(p, extent))].mean()) for p in places[i].tolist()
        ]
        enough = [k for k, f in enumerate(found) if f >= least]
        expected = enough[0] if enough else found.index(max(found))
        assert start[i].tolist() == places[i, expected].tolist()
        later += expected > 0
        assert least < 0.99 or (not enough and body[i].any())
    assert (later > 10) == (least > 0)


def test_a_quarter_of_body_is_enough_and_ten_places_are_tried():
    body = (torch.rand(60, 1, 12, 10) < 0.25).float()
    image, extent = image_of((0, 0), (12, 10), 60), torch.tensor([[5.0, 4.0]]).expand(60, 2)
    start = sample_boxes(body, image, extent, StepRNG(0, 0, 60))
    assert torch.equal(start, sample_boxes(body, image, extent, StepRNG(0, 0, 60), least=0.25, tries=10))
    assert not torch.equal(start, sample_boxes(body, image, extent, StepRNG(0, 0, 60), least=0.375))


def test_sums_and_averages_stay_exact_under_autocast():
    """Half precision has no 1,989, and would round what a voxel shows."""
    body, x = torch.ones(2, 13, 17, 11), torch.randn(2, 1, 13, 17, 11)
    start, stop = torch.zeros(2, 1, 3).long(), torch.tensor([[[8, 13, 11]], [[13, 17, 9]]])
    view = resized_crop(x, *box([1, 0, 2], [9, 15, 6], 2), (4, 5, 6))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert _box_sums(body, start, stop).tolist() == [[1144.0], [1989.0]]
        assert torch.equal(resized_crop(x, *box([1, 0, 2], [9, 15, 6], 2), (4, 5, 6)), view)
