"""Where the image lies in a window: from places in the array and from voxels alike, on what the loader delivers."""

import numpy as np
import pytest
import torch

from nnssl.pretrain.augment.box import image_bounds, image_box, in_box, outer
from nnssl.pretrain.data import CaseFormat, CaseReader, CropDataset, SampleStream, collate
from nnssl.pretrain.data.reorientation import Orientation
from nnssl.pretrain.methods import CropRequest

SHAPES = [(20, 24, 18), (16, 30, 22), (25, 9, 20), (11, 22, 26)]
TURN = Orientation((2, 1, 0), (False, True, False), (1.0, 1.0, 1.0))


def image(shape):
    """Without a voxel that is 0."""
    return 1 + np.random.default_rng(sum(shape)).random((1, *shape), dtype=np.float32)


@pytest.mark.parametrize("orientation", [None, TURN])
@pytest.mark.parametrize("sampling", ["jitter", "inside", "whole"])
@pytest.mark.parametrize(
    ("size", "window"), [((8, 10, 6), (14, 28, 21)), ((8, 10, 6), (9, 10, 8)), ((8, 10), (23, 24))]
)
def test_arithmetic_and_voxels_find_the_same_bounds(save_case, tmp_path, size, window, sampling, orientation):
    refs = [save_case(tmp_path, f"case_{i}", image(shape)) for i, shape in enumerate(SHAPES)]
    request = CropRequest(size=size, read_size=window, sampling=sampling)
    reader = CaseReader(CaseFormat(1, (0, 1, 2), False))
    data = CropDataset(refs, reader, request, SampleStream(3, 8), orientation)
    crops = [collate([data[(step, i)] for i in range(8)]) for step in range(3)]
    padded = 0
    for batch in crops:
        low, high = image_bounds(batch.data, batch.start, batch.shape)
        by_voxels = image_bounds(batch.data, batch.start)
        assert torch.equal(low, by_voxels[0]) and torch.equal(high, by_voxels[1]) and low.dtype == high.dtype
        box = image_box(batch)
        assert torch.equal(box.low, low) and torch.equal(box.high, high)
        assert torch.equal(box.lowest, batch.intensity[:, :, 0]) and box.dark.shape == (8, 1, *[1] * len(window))
        lines = [torch.arange(n) for n in window]
        inside = outer([(v >= low[:, i, None]) & (v < high[:, i, None]) for i, v in enumerate(lines)])
        assert torch.equal(inside, (batch.data != 0).any(1, keepdim=True))
        assert not (batch.body & ~inside).any()
        padded += int((~inside).flatten(1).any(1).sum())
    assert padded == 0 if sampling == "whole" else padded > 0


def test_zeros_of_the_image_itself_are_inside_where_its_shape_is_known():
    data = torch.ones(1, 1, 6, 8)
    data[..., 5:] = 0
    start = torch.tensor([[3, -1, 4]])
    assert image_bounds(data, start)[1].tolist() == [[6, 5]]
    low, high = image_bounds(data, start, torch.tensor([[9, 4, 30]]))
    assert low.tolist() == [[1, 0]] and high.tolist() == [[5, 8]]


def test_outer_is_the_product_of_lines():
    lines = [torch.rand(2, n) for n in (3, 4, 5)]
    got = outer(lines)
    assert got.shape == (2, 1, 3, 4, 5)
    torch.testing.assert_close(got[:, 0], torch.einsum("bi,bj,bk->bijk", *lines))


def test_voxels_in_a_box():
    start, shape = torch.tensor([[-2, 1, 0], [4, 0, -1]]), torch.tensor([[9, 5, 6], [6, 8, 3]])
    inside = in_box(-start, shape - start, (4, 6, 5))
    for b in range(2):
        for z, y, x in torch.cartesian_prod(torch.arange(4), torch.arange(6), torch.arange(5)).tolist():
            place = [a + int(s) for a, s in zip((z, y, x), start[b])]
            expected = all(0 <= p < int(n) for p, n in zip(place, shape[b]))
            assert bool(inside[b, 0, z, y, x]) == expected
