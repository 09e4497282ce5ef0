"""``-m robust`` by hand values: its terms, what a step holds, views and pictures."""

import pytest
import torch

from nnssl.pretrain.augment import StepRNG
from nnssl.pretrain.methods import SourceStats, get_method
from nnssl.pretrain.methods.robust import CROP, FIRST, OTHER, SECOND


def as_given(make_robust, **options):
    """A method that compares the images themselves, as vectors."""
    method = make_robust(levels=1, batch_standardise=False, **options)
    method.features = lambda x: [x.flatten(1)]
    return method


def terms_of(method, a, b, case=None):
    case = torch.arange(len(a)) if case is None else torch.tensor(case)
    return {k: float(v) for k, v in method({"a": a, "b": b, "case": case}).items()}


def test_numbers_of_vectors_by_hand(make_robust):
    """All alike, all apart, and views that resemble the other case more than each other: 0, 1 and 2 times too far."""
    hinge = as_given(make_robust, form="hinge", margin=0.5)
    same = torch.ones(4, 3)
    assert terms_of(hinge, same, 2 * same) == pytest.approx(
        {"total": 0.5, "robustness": 0.5, "active": 1, "distance_same": 0, "distance_other": 0, "nearest": 0}, abs=1e-6
    )  # a collapsed network has the margin, and nothing is nearer than anything
    apart = torch.eye(4)
    told = {"total": 0, "robustness": 0, "active": 0, "distance_same": 0, "distance_other": 1, "nearest": 1}
    assert terms_of(hinge, apart, 3 * apart) == pytest.approx(told, abs=1e-6)
    assert terms_of(as_given(make_robust, form="hinge", margin=1.0), apart, apart) == pytest.approx(told, abs=1e-6)
    swapped = terms_of(hinge, torch.eye(2), torch.eye(2).flip(0))
    assert swapped == pytest.approx(
        {"total": 1.5, "robustness": 1.5, "active": 1, "distance_same": 1, "distance_other": 0, "nearest": 0}, abs=1e-6
    )


def test_one_case_or_dead_features_give_finite_terms(make_robust):
    """A batch of one case has nothing to compare; features that are 0 are at distance 1 of everything."""
    alone = terms_of(as_given(make_robust, form="hinge"), torch.eye(3), torch.eye(3), [7, 7, 7])
    assert alone == {"total": 0, "robustness": 0, "active": 0, "distance_same": 0, "distance_other": 0, "nearest": 1}
    dead = terms_of(as_given(make_robust, form="hinge"), torch.zeros(3, 2), torch.zeros(3, 2))
    assert (dead["total"], dead["distance_same"], dead["distance_other"]) == (0.5, 1, 1)
    image = torch.zeros(3, 1, 2, 2, 2)
    tags = as_given(make_robust).pictures({"a": image, "b": image, "still": image, "case": torch.arange(3)}).tags
    assert tags[SECOND] == tags[OTHER] == ["distance to view 1: 1.00"] * 3


def test_cases_of_all_ranks_are_compared(make_robust, monkeypatch):
    """As of two ranks, of which the other has two cases more: both views and the cases of both are one batch."""
    method, a, b = (
        as_given(make_robust, form="hinge"),
        torch.eye(2, 3) + 0.2,
        torch.eye(2, 3) + torch.tensor([0, 0.5, 0]),
    )
    whole = terms_of(method, torch.cat([a, a.roll(1, 1)]), torch.cat([b, b.roll(1, 1)]))
    alone = terms_of(method, a, b)

    def gather(x):
        return torch.cat([x, x.roll(1, 1) if x.is_floating_point() else x + 2])

    monkeypatch.setattr("nnssl.pretrain.methods.robust.gather_with_grad", gather)
    assert terms_of(method, a, b) == pytest.approx(whole) != pytest.approx(alone)


def test_a_step_has_sixteen_crops_of_two_cases_at_least(make_robust):
    method, cls = make_robust(), get_method("robust")
    assert (method.request.batch_size, method.request.min_batch, method.request.crops_per_case) == (16, 4, 1)
    assert cls.crops(method.plan, SourceStats((28, 36, 28), 2), cls.Config()).size == method.request.size
    assert cls.optimises_robustness and cls.presets == {"hinge": {"form": "hinge"}, "smooth": {"form": "softplus"}}


def test_only_the_encoder_is_run(make_robust, make_batch):
    method = make_robust()
    for stage in method.network.decoder.stages:
        stage.register_forward_hook(lambda *_: pytest.fail("the decoder was run"))
    batch = make_batch(method, 6)
    method(batch)["total"].backward()
    assert method.embed(batch).shape[0] == 6


def test_embeddings_are_standardised_as_the_views_are(make_robust, make_batch):
    method = make_robust()
    batch = make_batch(method, 8)
    with torch.no_grad():
        z = method.embed(batch)
    assert float(z.mean(0).abs().max()) < 1e-4 and float(z.var(0, unbiased=False).max()) < 1.001


class ThreeQuarters(StepRNG):
    """Each number at three quarters of its range."""

    def uniform(self, low, high, *shape):
        return torch.full((self.count, *shape), low + 0.75 * (high - low))


def test_brightness_contrast_and_blur_by_hand(make_robust):
    """Jitter 0.1: at three quarters both factors are 1.05. A blur of up to 1 voxel: 0.1 + 0.75 * 0.9, to 3 voxels around."""
    none = {"gamma": 0.0, "noise": 0.0, "blur": 0.0, "jitter": 0.0}
    x = torch.tensor([0.2, 0.4, 0.6, 0.8]).view(1, 1, 4, 1, 1).expand(2, 1, 4, 3, 3)
    unit = torch.tensor([0.0, 1.0]).expand(2, 1, 2)
    bright = make_robust(**{**none, "jitter": 0.1})._augment(x, unit, ThreeQuarters(0, 0, 2))
    expected = 1.05 * (0.5 + 1.05 * (torch.tensor([0.2, 0.4, 0.6, 0.8]) - 0.5))
    torch.testing.assert_close(bright[1, 0, :, 2, 0], expected)
    point = torch.zeros(2, 1, 15, 1, 1)
    point[:, :, 7] = 1
    for blur, sigma, radius in ((1.0, 0.775, 3), (0.5, 0.4, 2), (0.2, 0.175, 1)):
        kernel = torch.exp(-0.5 * (torch.arange(-radius, radius + 1) / sigma) ** 2)
        expected = torch.nn.functional.pad(kernel / kernel.sum(), (7 - radius, 7 - radius))
        blurred = make_robust(**{**none, "blur": blur})._augment(point, unit, ThreeQuarters(0, 0, 2))
        torch.testing.assert_close(blurred[0, 0, :, 0, 0], expected, atol=1e-6, rtol=0)


@torch.no_grad()
def test_a_picture_shows_the_case_that_view_1_resembles_most(make_robust):
    """Five cases; the second view of case 1 is turned away from its first, which case 3 resembles."""
    method = as_given(make_robust)
    seen = torch.zeros(5, 1, 6, 4, 5)
    a, b = torch.eye(5, 6), torch.eye(5, 6)
    a[0, 1], b[1] = 0.75, torch.tensor([0, 0.6, 0, 0, 0, 0.8])  # cosines: 0.8 and 0.6
    b[3] = torch.tensor([-1.0, 2, 0, 1, 0, 0])  # with a[1] 2 / sqrt(6), with a[0] less
    named = {"a": a, "b": b}
    batch = {k: seen + 10 * (n + 1) + torch.arange(5.0).view(5, 1, 1, 1, 1) for n, k in enumerate(("still", "a", "b"))}
    batch["still"][:, 0, 3] += 0.5  # the middle slice
    method.features = lambda x: [torch.zeros(5, 6), named["a" if 20 <= float(x.min()) < 30 else "b"]]
    picture = method.pictures({**batch, "case": torch.arange(5)})
    assert {k: v.shape for k, v in picture.columns.items()} == dict.fromkeys((CROP, FIRST, SECOND, OTHER), (4, 4, 5))
    values = {k: v[:, 0, 0].tolist() for k, v in picture.columns.items()}
    assert values[CROP] == [10.5, 11.5, 12.5, 13.5] and values[FIRST] == [20, 21, 22, 23]
    assert values[SECOND] == [30, 31, 32, 33]
    assert values[OTHER][:2] == [31, 33], "of case 0 the second view of case 1, of case 1 that of case 3"
    assert picture.tags[SECOND][:2] == ["distance to view 1: 0.20", "distance to view 1: 0.40"]
    assert picture.tags[OTHER][:2] == ["distance to view 1: 0.64", "distance to view 1: 0.18 (nearer!)"]


def test_pictures_compare_what_the_loss_compares(make_robust, make_batch):
    """Standardised where the loss standardises: the distances of other cases are about 1, and not about 0."""
    for standardised in (True, False):
        method = make_robust(batch_standardise=standardised)
        with torch.no_grad():
            batch = make_batch(method, 6)
            tags = method.pictures(batch).tags
        far = [float(t.split(": ")[1].split(" ")[0]) for t in tags[OTHER]]
        assert (min(far) > 0.4) is standardised, far


def test_curves_are_drawn_in_percent_where_they_are_shares(make_robust):
    criterion, found, distances = make_robust().curves()
    assert [list(c.lines) for c in (criterion, found)] == [["robustness"], ["nearest"]]
    assert list(distances.lines) == ["distance_same", "distance_other"]
    assert [c.percent for c in (criterion, found, distances)] == [False, True, False]
