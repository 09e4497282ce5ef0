"""Wide views: exact averages, boxes inside the image, and what lies outside of it."""

import pytest
import torch
import torch.nn.functional as F

from nnssl.pretrain.augment.draws import Draws
from nnssl.pretrain.augment.zoom import copy_box, filled, image_lengths, place_boxes, zoom
from nnssl.pretrain.methods import Crops


def crops_of(data, start=None, body=None):
    n, channels = data.shape[:2]
    return Crops(
        data=data,
        body=torch.ones_like(data[:, :1], dtype=torch.bool) if body is None else body,
        position=torch.zeros(n, 3),
        axis_position=torch.zeros(n, 3),
        intensity=torch.tensor([-2.0, 3.0]).expand(n, channels, 2),
        start=torch.zeros(n, 3, dtype=torch.int64) if start is None else start,
        case=["c"] * n,
    )


def box(start, extent, n=1):
    return torch.tensor([start] * n, dtype=torch.float32), torch.tensor([extent] * n, dtype=torch.float32)


def test_whole_factors_are_averages():
    x = torch.randn(2, 2, 12, 20, 9)
    got = zoom(x, *box([2, 4, 0], [8, 12, 9], 2), (4, 4, 3))
    torch.testing.assert_close(got, F.avg_pool3d(x[:, :, 2:10, 4:16, :9], (2, 3, 3)))
    flat = torch.randn(1, 1, 10, 6)
    torch.testing.assert_close(zoom(flat, *box([0, 0], [10, 6]), (5, 2)), F.avg_pool2d(flat, (2, 3)))


def test_no_zoom_is_a_copy_and_mirrors():
    x = torch.randn(2, 1, 8, 9, 7)
    start, extent = box([1, 3, 2], [4, 6, 5], 2)
    assert torch.equal(zoom(x, start, extent, (4, 6, 5)), x[:, :, 1:5, 3:9, 2:7])
    mirror = torch.tensor([[True, False, True], [False, False, False]])
    got = zoom(x, start, extent, (4, 6, 5), mirror)
    assert torch.equal(got, copy_box(x, start, extent, (4, 6, 5), mirror))
    assert torch.equal(got[0], x[0, :, 1:5, 3:9, 2:7].flip(1, 3)) and torch.equal(got[1], x[1, :, 1:5, 3:9, 2:7])


@pytest.mark.parametrize("factor", [1.0, 1.37, 2.5])
def test_a_slope_stays_one_and_a_constant_is_exact(factor):
    size, window = (6, 8, 4), (16, 24, 12)
    extent = [factor * s for s in size]
    ramp = torch.arange(24.0).view(1, 1, 1, -1, 1).expand(1, 1, *window)
    view = zoom(ramp, *box([0, 2, 1], extent), size)[0, 0, 0, :, 0]
    steps = view.diff()
    assert (steps > 0).all() and abs(float(steps.mean()) - factor) < 1 / 8  # a source voxel over the size
    assert abs(float(view[0]) - (2 + factor / 2 - 0.5)) < 1 / 8
    constant = zoom(torch.full((1, 1, *window), 3.0), *box([0, 2, 1], extent), size)
    torch.testing.assert_close(constant, torch.full_like(constant, 3.0))
    noise = torch.randn(1, 1, *window)
    view = zoom(noise, *box([0, 0, 0], extent), size)
    assert view.min() >= noise.min() and view.max() <= noise.max()  # nothing overshoots


def test_outside_of_the_image_is_dark():
    data = torch.randn(3, 2, 6, 8, 10) + 5
    start = torch.tensor([[0, 0, 0], [-2, 0, -1], [0, 0, 0]])
    data[1, :, :2] = 0
    data[1, :, ..., :1] = 0
    data[2, :, :, 5:] = 0
    got, inside = filled(crops_of(data, start))
    expected = torch.ones(3, 6, 8, 10, dtype=torch.bool)
    expected[1, :2] = False
    expected[1, ..., :1] = False
    expected[2, :, 5:] = False
    assert torch.equal(inside[:, 0], expected)
    assert torch.equal(got, torch.where(inside, data, -2.0))
    assert image_lengths(inside).tolist() == [[6, 8, 10], [4, 8, 9], [6, 5, 10]]


@pytest.mark.parametrize("extent", [(3, 4, 5), (6, 9, 7), (4.5, 7.2, 3.3)])
def test_boxes_lie_in_the_image_and_reach_all_of_it(extent):
    inside = torch.zeros(1, 1, 12, 14, 10, dtype=torch.bool)
    inside[..., 2:11, 1:12, 3:10] = True
    inside = inside.expand(600, -1, -1, -1, -1)
    body = torch.ones_like(inside)
    start = place_boxes(body, inside, torch.tensor([extent]).expand(600, 3), Draws(0, 0, 600))
    low, high = torch.tensor([2, 1, 3]), torch.tensor([11, 12, 10])
    assert (start >= low).all() and (start + torch.tensor(extent) <= high).all() and torch.equal(start, start.round())
    for axis in range(3):
        room = int(high[axis] - low[axis] - extent[axis]) + 1
        counts = torch.bincount((start[:, axis] - low[axis]).long(), minlength=room).float()
        assert len(counts) == room
        assert (counts / 600 - 1 / room).abs().max() < 4 * (1 / room * (1 - 1 / room) / 600) ** 0.5 + 1e-9


def test_images_smaller_than_the_box_lie_in_its_middle():
    inside = torch.zeros(4, 1, 12, 12, dtype=torch.bool)
    inside[..., 3:7, :] = True
    start = place_boxes(inside, inside, torch.tensor([[8.0, 6.0]]).expand(4, 2), Draws(0, 0, 4))
    assert (start[:, 0] == 1).all()
    inside[..., 8:, :] = inside[..., :3, :] = False
    edge = torch.zeros(4, 1, 12, 12, dtype=torch.bool)
    edge[..., 10:, :] = True
    start = place_boxes(edge, edge, torch.tensor([[8.0, 6.0]]).expand(4, 2), Draws(0, 0, 4))
    assert (start[:, 0] == 4).all()  # the window ends there
    whole = place_boxes(edge, edge, torch.tensor([[12.0, 12.0]]).expand(4, 2), Draws(0, 0, 4))
    assert (whole == 0).all()


def test_boxes_of_air_are_avoided():
    body = torch.zeros(200, 1, 24, 20, dtype=torch.bool)
    body[..., 16:, 10:] = True
    inside = torch.ones_like(body)
    extent = torch.tensor([[8.0, 8.0]]).expand(200, 2)
    start = place_boxes(body, inside, extent, Draws(0, 0, 200)).long()
    share = torch.stack([b[0, i : i + 8, j : j + 8].float().mean() for b, (i, j) in zip(body, start.tolist())])
    blind = place_boxes(body, inside, extent, Draws(0, 0, 200), tries=1).long()
    without = torch.stack([b[0, i : i + 8, j : j + 8].float().mean() for b, (i, j) in zip(body, blind.tolist())])
    assert (share >= 0.25).float().mean() > 0.85 > 0.6 > (without >= 0.25).float().mean()
    nowhere = place_boxes(torch.zeros_like(body), inside, extent, Draws(0, 0, 200))
    assert torch.isfinite(nowhere).all()


def test_ranks_draw_what_one_process_draws():
    body = torch.rand(4, 1, 12, 10) < 0.5
    inside, extent = torch.ones_like(body), torch.tensor([[5.0, 4.0]]).expand(4, 2)
    whole = place_boxes(body, inside, extent, Draws(0, 0, 4))
    parts = [place_boxes(body[i : i + 2], inside[:2], extent[:2], Draws(0, 0, 4, i, 2)) for i in (0, 2)]
    assert torch.equal(whole, torch.cat(parts))
