import math

import pytest
import torch

from nnssl.pretrain.augment.box import image_bounds
from nnssl.pretrain.augment.pairs import _between, cut, draw_pairs
from nnssl.pretrain.augment.rng import StepRNG

WINDOWS = [((20, 30, 24), (8, 16, 12)), ((16, 9, 31), (16, 5, 8)), ((12, 12), (8, 5))]


def mean_overlap(size, start):
    """Share of a crop that the other one shows too: ``(B,)`` of ``(2, B, dim)`` starts."""
    shared = (torch.tensor(tuple(size)) - (start[0] - start[1]).abs()).clamp_min(0)
    return shared.double().prod(1).float() / math.prod(size)


def _body(batch, window, share=0.5, seed=0):
    return torch.rand(batch, 1, *window, generator=torch.Generator().manual_seed(seed)) < share


@pytest.mark.parametrize(("window", "size"), WINDOWS)
def test_voxels_correspond(window, size):
    """Each voxel of the window has its own value: both crops must show the same at corresponding places."""
    batch, n = 220, 20
    body = _body(batch, window)
    ids = torch.arange(body[0, 0].numel()).view(1, 1, *window).expand(batch, -1, *window)
    pairs = draw_pairs(body, size, StepRNG(0, 0, batch), n=n)
    crops = [cut(ids, s, size) for s in pairs.start]
    masks = [cut(body, s, size) for s in pairs.start]
    for i in range(batch):
        k = pairs.valid[i]
        assert pairs.valid[i].any()
        a, b = (pairs.voxels[v, i][k] for v in (0, 1))
        for v, x in enumerate((a, b)):
            assert (x >= 0).all() and (x < torch.tensor(size)).all()
            assert masks[v][(i, 0, *x.T)].all()
        values = crops[0][(i, 0, *a.T)]
        assert torch.equal(values, crops[1][(i, 0, *b.T)])
        assert torch.equal(values, ids[(i, 0, *(a + pairs.start[0, i]).T)])
        assert len(values.unique()) == len(values)  # without replacement


@pytest.mark.parametrize(("window", "size"), WINDOWS)
def test_boxes_hold_the_anchor_and_all_shared_voxels_are_used(window, size):
    batch = 150
    body = _body(batch, window, 0.02)
    body[:, 0].view(batch, -1)[torch.arange(batch), torch.randint(0, body[0].numel(), (batch,))] = True
    pairs = draw_pairs(body, size, StepRNG(1, 0, batch), n=6)
    extent, crop = torch.tensor(window), torch.tensor(size)
    assert (pairs.start >= 0).all() and (pairs.start + crop <= extent).all()
    assert (pairs.start <= pairs.anchor).all() and (pairs.anchor < pairs.start + crop).all()
    for i in range(batch):
        assert body[(i, 0, *pairs.anchor[i])]
        low, high = pairs.start[:, i].amax(0), pairs.start[:, i].amin(0) + crop
        shared = body[i, 0][tuple(slice(a, b) for a, b in zip(low.tolist(), high.tolist()))].sum().item()
        assert pairs.valid[i].sum() == min(6, shared)


def test_a_body_of_one_voxel_and_none():
    body = torch.zeros(3, 1, 20, 24, 16, dtype=torch.bool)
    body[0, 0, 19, 3, 7] = body[1, 0, 0, 0, 0] = True
    pairs = draw_pairs(body, (8, 8, 12), StepRNG(0, 0, 3), n=5)
    assert pairs.valid.sum(1).tolist() == [1, 1, 0]
    assert pairs.anchor[:2].tolist() == [[19, 3, 7], [0, 0, 0]]
    assert torch.equal(pairs.voxels[:, :2, 0] + pairs.start[:, :2], pairs.anchor[:2].expand(2, -1, -1))
    assert (pairs.voxels >= 0).all()


def test_anchors_and_starts_are_uniform():
    """Chi-square with 1 % limits on a line: anchors over the body, starts over the legal ones of the central anchors."""
    body = torch.ones(6000, 1, 40, dtype=torch.bool)
    body[..., ::2] = False
    pairs = draw_pairs(body, (10,), StepRNG(0, 0, 6000), n=1)
    counts = torch.bincount(pairs.anchor[:, 0], minlength=40)
    assert counts[::2].sum() == 0
    assert _chi2(counts[1::2]) < 36.2  # 19 degrees of freedom
    middle = (pairs.anchor[:, 0] >= 9) & (pairs.anchor[:, 0] <= 30)
    for start in pairs.start:
        assert _chi2(torch.bincount((pairs.anchor[:, 0] - start[:, 0])[middle], minlength=10)) < 21.7  # 9
    joint = (pairs.anchor - pairs.start[0])[middle, 0] // 2 * 5 + (pairs.anchor - pairs.start[1])[middle, 0] // 2
    assert _chi2(torch.bincount(joint, minlength=25)) < 43.0  # 24: the views are independent


def _chi2(counts):
    expected = counts.sum() / len(counts)
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize(("window", "size"), WINDOWS)
def test_least_overlap(window, size, share):
    pairs = draw_pairs(_body(300, window), size, StepRNG(0, 0, 300), n=1, min_overlap=share)
    crop = torch.tensor(size)
    overlap = crop - (pairs.start[0] - pairs.start[1]).abs()
    assert (overlap >= (crop * share).ceil().clamp_min(1)).all()
    assert (mean_overlap(size, pairs.start) <= 1).all()
    if share == 1.0:
        assert torch.equal(pairs.start[0], pairs.start[1])
        assert (mean_overlap(size, pairs.start) == 1).all()


def test_boxes_stay_in_the_image():
    data = torch.zeros(2, 2, 20, 30, 16)
    data[0, 1, 4:19, 2:30, :] = torch.rand(15, 28, 16) + 0.1
    data[1, 0, 0:20, 0:25, 3:9] = 1.0  # the last axis is narrower than the crop
    start = torch.tensor([[-4, -2, 5], [7, 0, -3]])
    low, high = image_bounds(data, start)
    assert low.tolist() == [[4, 2, 0], [0, 0, 3]] and high.tolist() == [[19, 30, 16], [20, 25, 9]]
    body = data.abs().sum(1, keepdim=True) > 0
    pairs = [draw_pairs(body, (10, 12, 8), StepRNG(0, s, 2), n=4, low=low, high=high) for s in range(60)]
    starts = torch.cat([d.start for d in pairs])  # (120, 2, 3)
    size = torch.tensor([10, 12, 8])
    fits = torch.tensor([[True, True, True], [True, True, False]])
    assert ((starts >= low) | ~fits).all() and ((starts + size <= high) | ~fits).all()
    assert (starts >= 0).all() and (starts + size <= torch.tensor([20, 30, 16])).all()
    narrow = starts[:, 1, 2]  # crops of 8 around an image from 3 to 9: anywhere in the window of 16
    assert narrow.min() == 0 and narrow.max() == 8
    assert image_bounds(torch.zeros(1, 1, 4, 6), torch.tensor([[0, -2, 0]]))[1].tolist() == [[4, 6]]


def test_streams():
    body = _body(4, (20, 20, 20))
    whole = draw_pairs(body, (8, 8, 8), StepRNG(0, 0, 4), n=9)
    again = draw_pairs(body, (8, 8, 8), StepRNG(0, 0, 4), n=9)
    other = draw_pairs(body, (8, 8, 8), StepRNG(0, 1, 4), n=9)
    parts = [draw_pairs(body[i : i + 2], (8, 8, 8), StepRNG(0, 0, 4, i, 2), n=9) for i in (0, 2)]
    for name, axis in (("anchor", 0), ("start", 1), ("voxels", 1), ("valid", 0)):
        assert torch.equal(getattr(whole, name), getattr(again, name))
        assert torch.equal(getattr(whole, name), torch.cat([getattr(p, name) for p in parts], axis))
    assert not torch.equal(whole.start, other.start)
    with pytest.raises(ValueError, match="do not fit"):
        draw_pairs(body, (8, 21, 8), StepRNG(0, 0, 4))


def test_mean_overlap_by_hand():
    """Crops of 4x6: the same, moved by one and two voxels, side by side, and apart on one axis."""
    a = torch.zeros(4, 2, dtype=torch.long)
    b = torch.tensor([[0, 0], [1, 2], [4, 0], [0, 9]])
    assert mean_overlap((4, 6), torch.stack([a, b])).tolist() == pytest.approx([1.0, 3 * 4 / 24, 0.0, 0.0])


def test_a_place_between_two_by_hand():
    """2 to 5 are four places of a quarter each; a share that rounds to 1 is the last; no room is the first."""
    first, last = torch.tensor([2, 2, 2, 2, 2, 7]), torch.tensor([5, 5, 5, 5, 5, 3])
    share = torch.tensor([0.0, 0.24, 0.26, 0.76, 1.0, 0.9])
    assert _between(first, last, share).tolist() == [2, 2, 3, 5, 5, 7]


@pytest.mark.parametrize("filled", [0.9, 0.5, 0.15])
def test_voxels_are_a_uniform_sample_without_replacement(filled):
    """Drawn one by one where there are many, else from all of them: each as often as the others, and none twice."""
    from nnssl.pretrain.augment.pairs import _some_of

    box = torch.rand(5, 8, 10, generator=torch.Generator().manual_seed(2)) < filled
    n, rounds = 5, 4000
    counts, first = torch.zeros(box.shape), torch.zeros(box.shape)
    for seed in range(rounds):
        found = _some_of(box, n, torch.Generator().manual_seed(seed))
        assert len(found) == n == len(set(map(tuple, found.tolist())))
        counts[tuple(found.T)] += 1
        first[tuple(found[0])] += 1
    assert counts[~box].sum() == 0
    mean = rounds * n / int(box.sum())
    for seen, expected in ((counts, mean), (first, mean / n)):
        chi = float(((seen[box] - expected) ** 2 / expected).sum()) / int(box.sum())
        assert 0.5 < chi < 1.6, chi
    assert len(_some_of(torch.ones(2, 2, dtype=torch.bool), n, torch.Generator())) == 4
