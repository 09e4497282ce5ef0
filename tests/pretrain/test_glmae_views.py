"""glmae's crops and views: their sizes, what they show of the volume, and options that make no sense."""

import math

import pytest
import torch

from nnssl.errors import NnsslError
from nnssl.pretrain.augment.rng import StepRNG

CASES = [("iso", "plain", 3), ("aniso", "resenc", 3), ("iso", "resenc", 2)]
MEDIAN = (20, 40, 35)


# ---------------------------------------------------------------------------------------------- crops and views


@pytest.mark.parametrize(("geometry", "arch", "dim"), CASES)
@pytest.mark.parametrize("mode", ["A", "B"])
def test_shapes_of_the_views(make_glmae, geometry, arch, dim, mode, make_batch):
    method = make_glmae(geometry, arch, dim, 2, views=mode, global_views=2, local_views=3)
    size = method.request.size
    stride = method.plan.total_stride
    batch = make_batch(method)
    assert batch["global"]["target"].shape == (6, 2, *size) and batch["local"]["target"].shape == (
        9,
        2,
        *method.local_size,
    )
    expected = size if mode == "A" else tuple(min(n, math.ceil(0.6 * n / s) * s) for n, s in zip(size, stride))
    assert method.local_size == expected
    assert (batch["global"]["zoom"] > 1).all() and (batch["local"]["zoom"] == 1).all()
    for view in batch.values():
        assert view["mask"].shape == view["valid"].shape == (len(view["target"]), 1, *view["target"].shape[2:])
        blocks = math.prod(n // b for n, b in zip(view["mask"].shape[2:], method.block))
        counts = view["mask"].flatten(1).sum(1)[view["valid"].flatten(1).all(1)]
        assert (counts == min(max(round(0.75 * blocks), 1), blocks - 1) * math.prod(method.block)).all()
    assert not torch.equal(batch["local"]["target"][:3], batch["local"]["target"][3:6])
    again = make_batch(method)
    assert all(torch.equal(batch[k][x], again[k][x]) for k in batch for x in batch[k])


def test_crop_and_mode_follow_the_volume(make_glmae, make_batch):
    wide = make_glmae()  # patch 8x12x16 in a volume of 20x40x35
    assert (
        wide.request.size == (8, 12, 16) and wide.request.read_size == (20, 30, 35) and wide.local_size == (8, 12, 16)
    )
    tight = make_glmae(median=(8, 12, 16))
    assert tight.request.size == (4, 8, 8) and tight.local_size == (4, 8, 8)  # two thirds leave room for wider views
    narrow = make_glmae(median=(9, 13, 17), crop=(8, 12, 16))
    assert narrow.local_size == (8, 8, 12) and "0.6" not in narrow.request.explanation
    assert make_glmae(median=(9, 13, 17), crop=(8, 12, 16), views="A").local_size == (8, 12, 16)
    thin = make_glmae(median=(4, 40, 35), crop=(4, 12, 16))
    zoomed = make_batch(thin, 20)["global"]["zoom"]
    assert thin.request.read_size == (4, 30, 35) and zoomed.min() > 1.2  # no wider in z, but in the plane


def test_the_body_is_read_where_views_should_show_it_or_the_error_counts_there(make_glmae):
    assert make_glmae().request.body and make_glmae(body_share=0.0, region="body").request.body
    assert not make_glmae(body_share=0.0).request.body


def test_small_images_are_padded_dark_and_not_counted(make_glmae, make_crops):
    method = make_glmae(median=MEDIAN)
    crops = make_crops(method)
    crops.data[:, :, 6:] = 0  # six slices are left of a crop of eight
    batch = method.views(crops, StepRNG(0, 0, 3))
    for view in batch.values():
        outside = ~view["valid"]
        assert outside.any() and not (view["mask"] & outside).all()
        whole_slices = outside.flatten(3).all(3)
        assert torch.equal(whole_slices.squeeze(1).sum(1), torch.full((len(outside),), 2))
        dark = view["target"][whole_slices[..., None, None].expand_as(view["target"])]
        torch.testing.assert_close(dark, torch.full_like(dark, -2.0))


@pytest.mark.parametrize("image", [(20, 12, 9), (8, 30, 16), (5, 12, 35), (20, 30, 35)])
@pytest.mark.parametrize("mode", ["A", "B"])
def test_views_of_larger_equal_and_smaller_volumes(make_glmae, make_crops, image, mode):
    """Whatever the volume has on an axis: views have their shape, are no wider than it, and know what lies outside."""
    method = make_glmae(views=mode)
    crops = make_crops(method, 4)
    for axis, (n, w) in enumerate(zip(image, method.request.read_size), start=2):
        assert n <= w
        crops.data.narrow(axis, n, w - n).zero_()
    batch = method.views(crops, StepRNG(0, 0, 4))
    for kind, size in (("global", method.request.size), ("local", method.local_size)):
        view = batch[kind]
        assert view["target"].shape[2:] == size
        inside = math.prod(min(n, s) for n, s in zip(image, size))
        assert (view["valid"].flatten(1).sum(1) == inside).all()
        wider = [min(2.5, max(1.0, n / s)) for n, s in zip(image, method.request.size)]
        assert view["zoom"].max() <= (sum(wider) / 3 if kind == "global" else 1) + 1e-5


@pytest.mark.parametrize("mirror", [False, True])
def test_views_show_the_volume(make_glmae, mirror, make_crops):
    method = make_glmae(mirror=mirror)
    crops = make_crops(method, 2)
    ramp = torch.arange(crops.data.shape[3]).float() + 1
    crops.data[:] = ramp.view(1, 1, 1, -1, 1)
    batch = method.views(crops, StepRNG(0, 0, 2))
    for kind, least in (("global", 1.4), ("local", 1.0)):
        steps = batch[kind]["target"].diff(dim=3)
        slope = steps.abs().mean((1, 2, 3, 4))
        assert (slope >= least - 1e-3).all() and (slope <= 2.51).all()
        assert (steps > 0).all() or mirror
        assert batch[kind]["valid"].all()


def test_options_that_make_no_sense(make_glmae):
    with pytest.raises(NnsslError, match="nothing would be learnt"):
        make_glmae(global_views=0, local_views=0)
    with pytest.raises(NnsslError, match="min_zoom"):
        make_glmae(min_zoom=2.0, max_zoom=1.5)
    with pytest.raises(NnsslError, match="decoder"):
        make_glmae(local_weight=0.0, global_weight=0.0)
    with pytest.raises(NnsslError, match="sparse"):
        make_glmae(masking="sparse", fill="learned")
    with pytest.raises(NnsslError, match="block="):
        make_glmae(block="3,3,3")


@pytest.mark.parametrize(
    ("size", "median", "views", "window", "local"),
    [
        ((8, 12, 16), (20, 40, 35), "auto", (20, 30, 35), (8, 12, 16)),  # wider: both of one size
        ((8, 12, 16), (8, 12, 16), "auto", (8, 12, 16), (8, 8, 12)),  # nothing is: 0.6 in whole steps of 4
        ((8, 12, 16), (8, 12, 16), "A", (8, 12, 16), (8, 12, 16)),
        ((8, 12, 16), (20, 40, 35), "B", (20, 30, 35), (8, 8, 12)),
        ((8, 20, 16), (8, 24, 16), "auto", (8, 24, 16), (8, 20, 16)),  # 1.2 times as wide on one axis is wider
        ((8, 20, 16), (8, 23, 16), "auto", (8, 23, 16), (8, 12, 12)),
        ((8, 12, 16), (5, 6, 50), "B", (8, 12, 40), (8, 8, 12)),  # at least the crop, at most 2.5 of it
    ],
)
def test_windows_and_modes(make_glmae, size, median, views, window, local):
    method = make_glmae(median=median, crop=size, views=views)
    assert (method.request.size, method.request.read_size, method.local_size) == (size, window, local)
