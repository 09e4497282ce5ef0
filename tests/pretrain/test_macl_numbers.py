"""What MACL chooses, adds up and draws, by hand; shapes, gradients and degenerate input are tested in test_macl.py."""

import numpy as np
import pytest
import torch

from nnssl.pretrain.augment import StepRNG
from nnssl.pretrain.methods import Crops
from nnssl.pretrain.methods.macl import MACL
from nnssl.pretrain.methods.macl import method as macl
from nnssl.pretrain.methods.macl.picture import (
    ALIKE,
    COARSE,
    COARSE_COLOURS,
    COLOURS,
    FINE,
    TURNED,
    TURNED_COARSE,
    _distances,
    pair_picture,
)

ISO, FLAT = ((1, 1, 1), (2, 2, 2), (2, 2, 2)), ((1, 1, 1), (1, 2, 2), (1, 2, 2))


def crops_of(method, b=4, data=None):
    window = method.request.read_size
    data = torch.randn(b, 1, *window) if data is None else data
    position = torch.linspace(0.1, 0.9, b, dtype=torch.float64)[:, None].repeat(1, 3)
    body, intensity = torch.ones(b, 1, *window, dtype=torch.bool), torch.tensor([-2.0, 2.0]).expand(b, 1, 2)
    return Crops(data, body, position, position, intensity, torch.zeros(b, 3, dtype=torch.long), ["c"] * b)


def batch_of(method, b=4, data=None):
    with torch.no_grad():
        return method.views(crops_of(method, b, data), StepRNG(0, 0, b))


# ---------------------------------------------------------------------------------------------- choices


def test_presets_are_what_was_published(make_macl):
    """K = 2, lr 0.1 in the paper and 0.01 in the scripts, weight decay 1e-5, no warm-up, scale 0.7 to 1.3, any angle."""
    both = {"decoder_blocks": 2, "weight_decay": 1e-5, "warmup": 0.0, "min_scale": 0.7, "max_scale": 1.3}
    both |= {"rotation": 180.0, "mirror": True, "batch_standardise": False, "align_corners": True, "offset": 0}
    for name, own in (("paper", {"lr": 0.1, "shift": 0.1}), ("code", {"lr": 0.01, "jitter": True})):
        preset = MACL.presets[name]
        assert {k: preset[k] for k in both} == both and {k: preset[k] for k in own} == own
    assert "jitter" not in MACL.presets["paper"] and "shift" not in MACL.presets["code"]
    assert make_macl().optimises_robustness


def test_sgd_as_published(make_macl):
    method = make_macl(weight_decay=1e-3)
    group = method.optimiser().param_groups[0]
    assert (group["lr"], group["momentum"], group["weight_decay"], group["nesterov"]) == (0.01, 0.9, 1e-3, False)
    assert isinstance(make_macl(optimiser="adamw").optimiser(), torch.optim.AdamW)


def test_what_is_asked_of_the_loader(make_macl):
    request = make_macl().request
    assert request.batch_size == request.min_batch == 8


def test_what_is_read_around_a_crop(make_macl):
    """Shrunk to a half it shows twice its width, shifted by a quarter to either side half more; in 2d slices need not differ."""
    still = {"rotation": 0.0, "max_scale": 1.0}
    assert make_macl(2, min_scale=0.5, shift=0.0, **still).request.read_size == (64, 32)
    assert make_macl(2, min_scale=1.0, shift=0.25, **still).request.read_size == (48, 24)
    wide = make_macl(min_scale=0.5, shift=0.0, median=(64, 64, 64), **still).request
    assert wide.size == (16, 32, 16) and wide.read_size == (32, 42, 32)  # a third of the room at most: 10 of 32 voxels
    moved = make_macl(min_scale=1.0, shift=0.0, offset=2, median=(64, 64, 64), **still).request
    assert moved.read_size == (24, 40, 24) and "up to 2x2x2 cells" in moved.explanation
    assert "cells" not in make_macl(median=(64, 64, 64)).request.explanation


def test_crops_differ_where_they_can_lie_apart_by_the_threshold(make_macl):
    alone = "own views"
    for median, threshold, said in (((32, 40, 32), 0.5, False), ((32, 40, 32), 0.51, True), ((16, 32, 16), 0.1, True)):
        request = make_macl(size=(16, 32, 16), median=median, threshold=threshold).request
        assert (alone in request.explanation) == said
    for slices, said in ((2, False), (1, True)):  # of 2d crops as large as the slice, slices lie apart
        assert (alone in make_macl(2, size=(32, 16), median=(slices, 32, 16)).request.explanation) == said


@pytest.mark.parametrize(
    "weights", [(1.0, 1.0, 0.0), (0.5, 0.5, 1.0), (1.0, 0.0, 1.0), (0.0, 1.0, 1.0), (0.0, 0.0, 1.0)]
)
def test_weights_that_cancel_are_weights(make_macl, weights):
    names = ("image", "dense", "equivariance")
    options = {f"{k}_weight": w for k, w in zip(names, weights)}
    method = make_macl(median=(64, 64, 64), offset=1, **options)
    shifted = weights[1] + weights[2] > 0
    assert method.offsets.active == shifted and ("cells" in method.request.explanation) == shifted
    terms = method(batch_of(method))
    assert {k for k in names if k in terms} == {k for k, w in zip(names, weights) if w > 0}
    torch.testing.assert_close(terms["total"], sum(w * terms[k] for k, w in zip(names, weights) if w > 0))
    assert ("bottleneck_std" in terms) == shifted
    heads = {name.split(".")[0] for name, _ in method.named_parameters()} - {"network"}
    expected = {"image_aux", "image_dominant"} if weights[0] else set()
    assert heads == (expected | {"pixel_aux"} if weights[1] else expected)


def test_the_decoder_is_pretrained_where_a_term_runs_through_it(make_macl):
    def stages(**options):
        return make_macl(**options).pretrained_parts()["decoder_stages"]

    assert stages() == stages(dense_weight=0.0) == stages(image_weight=0.0) == stages(image_source="encoder") == [0]
    assert stages(dense_weight=0.0, image_source="encoder") == stages(dense_weight=0.0, image_weight=0.0) == []


def test_crops_as_large_as_the_image_are_not_shifted(make_macl):
    """Also on an axis that the network leaves as it is, where a cell is one voxel."""
    method = make_macl(size=(4, 16, 16), patch=(4, 32, 32), median=(4, 24, 60), strides=FLAT, offset=3)
    assert method.plan.total_stride == (1, 4, 4) and method.offsets.most == (0, 2, 3)
    assert make_macl(patch=(4, 32, 32), size=(4, 16, 16), median=(6, 24, 60), strides=FLAT, offset=3).offsets.most == (
        2,
        2,
        3,
    )


def test_the_decoder_is_not_run_where_no_term_needs_it(make_macl):
    for options, times in (({}, 2), ({"dense_weight": 0.0}, 1), ({"dense_weight": 0.0, "image_weight": 0.0}, 0)):
        method, ran = make_macl(**options), []
        method.network.decoder.stages[0].register_forward_hook(lambda *a, ran=ran: ran.append(1))
        method(batch_of(method))
        assert len(ran) == times


# ---------------------------------------------------------------------------------------------- views


def test_jitter_as_in_the_code_but_for_black_images(make_macl, monkeypatch):
    asked = []
    draw = macl.random_jitter
    monkeypatch.setattr(macl, "random_jitter", lambda *a, **k: (asked.append(k), draw(*a, **k))[1])
    method = make_macl(jitter=True)
    batch_of(method)
    assert asked == [{"brightness": (0.2, 1.0), "contrast": (0.8, 1.2), "sigma": (1.0, 3.0)}] * 2
    asked.clear()
    batch_of(make_macl())
    assert not asked


@pytest.mark.parametrize(("level", "spread"), [(0.0, 0.0), (3.0, 0.0), (1.0, 0.005), (1.0, 0.02)])
def test_faint_noise_only_where_nothing_is_seen(make_macl, level, spread):
    """Of SD 0.01 in crops whose own is below it, the same in all views but for the shrinking."""
    method = make_macl(rotation=0.0, min_scale=1.0, max_scale=1.0, shift=0.0)
    data = level + spread * torch.randn(4, 1, *method.request.read_size)
    views = batch_of(method, data=data)
    expected = (spread**2 + (0.01**2 if spread < 0.01 else 0)) ** 0.5
    for key in ("i_aux", "v_aux"):
        assert views[key].std().item() == pytest.approx(expected, rel=0.05)
    assert (views["i_dominant"].std() > 0.002) and views["i_aux"].mean().item() == pytest.approx(level, abs=1e-3)
    plain = make_macl(padding="zeros", rotation=0.0, min_scale=1.0, max_scale=1.0, shift=0.0)
    assert batch_of(plain, data=data)["i_aux"].std().item() == pytest.approx(spread, rel=0.05, abs=1e-6)


def test_sites_beyond_what_is_read_are_empty(make_macl):
    """Crops of 4x8x4 cells, shifted by up to one: the grid of whole shrunken cells has 6x10x6, of which 5x9x5 are read."""
    method = make_macl(median=(64, 64, 64), offset=1)
    sites = batch_of(method)["sites"]
    read = torch.zeros(6, 10, 6, dtype=torch.bool)
    read[:5, :9, :5] = True
    assert method.offsets.cells == (6, 10, 6) and method.branches.dense_stride == (4, 4, 4)
    assert torch.equal(sites, read.expand(4, -1, -1, -1))


# ---------------------------------------------------------------------------------------------- loss


def test_both_comparisons_of_sites_count_half(make_macl):
    found = {}
    for sites in ("crops", "places", "both"):
        torch.manual_seed(1)
        method = make_macl(sites=sites, offset=0)
        terms = method(batch_of(method))
        found[sites] = terms["dense"].item(), terms["dense_collapse"].item()
    for one, other, mean in zip(found["crops"], found["places"], found["both"]):
        assert mean == pytest.approx((one + other) / 2, rel=1e-5) and abs(one - other) > 1e-3


def test_spread_of_the_bottleneck_is_that_of_the_whole_crop(make_macl):
    method = make_macl()
    batch = batch_of(method)
    with torch.no_grad():
        maps = method.network.encoder(batch["i_aux"])[-1]
        sd = maps.transpose(0, 1).flatten(1).std(1, unbiased=False).mean()
        assert method(batch)["bottleneck_std"].item() == pytest.approx(float(sd), rel=1e-4)
        assert method.embed(batch).shape == (4, 128)


def test_verdict_at_the_marks(make_macl):
    """Exactly 1 % below equal vectors, or exactly 0.01 more alike, is not yet learnt."""
    terms = {"image": 3.9, "image_collapse": 4.0, "image_pos_cos": 0.5, "image_neg_cos": 0.4}
    assert make_macl().verdict(terms, terms)[0]
    assert not make_macl().verdict(terms, {**terms, "image": 0.99 * 4.0})[0]
    assert not make_macl().verdict(terms, {**terms, "image_pos_cos": 0.4 + 0.01})[0]


# ---------------------------------------------------------------------------------------------- for a person


@pytest.mark.parametrize("dim", [2, 3])
def test_picture_by_hand(dim):
    """Windows in which view 2 begins 2 rows and 4 columns later: both show 6x6 pixels, whose middle is (5, 7), there (3, 3)."""

    def slab(image):  # in 3d the middle of 4 slices, the others are noise
        image = torch.as_tensor(image).float()
        if dim == 2:
            return image
        return torch.stack([torch.rand_like(image), torch.rand_like(image), image, torch.rand_like(image)], 2)

    rows = 2
    fine = torch.rand(rows, 1, 8, 10)
    coarse = torch.rand(rows, 1, 4, 5)
    features = torch.zeros(rows, 2, 8, 10)
    features[:, 0], features[:, 0, 5, 7], features[:, 1, 5, 7] = 1, 0, 1
    found = torch.zeros(rows, 2, 4, 5)
    found[:, 0] = 1
    for row, (y, x) in enumerate(((1, 1), (3, 0))):
        found[row, :, y, x] = torch.tensor([0.0, 2.0])
    start = [torch.tensor([[0] * dim] * rows), torch.tensor([[0] * (dim - 2) + [2, 4]] * rows)]
    views, maps = [slab(fine), slab(coarse)], [slab(features), slab(found)]
    if dim == 3:  # the coarse view has half as many slices
        views[1], maps[1] = (torch.stack([torch.rand_like(x), x], 2) for x in (coarse, found))
    picture = pair_picture(views, start, maps, views, spacing=(9.0, 2.0, 10.0)[-dim:])
    assert list(picture.columns) == [FINE, COARSE, ALIKE, COLOURS, COARSE_COLOURS, TURNED, TURNED_COARSE]
    assert picture.boxes[FINE].tolist() == [[2, 4, 6, 6]] * 2 and picture.boxes[COARSE].tolist() == [[0, 0, 6, 6]] * 2
    for caption, expected in (
        (FINE, [5, 7]), (COLOURS, [5, 7]), (COARSE, [3, 3]), (ALIKE, [3, 3]), (COARSE_COLOURS, [3, 3])
    ):  # fmt: skip
        assert picture.points[caption].tolist() == [expected] * 2

    def large(x):
        return x.repeat_interleave(2, -2).repeat_interleave(2, -1).numpy()

    np.testing.assert_allclose(picture.columns[FINE], fine[:, 0].numpy())
    np.testing.assert_allclose(picture.columns[COARSE], large(coarse[:, 0]))
    np.testing.assert_allclose(picture.columns[ALIKE], large(found[:, 1] / 2), atol=1e-5)
    # (2.5, 2.5) and (6.5, 0.5) against (3, 3), of 2 by 10 mm: hypot(1, 5) and hypot(7, 25)
    assert picture.tags == {ALIKE: ["brightest 5 mm from the cross", "brightest 26 mm from the cross"]}
    assert "similarity" in picture.scales[ALIKE] and "yellow frame" in picture.note and "The cross" in picture.note
    for caption, image in ((TURNED, fine[:, 0].numpy()), (TURNED_COARSE, large(coarse[:, 0]))):
        np.testing.assert_allclose(picture.columns[caption], image)
    still = pair_picture(views, [start[0], start[0]], None, views, spacing=(1.0,) * dim)
    assert list(still.columns) == [FINE, COARSE, TURNED, TURNED_COARSE] and not still.boxes and not still.tags
    assert still.points[FINE].tolist() == still.points[COARSE].tolist() == [[4, 5]] * 2
    assert "yellow frame" not in still.note and "The cross" not in still.note
    moved = pair_picture(views[:1] * 2, [start[0], start[1]], maps[:1] * 2, views, spacing=(1.0,) * dim)
    np.testing.assert_allclose(moved.columns[COLOURS], moved.columns[COARSE_COLOURS])  # found together


def test_the_picture_is_of_what_the_dense_contrast_compares(make_macl):
    method = make_macl(2)
    batch = batch_of(method)
    with torch.no_grad():
        picture = method.pictures(batch)
        fine, coarse = method.dense_maps(batch["i_aux"], batch["i_dominant"])[0]
        plain = make_macl(2, dense_weight=0.0)
        assert ALIKE not in plain.pictures(batch_of(plain)).columns
    for row in range(4):
        y, x = picture.points[FINE][row] // 4
        for v, u in ((0, 0), (9, 3), (31, 15)):
            cosine = torch.cosine_similarity(fine[row, :, y, x], coarse[row, :, v // 4, u // 4], dim=0)
            assert picture.columns[ALIKE][row, v, u] == pytest.approx(float(cosine), abs=2e-3)


def test_curves_compare_with_equal_vectors(make_macl):
    image, alike, dense, same = make_macl().curves()
    assert [[m.term for m in c.levels] for c in (image, alike, dense, same)] == [
        ["image_collapse"],
        [],
        ["dense_collapse"],
        [],
    ]
    assert not any(c.percent for c in (image, alike, dense, same))
    assert len(make_macl(image_weight=0.0, dense_weight=0.0).curves()) == 1


def test_places_that_are_equally_bright_are_averaged_and_darker_ones_are_not():
    image = torch.zeros(2, 6, 9)
    image[:, 1, 2] = 0.9
    image[0, 1, 6], image[1, 1, 6] = 0.9 - 1e-7, 0.9 - 5e-5
    assert _distances(image, torch.tensor([[1, 4], [1, 4]]), (3.0, 2.0)) == pytest.approx([0.0, 4.0])
