"""What MACL says of itself: options, numbers beside the loss, pictures, panels and verdict."""

import math

import numpy as np
import pytest
import torch

from nnssl.config import describe_options, make_config
from nnssl.pretrain.augment import StepRNG
from nnssl.pretrain.methods.macl import MACL, MACLConfig
from nnssl.pretrain.methods.macl.picture import ALIKE, COARSE, COARSE_COLOURS, COLOURS, FINE, TURNED, TURNED_COARSE


def test_options_explain_themselves():
    rows = describe_options(MACLConfig)
    assert all(meaning for *_, meaning in rows)
    assert MACL.name == "macl" and MACL.title and MACL.citation
    for preset in MACL.presets.values():
        make_config(MACLConfig, {}, preset)


@pytest.mark.parametrize("dim", [2, 3])
def test_pictures(make_macl, dim, macl_batch):
    method = make_macl(dim, channels=2)
    batch = macl_batch(method, b=6, channels=2)
    with torch.no_grad():
        picture = method.pictures(batch)
    height, width = method.request.size[-2:]
    assert list(picture.columns) == [FINE, COARSE, ALIKE, COLOURS, COARSE_COLOURS, TURNED, TURNED_COARSE]
    for caption, images in picture.columns.items():
        assert images.shape == (4, height, width, 3) if "colours" in caption else (4, height, width), caption
        assert np.isfinite(images).all()


@pytest.mark.parametrize("dim", [2, 3])
def test_cross_and_frame_show_one_place_in_both_views(make_macl, dim, macl_crops, macl_batch):
    method = make_macl(dim, jitter=False, offset=1)
    crops = macl_crops(method, b=6)
    window = crops.data.shape[2:]
    ramp = sum(100.0**-i * torch.arange(n).view([n if a == i else 1 for a in range(dim)]) for i, n in enumerate(window))
    crops.data[:] = ramp
    with torch.no_grad():
        batch = method.views(crops, StepRNG(3, 0, len(crops)))
        picture = method.pictures(batch)
    assert (batch["aux_cell"] != batch["dominant_cell"]).any()
    assert picture.boxes and "yellow frame" in picture.note
    still = make_macl(dim, jitter=False)
    plain = still.pictures(macl_batch(still))
    assert not plain.boxes and plain.points and "frame" not in plain.note, "both views show the same crop"
    for row in range(4):
        (y, x), (v, u) = picture.points[FINE][row], picture.points[COARSE][row]
        fine, coarse = (picture.columns[c][row] for c in (FINE, COARSE))
        step = max(abs(fine[1, 0] - fine[0, 0]), abs(fine[0, 1] - fine[0, 0]))
        assert abs(fine[y, x] - coarse[v, u]) <= 2 * step + (1 if dim == 3 else 0)
        for caption, image in ((FINE, fine), (COARSE, coarse)):
            top, left, tall, wide = picture.boxes[caption][row]
            assert top >= 0 and top + tall <= image.shape[0] and left >= 0 and left + wide <= image.shape[1]
    assert np.array_equal(picture.boxes[FINE][:, 2:], picture.boxes[COARSE][:, 2:])


def test_verdict(make_macl):
    method = make_macl()
    good = {"total": 1.0, "image": 2.0, "image_collapse": 3.9, "image_pos_cos": 0.8, "image_neg_cos": 0.1}
    learnt, sentence = method.verdict(good, good)
    assert learnt and "learnt" in sentence and "0.80" in sentence and "3.9" in sentence
    for change in ({"image": 4.0}, {"image": 3.88}, {"image_pos_cos": 0.05}, {"image_neg_cos": 0.8}):
        learnt, sentence = method.verdict(good, {**good, **change})
        assert not learnt and "did not learn" in sentence


def test_learnt_begins_one_per_cent_below_collapse_and_one_hundredth_apart(make_macl):
    method = make_macl()
    terms = {"total": 1.0, "image": 3.95, "image_collapse": 4.0, "image_pos_cos": 0.5, "image_neg_cos": 0.489}
    assert method.verdict(terms, terms)[0]
    assert not method.verdict(terms, {**terms, "image": 3.97})[0]
    assert not method.verdict(terms, {**terms, "image_neg_cos": 0.491})[0]


def test_numbers_beside_the_loss(make_macl, macl_batch):
    """By hand: of four crops two are near each other; 2 x 2 vectors are positives of those, 2 of the others, itself apart."""
    method = make_macl()
    batch = macl_batch(method)
    batch["position"] = torch.tensor([[0.5] * 2 + [p] for p in (0.1, 0.15, 0.5, 0.9)], dtype=torch.float64)
    terms = method(batch)
    assert float(terms["n_positives"]) == (3 + 3 + 1 + 1) / 4 and float(terms["n_negatives"]) == (4 + 4 + 6 + 6) / 4
    aux, dominant = method.image_vectors(batch["v_aux"], batch["v_dominant"])
    norms = torch.cat([aux, dominant]).norm(dim=1)
    assert float(terms["shortest_norm"]) == pytest.approx(float(norms.detach().min()), rel=1e-5)
    cosine = [torch.nn.functional.normalize(z.detach(), dim=1) for z in (aux, dominant)]
    mean = sum(float((z @ z.T).sum() - 4) / 12 for z in cosine) / 2
    assert float(terms["off_diagonal_cos"]) == pytest.approx(mean, abs=1e-4)
    assert float(terms["image_collapse"]) == pytest.approx(math.log(7) / 0.7, rel=1e-5)  # eight vectors
    batch["valid"] = torch.tensor([True, True, True, False])
    assert float(method(batch)["image_collapse"]) == pytest.approx(math.log(5) / 0.7, rel=1e-5)


@pytest.mark.parametrize(
    ("options", "lines"),
    [
        ({}, [{"image"}, {"image_pos_cos", "image_neg_cos"}, {"dense"}, {"equivariance"}]),
        ({"image_weight": 0.0}, [{"dense"}, {"equivariance"}]),
        ({"dense_weight": 0.0}, [{"image"}, {"image_pos_cos", "image_neg_cos"}, {"equivariance"}]),
        ({"equivariance_weight": 0.0}, [{"image"}, {"image_pos_cos", "image_neg_cos"}, {"dense"}]),
    ],
)
def test_panels_are_of_the_terms_that_are_learnt_from(make_macl, options, lines):
    curves = make_macl(**options).curves()
    assert [set(c.lines) for c in curves] == lines
    units = {name: c.unit for c in curves for name in c.lines}
    assert "nats" in units.get("image", "nats") and "nats" in units.get("dense", "nats")
    assert "cosine" in units.get("image_pos_cos", "cosine")
    assert "difference" in units.get("equivariance", "difference")  # |Y - Y~|, which has no upper bound
