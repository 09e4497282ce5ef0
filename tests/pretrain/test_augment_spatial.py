"""The batched spatial transform: exact where it can be, in mm, the same on any device split."""

import math

import pytest
import torch

from nnssl.pretrain.augment import StepRNG, central_crop, random_affine, spatial
from nnssl.pretrain.augment.box import ImageBox
from nnssl.pretrain.augment.spatial import (
    Affine,
    AffineRange,
    _looks_inside,
    _resample,
    cut_out,
    reach,
    sampling_grid,
    warp,
)

WINDOWS = {2: (14, 19), 3: (11, 14, 19)}
SIZES = {2: (8, 12), 3: (6, 8, 12)}
STILL = {"rotation": (0.0,), "scale": (1.0, 1.0), "shift": 0.0}


def coordinates(window, batch=2):
    """``(B, d, *window)``: each voxel holds its own index."""
    axes = torch.meshgrid(*[torch.arange(float(n)) for n in window], indexing="ij")
    return torch.stack(axes)[None].repeat(batch, *[1] * (len(window) + 1))


def identity(dim, batch=2):
    return Affine(torch.eye(dim).repeat(batch, 1, 1), torch.zeros(batch, dim))


@pytest.mark.parametrize("dim", [2, 3])
def test_without_motion_it_is_the_central_crop(dim):
    x = torch.randn(2, 3, *WINDOWS[dim])
    view = random_affine(x, StepRNG(0, 0, 2), SIZES[dim], (1.0,) * dim, **STILL)
    assert torch.allclose(view.data, central_crop(x, SIZES[dim]), atol=1e-5)
    assert view.body is None


def test_central_crop_is_a_view_in_the_middle():
    x = torch.arange(7.0).view(1, 1, 7)
    assert central_crop(x, (3,)).flatten().tolist() == [2, 3, 4]
    assert central_crop(x, (4,)).flatten().tolist() == [1, 2, 3, 4]
    assert central_crop(x, (3,)).data_ptr() != x.data_ptr()
    assert central_crop(x, (3,)).untyped_storage().data_ptr() == x.untyped_storage().data_ptr()


@pytest.mark.parametrize("dim", [2, 3])
def test_whole_shifts_are_exact(dim):
    affine = identity(dim)
    affine.shift[:] = torch.tensor([1.0, -2.0, 3.0])[-dim:]
    x = coordinates(WINDOWS[dim])
    moved = warp(x, sampling_grid(affine, SIZES[dim], WINDOWS[dim]))
    expected = central_crop(x, SIZES[dim]) + affine.shift.view(2, dim, *[1] * dim)
    assert torch.allclose(moved, expected, atol=1e-4)


@pytest.mark.parametrize("dim", [2, 3])
def test_mirroring_is_exact_and_per_axis(dim):
    x = torch.randn(8, 1, *SIZES[dim])
    view = random_affine(x, StepRNG(3, 0, 8), SIZES[dim], (1.0,) * dim, **STILL, mirror_axes=(0,))
    flipped = x.flip(2)
    states = [
        "kept" if torch.allclose(v, k, atol=1e-5) else "flipped" if torch.allclose(v, f, atol=1e-5) else "wrong"
        for v, k, f in zip(view.data, x, flipped)
    ]
    assert set(states) == {"kept", "flipped"}


def test_quarter_turn_equals_rot90():
    x = torch.randn(1, 1, 9, 9)
    angle = torch.tensor([[math.pi / 2]])
    from nnssl.pretrain.augment.spatial import _rotation

    turned = warp(x, sampling_grid(Affine(_rotation(angle), torch.zeros(1, 2)), (9, 9), (9, 9)))
    assert torch.allclose(turned, x.rot90(1, (2, 3)), atol=1e-5) or torch.allclose(
        turned, x.rot90(-1, (2, 3)), atol=1e-5
    )


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (3.0, 1.0, 0.7), (0.8, 2.0)])
def test_rotation_keeps_distances_in_mm(spacing):
    dim, mm = len(spacing), torch.tensor(spacing)
    affine = AffineRange((8,) * dim, spacing, rotation=(40.0,), scale=(1.0, 1.0)).draw(StepRNG(1, 2, 5))
    in_mm = mm[None, :, None] * affine.matrix / mm[None, None, :]
    assert torch.allclose(in_mm @ in_mm.transpose(1, 2), torch.eye(dim).expand(5, -1, -1), atol=1e-5)
    assert torch.allclose(torch.linalg.det(in_mm), torch.ones(5), atol=1e-5)
    assert (in_mm - torch.eye(dim)).abs().amax((1, 2)).min() > 1e-3


def test_magnification():
    """A ball looks larger with a scale above 1."""
    at = coordinates((21, 21, 21), 1) - 10
    ball = (at.square().sum(1, keepdim=True) < 25).float()
    large = random_affine(ball, StepRNG(0, 0, 1), (21,) * 3, (1.0,) * 3, rotation=(0.0,), scale=(1.4, 1.4))
    assert float(large.data.sum() / ball.sum()) == pytest.approx(1.4**3, rel=0.1)


def test_rotation_only_about_the_axes_that_may_turn():
    affine = AffineRange((8, 8, 8), (5.0, 1.0, 1.0), rotation=(30.0, 0.0, 0.0), scale=(1.0, 1.0)).draw(StepRNG(0, 1, 4))
    assert torch.allclose(affine.matrix[:, 0], torch.tensor([1.0, 0, 0]).expand(4, 3))
    assert torch.allclose(affine.matrix[:, :, 0], torch.tensor([1.0, 0, 0]).expand(4, 3))
    assert (affine.matrix[:, 1, 2].abs() > 1e-3).all()


def test_probability_zero_leaves_samples_alone():
    affine = AffineRange((8, 8), (1.0, 1.0), rotation=(90.0,), scale=(0.5, 2.0), shift=0.5, p=0.0).draw(
        StepRNG(0, 1, 4)
    )
    assert torch.equal(affine.matrix, torch.eye(2).expand(4, 2, 2)) and not affine.shift.any()


def test_ranges():
    affine = AffineRange((10, 20, 40), (1.0,) * 3, rotation=(0.0,), scale=(0.5, 2.0), shift=0.1).draw(
        StepRNG(0, 1, 400)
    )
    magnification = 1 / affine.matrix[:, 0, 0]
    assert 0.5 <= magnification.min() < 0.6 and 1.8 < magnification.max() <= 2
    assert 0.4 < (magnification < 1).float().mean() < 0.6
    assert torch.allclose(affine.shift.abs().amax(0), torch.tensor([1.0, 2.0, 4.0]), rtol=0.05)


@pytest.mark.parametrize("dim", [2, 3])
def test_body_moves_along_and_ends_with_the_window(dim):
    size = SIZES[dim]
    body = torch.zeros(2, 1, *size, dtype=torch.bool)
    body[:, :, 1:4] = True
    x = body.float() * 5
    view = random_affine(
        x, StepRNG(0, 3, 2), size, (1.0,) * dim, body=body, rotation=(0.0,), scale=(1.0, 1.0), shift=0.4
    )
    assert view.body.dtype == torch.bool
    assert torch.equal(view.body, view.data >= 2.5)
    everywhere = torch.ones_like(body)
    small = random_affine(x, StepRNG(0, 3, 2), size, (1.0,) * dim, body=everywhere, rotation=(0.0,), scale=(0.5, 0.5))
    assert 0.3 < float(small.body.float().mean()) * 2**dim < 2


def test_same_views_on_one_rank_as_on_two():
    x = torch.randn(4, 1, 9, 10)
    both = random_affine(x, StepRNG(7, 5, 4), (6, 8), (1.0, 2.0)).data
    halves = [random_affine(x[i : i + 2], StepRNG(7, 5, 4, i, 2), (6, 8), (1.0, 2.0)).data for i in (0, 2)]
    assert torch.equal(torch.cat(halves), both)
    assert not torch.allclose(random_affine(x, StepRNG(7, 6, 4), (6, 8), (1.0, 2.0)).data, both)


@pytest.mark.parametrize("dim", [2, 3])
def test_what_does_not_turn_is_cut_out_and_equals_resampling(dim):
    """Even and odd differences of window and size; half of the samples turn, all may be flipped."""
    drawn = {"mirror_axes": tuple(range(dim)), "p": 0.5}
    x, body = torch.randn(16, 2, *WINDOWS[dim]), torch.rand(16, 1, *WINDOWS[dim]) > 0.4
    view = random_affine(x, StepRNG(5, 2, 16), SIZES[dim], (1.0, 2.0, 0.7)[:dim], body=body, **drawn)
    grid = sampling_grid(view.affine, SIZES[dim], WINDOWS[dim])
    assert torch.allclose(view.data, warp(x, grid), atol=1e-4)
    assert torch.equal(view.body, warp(body.float(), grid) >= 0.5)
    still = (view.affine.matrix.abs() == torch.eye(dim)).flatten(1).all(1)
    assert 2 < int(still.sum()) < 14
    for i in torch.nonzero(still)[:, 0].tolist():
        flips = [a + 1 for a in range(dim) if view.affine.matrix[i, a, a] < 0]
        assert torch.equal(view.data[i], central_crop(x[i : i + 1], SIZES[dim])[0].flip(flips))


@pytest.mark.parametrize("p", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("dim", [2, 3])
def test_outside_of_the_image_views_show_its_lowest_intensity(dim, p):
    """Without a mask: equal to resampling windows whose padding was filled, and a mask of the image beside them."""
    window, size, g = WINDOWS[dim], SIZES[dim], torch.Generator().manual_seed(0)
    low = (torch.rand(16, dim, generator=g) * 5).long()
    high = torch.tensor(window) - (torch.rand(16, dim, generator=g) * 4).long()
    box = ImageBox(low, high, torch.tensor([-2.0, -3.0]).expand(16, 2))
    mask = torch.zeros(16, 1, *window)
    for one, first, behind in zip(mask, low.tolist(), high.tolist()):
        one[(0, *(slice(a, b) for a, b in zip(first, behind)))] = 1
    data = torch.randn(16, 2, *window, generator=g) * mask
    view = random_affine(data, StepRNG(5, 2, 16), size, (1.0, 2.0, 0.7)[:dim], box=box, mirror_axes=range(dim), p=p)
    grid = sampling_grid(view.affine, size, window)
    seen = warp(mask, grid)
    plain = (seen - 0.5).abs() > 1e-4  # elsewhere rounding decides
    assert torch.equal(view.inside & plain, (seen >= 0.5) & plain) and plain.float().mean() > 0.95
    expected = torch.where(view.inside, warp(torch.where(mask > 0, data, box.dark), grid), box.dark)
    torch.testing.assert_close(view.data, expected, atol=1e-4, rtol=0)
    assert 0.05 < view.inside.float().mean() < 0.99 and view.body is None
    device = _resample(data, view.affine, size, None, box)  # what is done where nothing is cut out
    torch.testing.assert_close(device.data, view.data, atol=1e-4, rtol=0)
    assert torch.equal(device.inside & plain, view.inside & plain)
    if p == 0:
        still = cut_out(data, size, box=box)
        assert torch.equal(still.inside, central_crop(mask, size) > 0) and still.affine is None
        assert torch.equal(still.data, torch.where(still.inside, central_crop(data, size), box.dark))


def test_source_is_untouched():
    x = torch.randn(2, 1, 9, 10)
    before = x.clone()
    view = random_affine(x, StepRNG(7, 5, 2), (9, 10), (1.0, 1.0), mirror_axes=(0, 1))
    view.data.zero_()
    assert torch.equal(x, before)


def test_views_are_scaled_both_ways_by_default():
    drawn = random_affine(torch.zeros(60, 1, 6, 6), StepRNG(0, 1, 60), (6, 6), (1.0, 1.0)).affine
    magnification = torch.linalg.det(drawn.matrix).rsqrt()
    assert 0.8 <= float(magnification.min()) < 0.85 and 1.18 < float(magnification.max()) <= 1.25


@pytest.mark.parametrize(
    ("size", "window", "channels"), [((24, 28, 20), (33, 41, 27), 2), ((20, 18, 40), (20, 18, 40), 1)]
)
def test_large_views_are_sampled_plane_by_plane_to_the_same_values(size, window, channels, monkeypatch):
    x = torch.randn(3, channels, *window)
    wide = {"rotation": (60.0,), "scale": (0.6, 1.6), "shift": 0.3, "mirror_axes": (0, 1, 2)}
    grid = sampling_grid(AffineRange(size, (1.0, 2.0, 1.5), **wide).draw(StepRNG(2, 0, 3)), size, window)
    fast = warp(x, grid)
    monkeypatch.setattr(spatial, "PLANES_FROM", 10**9)
    exact = warp(x, grid)
    assert (exact == 0).any() and (exact != 0).any(), "places outside of the window are among them"
    bound = 2 * window[0] * window[1] / 2**23  # voxels, times the largest difference between neighbours
    assert (fast - exact).abs().max() < bound * 2 * x.abs().max()
    assert torch.equal(warp(x[1:2], grid[1:2]), exact[1:2]), "a sample does not depend on the others"
    monkeypatch.undo()
    assert torch.equal(warp(x[1:2], grid[1:2]), fast[1:2])


def test_whole_shifts_of_large_views_are_exact_at_the_edges_too():
    window = (18, 20, 22)
    affine = Affine(torch.eye(3)[None], torch.tensor([[3.0, -2.0, 4.0]]))
    x = torch.rand(1, 1, *window) + 1
    moved = warp(x, sampling_grid(affine, window, window))
    expected = torch.zeros_like(x)
    expected[:, :, :15, 2:, :18] = x[:, :, 3:, :18, 4:]
    assert torch.allclose(moved, expected, atol=1e-3)


def test_what_needs_a_gradient_is_sampled_by_torch():
    x = torch.rand(1, 1, 20, 20, 20, requires_grad=True)
    grid = sampling_grid(identity(3, 1), (20, 20, 20), (20, 20, 20))
    warp(x, grid).sum().backward()
    assert torch.allclose(x.grad, torch.ones_like(x), atol=1e-4)


@pytest.mark.parametrize("dim", [2, 3])
def test_matrix_and_shift_beside_each_other_and_back(dim):
    affine = Affine(torch.randn(4, dim, dim), torch.randn(4, dim))
    assert affine.rows.shape == (4, dim, dim + 1) and torch.equal(affine.rows[..., dim], affine.shift)
    again = Affine.from_rows(affine.rows)
    assert torch.equal(again.matrix, affine.matrix) and torch.equal(again.shift, affine.shift)


@pytest.mark.parametrize(
    ("size", "window"), [((7, 12), (40, 31)), ((8, 5, 6), (30, 41, 24)), ((6, 8, 12), (11, 14, 19))]
)
def test_what_a_view_looks_at_is_read_and_little_more(size, window):
    """Both voxels beside each place in the window; a voxel to spare on each side, and one for the parity of the middle."""
    dim, inner = len(size), torch.tensor(size)
    affine = Affine(torch.randn(60, dim, dim) * torch.logspace(-1, 0.4, 60)[:, None, None], 2 * torch.randn(60, dim))
    affine.matrix[0], affine.shift[0] = torch.diag(torch.tensor([-1.0, 1.0, -1.0])[:dim]), 0.0
    whole, read = torch.tensor(window), reach(affine, size, window)
    assert torch.equal(read[0] % 2, whole % 2) and bool((read[0] - inner).abs().le(1).all())
    assert bool(((read >= torch.minimum(inner, whole)) & (read <= whole) & ((whole - read) % 2 == 0)).all())
    for i, grid in enumerate(sampling_grid(affine, size, window)):
        place = (grid.flip(-1) + 1) * whole / 2 - 0.5  # voxels of the window
        first, last = (f(0).values for f in (place.view(-1, dim).min, place.view(-1, dim).max))
        left = (whole - read[i]) // 2
        assert bool(((left == 0) | (left <= (first + 1e-3).floor())).all())
        assert bool(((left == 0) | (whole - 1 - left >= (last - 1e-3).ceil())).all())
        slack = torch.minimum((first - left), (whole - 1 - left - last))
        assert bool(((slack <= 3) | (read[i] <= inner + 1)).all())


def test_whether_a_view_looks_inside_of_the_image_by_hand():
    """A view of 8 voxels in the middle of 20, moved by 0.25, looks at places 6.25 to 13.25."""
    affine = Affine(torch.eye(1)[None], torch.tensor([[0.25]]))
    for low, high, inside in ((6, 15, True), (7, 15, False), (6, 14, False), (0, 20, True)):
        box = ImageBox(torch.tensor([[low]]), torch.tensor([[high]]), torch.zeros(1, 1))
        assert _looks_inside(affine, (8,), (20,), box) == inside, (low, high)
    odd = ImageBox(
        torch.tensor([[6]]), torch.tensor([[14]]), torch.zeros(1, 1)
    )  # of 21: places 6.25 to 13.25 of the lower 20
    assert not _looks_inside(affine, (8,), (21,), odd)
    assert _looks_inside(affine, (8,), (21,), ImageBox(odd.low, odd.high + 1, odd.lowest))
    for shift, low, high in ((0.95, 5, 14), (1.05, 6, 15)):  # of 19: places 5.95 to 12.95, and 6.05 to 13.05
        box = ImageBox(torch.tensor([[low]]), torch.tensor([[high]]), torch.zeros(1, 1))
        assert _looks_inside(Affine(torch.eye(1)[None], torch.tensor([[shift]])), (8,), (19,), box)
