"""The omni-supervised layer by hand: streams, intensities, an absent class, curves, pictures, which volumes are written."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from nnssl.networks import build_network
from nnssl.plans import Plan
from nnssl.pretrain.augment import StepRNG
from nnssl.pretrain.data import sampling
from nnssl.pretrain.data.case_set import CaseRef
from nnssl.pretrain.methods import SourceStats, get_method
from nnssl.pretrain.omni import OmniConfig, make_omni
from nnssl.pretrain.omni import method as omni_method
from nnssl.pretrain.omni.auxiliary import OmniLoaders
from nnssl.pretrain.omni.cases import LabelledCase
from nnssl.pretrain.omni.loss import SegmentationLoss
from nnssl.pretrain.omni.patches import COMPARED, LABELLED, UNLABELLED, LabelledDataset, Patches, Sizes
from nnssl.pretrain.omni.pictures import LABELS, PSEUDO, dice_tags, omni_columns
from nnssl.pretrain.omni.volumes import _dice, choose_volumes
from nnssl.pretrain.types import Curve

STRIDES = ((1, 1, 1), (1, 2, 2), (2, 2, 2), (2, 1, 2))


@pytest.fixture
def build(tiny_plans, tiny_dataset_json):
    """``build(name="robust", **options)``: a method of the second stage."""

    def make(name="robust", **options):
        plans = tiny_plans(3, features=(4, 6, 8), patch=(8, 16, 12), median_shape=(48, 56, 40))
        plan = Plan.from_dicts(plans, "3d_fullres", tiny_dataset_json())
        cls = make_omni(get_method(name), OmniConfig(**options))
        torch.manual_seed(0)
        request = cls.crops(plan, SourceStats((48, 56, 40), 9), cls.Config())
        return cls(build_network(plan), plan, request, cls.Config())

    return make


def test_no_two_kinds_of_draws_share_their_random_numbers(tiny_plans, tiny_dataset_json):
    plan = Plan.from_dicts(tiny_plans(), "3d_fullres", tiny_dataset_json())
    cases = SimpleNamespace(folder=Path())
    auxiliary = OmniLoaders(plan, None, cases, Sizes((8, 8, 8), (10, 12, 14), 4, 3, 0.5), 0, switch=1, augment=True)
    learnt, compared = (
        auxiliary.labelled_dataset([LabelledCase("a")], held_out=h, batch=b) for h, b in ((False, None), (True, 7))
    )
    assert (learnt.stream, compared.stream) == (LABELLED, COMPARED)
    assert (learnt.held_out, compared.held_out, learnt.batch, compared.batch) == (False, True, 4, 7)
    assert (learnt.read_size, compared.read_size) == ((10, 12, 14), (8, 8, 8))
    assert len({sampling.TRAIN, sampling.HELD_OUT, UNLABELLED, LABELLED, COMPARED}) == 5


def test_labelled_patches_change_once_as_much_and_the_others_by_strength(build, monkeypatch):
    """Noise and probabilities of labelled patches are the plain ones; of the others ``strength`` times as large."""
    told = []
    monkeypatch.setattr(omni_method, "augment_strongly", lambda x, rng, masked, strength: (told.append(strength), x)[1])
    for options, expected in (({}, [1.0, 2.0]), ({"strength": 0.5}, [1.0, 0.5]), ({"intensities": "nnunet"}, [])):
        method = build(**options)
        window = method.omni_augmentation.read_size
        told.clear()
        for label in (torch.zeros(2, 1, *window, dtype=torch.int16), None):
            patches = Patches(torch.randn(2, 1, *window), label, [None] * 2, ["a", "b"], 0, 2)
            (method._semi if label is None else method._labelled)(patches, StepRNG(0, 0, 2))
        assert told == expected


def test_a_class_that_is_neither_there_nor_found_counts_as_in_nnunet(tiny_plans, tiny_dataset_json):
    """Smoothing 1e-5: N voxels of probability p of a class that is nowhere give it a Dice of 1e-5 / (N p + 1e-5)."""
    plans = tiny_plans(strides=STRIDES, features=(4, 4, 4, 4), patch=(8, 12, 16))
    plan = Plan.from_dicts(plans, "3d_fullres", tiny_dataset_json(labels=("liver",)))
    loss = SegmentationLoss(plan, None)
    label = torch.zeros(1, 1, 8, 12, 16, dtype=torch.long)
    targets = loss.targets(label)
    outputs = [torch.zeros(1, 2, *t.shape[2:]) for t in targets]
    for o in outputs:
        o[:, 1] = -18.0  # p = 1.523e-8
    p = torch.tensor(-18.0, dtype=torch.float64).sigmoid()
    sizes = [8 * 12 * 16, 8 * 6 * 8]
    expected = -sum(w * 1e-5 / (n * p + 1e-5) for w, n in zip((2 / 3, 1 / 3), sizes))
    assert 0.2 < -float(expected) < 0.8
    assert float(loss(outputs, targets)[0]) == pytest.approx(float(expected), rel=1e-3)


def test_curves_are_of_the_methods_own_loss_and_of_both_kinds_of_labels(build, monkeypatch):
    own = [Curve("own", "u", {"total": "loss", "part": "of it"}), Curve("other", "u", {"part": ""})]
    monkeypatch.setattr(get_method("robust"), "curves", lambda self: own)
    assert [c.lines for c in build().curves()] == [{"ssl": "loss", "part": "of it"}, {"seg": ""}, {"semi": ""}]


# ---- pictures --------------------------------------------------------------------------------------------------------

COLOURS = {
    1: (0.90, 0.35, 0.25),
    2: (0.25, 0.60, 0.90),
    3: (0.35, 0.75, 0.35),
    4: (0.95, 0.75, 0.20),
    5: (0.65, 0.40, 0.80),
    6: (0.30, 0.75, 0.75),
    7: (0.90, 0.35, 0.25),
}


def test_a_slice_with_its_labels_by_hand():
    """Of each case the slice with most labelled voxels; a label covers 45 % of the grey; the seventh looks like the first."""
    label, made = torch.zeros(2, 1, 3, 4, 5, dtype=torch.long), torch.zeros(2, 1, 3, 4, 5, dtype=torch.long)
    label[0, 0, 0, 0] = 2  # five voxels
    label[0, 0, 2, 1:3, 1:4] = 1  # six: this one
    label[0, 0, 1] = -1  # outside of the image there is no label
    label[1, 0, 1, 3] = torch.tensor([3, 4, 5, 6, 7])
    made[0, 0, 2, 0, 0] = 2
    data = torch.rand(2, 1, 3, 4, 5)
    columns = omni_columns(data, label, made)
    shown = torch.stack([data[0, 0, 2], data[1, 0, 1]]).numpy()
    low, high = np.percentile(shown, (0.5, 99.5))
    grey = ((shown - low) / (high - low)).clip(0, 1)
    expected = {k: np.repeat(grey[..., None], 3, -1) for k in (LABELS, PSEUDO)}
    places = {LABELS: [(0, y, x, 1) for y in (1, 2) for x in (1, 2, 3)] + [(1, 3, x, 3 + x) for x in range(5)]}
    places[PSEUDO] = [(0, 0, 0, 2)]
    for key, marks in places.items():
        for i, y, x, value in marks:
            expected[key][i, y, x] = 0.55 * grey[i, y, x] + 0.45 * np.array(COLOURS[value])
        np.testing.assert_allclose(columns[key], expected[key], atol=1e-6)
    flat = omni_columns(torch.full((1, 1, 4, 5), 3.0), label[:1, :, 2], made[:1, :, 2])
    assert not flat[LABELS][0, 0].any() and flat[LABELS].shape == (1, 4, 5, 3), "an image of one value is black"
    several = omni_columns(data.repeat(3, 1, 1, 1, 1), label.repeat(3, 1, 1, 1, 1), made.repeat(3, 1, 1, 1, 1))
    assert len(several[LABELS]) == 4 and len(dice_tags(label.repeat(3, 1, 1, 1, 1), made.repeat(3, 1, 1, 1, 1))) == 4


def test_dice_beside_a_picture_is_of_all_labels_taken_as_one():
    label = torch.tensor([[1, 2, 0, 0], [0, 0, 0, -1]]).view(2, 1, 2, 2)
    made = torch.tensor([[2, 0, 1, 0], [0, 0, 0, 0]]).view(2, 1, 2, 2)
    assert dice_tags(label, made) == ["Dice 0.50", "nothing labelled"]


# ---- volumes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "known", "new", "chosen"),
    [(3, 3, 4, (2, 1)), (1, 3, 4, (1, 0)), (4, 3, 4, (2, 2)), (4, 3, 1, (3, 1)), (4, 1, 9, (1, 3)), (9, 2, 3, (2, 3))],
)
def test_how_many_volumes_have_labels(tmp_path, count, known, new, chosen):
    """Half of them, the larger half of an odd number; more of the other kind where one has too few."""
    refs = [CaseRef(f"x{i}", tmp_path, "Dataset500_U") for i in range(new)]
    cases = SimpleNamespace(
        dataset="Dataset501_T", folder=tmp_path, train=[], held_out=[LabelledCase(f"y{i}") for i in range(known)]
    )
    found = choose_volumes(SimpleNamespace(cases=cases, seed=0, case_set=SimpleNamespace(cases=refs)), count)
    labelled = sum(ref.source == "Dataset501_T" for ref in found)
    assert (labelled, len(found) - labelled) == chosen


def test_dice_of_a_volume_is_over_labelled_voxels_and_classes_that_are_there(tiny_plans, tiny_dataset_json):
    info = tiny_dataset_json(labels=("liver", "spleen", "kidney"))
    info["labels"]["ignore"] = 4
    plan = Plan.from_dicts(tiny_plans(), "3d_fullres", info)
    label = torch.tensor([1, 1, 2, 4, 0, 0]).view(1, 1, 1, 2, 3)
    made = torch.tensor([1, 2, 2, 1, 1, 0]).view(1, 1, 1, 2, 3)
    assert _dice(plan, made, label) == pytest.approx(
        {"dice": (1 / 2 + 2 / 3) / 2, "dice_liver": 1 / 2, "dice_spleen": 2 / 3}
    )
    assert _dice(plan, 0 * made, 0 * label) == {"dice": 0.0}


def test_patches_of_an_estimate_are_as_those_of_a_step(tiny_plans, tiny_dataset_json):
    plan = Plan.from_dicts(tiny_plans(channels=2), "3d_fullres", tiny_dataset_json(2))
    sizes = Sizes((8, 16, 12), (10, 20, 18), 3, 2, 0.33)
    auxiliary = OmniLoaders(plan, None, None, sizes, seed=0, switch=3, augment=True)
    made = auxiliary.random(SimpleNamespace(case=["own"]))
    assert made.labelled.data.shape == (3, 2, 10, 20, 18) and made.labelled.label.shape == (3, 1, 10, 20, 18)
    assert made.labelled.label.unique().tolist() == [0, 1, 2] and made.labelled.label.dtype == torch.int16
    assert made.unlabelled.data.shape == (2, 2, 10, 20, 18) and made.unlabelled.label is None
    assert [(p.first, p.total, p.augment) for p in (made.labelled, made.unlabelled)] == [(0, 3, True), (0, 2, True)]
    assert made.case == ["own", "case0", "case1", "case2", "case0", "case1"]


def test_of_a_slice_that_very_slice_is_read(tiny_plans, tiny_dataset_json):
    """The first axis of 2d plans counts slices: a voxel of slice 7 is looked at in that one, and also one of the first."""
    plan = Plan.from_dicts(tiny_plans(2), "2d", tiny_dataset_json())
    data = LabelledDataset([LabelledCase("a")], Path(), plan, Sizes((6, 8), (8, 10), 2, 2, 1.0), seed=0)
    for place in (7, 0, 19):
        data._voxel = lambda *_, at=place: np.array([at, 9, 12])
        start = data._start(data.cases[0], (20, 30, 25), np.random.default_rng(0), True)
        assert start.tolist() == [place, 9 - 3 - 1, 12 - 4 - 1]
    assert (data.size, data.read_size) == ((1, 6, 8), (1, 8, 10))
