"""The averaged teacher, hard pseudo-labels, the largest component and the two stages: values worked out by hand."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from nnssl.ema import EMA
from nnssl.teacher import components
from nnssl.teacher.averaging import averaging_momentum
from nnssl.teacher.components import (
    class_names,
    foreground_classes,
    keep_largest,
    one_piece,
    one_piece_of_cases,
    share_of_largest,
)
from nnssl.teacher.pseudo_labels import confidence, labels_of, pseudo_label
from nnssl.teacher.stages import Stages, warmup_cosine


def test_momentum_is_the_plain_mean_at_first():
    assert [averaging_momentum(i) for i in (0, 1, 2)] == pytest.approx([1 / 2, 2 / 3, 3 / 4])
    assert averaging_momentum(97) == pytest.approx(1 - 1 / 99)
    assert averaging_momentum(98) == averaging_momentum(10**6) == 0.99
    assert averaging_momentum(5, 0.5) == 0.5


def test_with_a_constant_student_the_distance_shrinks_by_the_momentum():
    student = nn.Linear(3, 2)
    teacher = EMA(student)
    with torch.no_grad():
        student.weight += 1
    for step in range(98, 148):
        teacher.update(student, averaging_momentum(step))
    assert torch.allclose(student.weight - teacher.module.weight, torch.full((2, 3), 0.99**50), atol=1e-5)


def test_the_first_updates_are_the_mean_of_all_states():
    student = nn.Linear(1, 1, bias=False)
    values = [4.0, 1.0, 7.0, -2.0]
    with torch.no_grad():
        student.weight.fill_(values[0])
        teacher = EMA(student)
        for i, value in enumerate(values[1:]):
            student.weight.fill_(value)
            teacher.update(student, averaging_momentum(i))
    assert float(teacher.module.weight.detach()) == pytest.approx(np.mean(values))


def two_pieces():
    """Five and three voxels of class 1 with a gap between, two of class 2, in (3, 4, 5)."""
    label = np.zeros((3, 4, 5), dtype=np.int16)
    label[0, 0, :] = 1
    label[2, 3, 2:] = 1
    label[2, 0, :2] = 2
    return label


def test_only_the_largest_component_stays():
    label = torch.from_numpy(two_pieces())[None, None]
    kept = keep_largest(label, [1, 2])
    assert kept.dtype == label.dtype and kept.shape == label.shape
    assert int((kept == 1).sum()) == 5 and int((kept == 2).sum()) == 2
    assert bool((kept[0, 0, 2, 3, 2:] == 0).all()) and bool((kept[0, 0, 0, 0] == 1).all())
    assert torch.equal(keep_largest(label, [2]), label)  # two classes of one component each: unchanged
    assert keep_largest(label, []) is label
    empty = torch.zeros_like(label)
    assert torch.equal(keep_largest(empty, [1, 2]), empty)


def test_each_map_of_a_batch_is_cleaned_for_itself():
    label = two_pieces()
    flipped = np.ascontiguousarray(label[::-1, ::-1, ::-1])
    kept = keep_largest(torch.from_numpy(np.stack([label, flipped]))[:, None], [1])
    assert (kept == 1).flatten(1).sum(1).tolist() == [5, 5]
    assert torch.equal(kept[1, 0], kept[0, 0].flip(0, 1, 2))


def test_a_region_is_one_piece_where_its_labels_touch():
    label = np.zeros((1, 3, 7), dtype=np.int16)
    label[0, 1, :3], label[0, 1, 3:5], label[0, 1, 6] = 1, 2, 2
    assert share_of_largest(label, 2) == pytest.approx(2 / 3)
    assert share_of_largest(label, (1, 2)) == pytest.approx(5 / 6)
    kept = keep_largest(torch.from_numpy(label)[None, None], [(1, 2)])
    assert kept[0, 0, 0, 1].tolist() == [1, 1, 1, 2, 2, 0, 0]


def test_one_piece_is_what_every_label_map_says():
    whole, split, absent = np.zeros((2, 6, 6), np.int16), two_pieces(), np.zeros((2, 2, 2), np.int16)
    whole[:, 1:3, 1:3] = 1
    assert one_piece([whole, absent], [1, 2]) == [1]  # a class that is nowhere is not known to be one piece
    assert one_piece([whole, split], [1, 2]) == [2]
    assert one_piece([split], [1], whole=0.5) == [1]
    assert one_piece([], [1]) == []
    twins = np.zeros((1, 1, 5), np.int16)
    twins[0, 0, [0, 4]] = 1
    assert share_of_largest(twins, 1) == 0.5 and one_piece([twins], [1]) == []
    assert one_piece([split], [1], whole=5 / 8) == [1]  # five of eight voxels: as much as is asked for
    nearly = np.ones((1, 10, 10), np.int16)  # one stray voxel: of 87, and below of 273
    nearly[0, 1, :2] = nearly[0, 0, 1] = 0
    assert one_piece([nearly[:, :9]], [1]) == [] and one_piece([np.repeat(nearly, 3, axis=2)[:, :, 2:]], [1]) == [1]


def test_classes_are_labels_or_regions_without_the_background():
    labels = SimpleNamespace(has_regions=False, foreground_labels=[np.int64(1), np.int64(2)])
    assert foreground_classes(labels) == [1, 2] and all(type(c) is int for c in foreground_classes(labels))
    regions = SimpleNamespace(has_regions=True, foreground_regions=[(np.int64(1), np.int64(2)), 3, [2, 3]])
    assert foreground_classes(regions) == [(1, 2), 3, (2, 3)]


def test_classes_are_named_as_the_dataset_names_them():
    manager = SimpleNamespace(
        label_dict={"background": 0, "whole": [1, 2], "core": [2], "edge": 3, "rim": (np.int64(2), 3)}
    )
    assert class_names(manager, [(1, 2), 2, 3, (2, 3)]) == ["whole", "core", "edge", "rim"]
    assert class_names(manager, [7]) == ["7"]


def cuts_of(monkeypatch, maps, patch):
    """The label maps that are asked whether a class is one piece."""
    asked = []
    monkeypatch.setattr(components, "one_piece", lambda labels, classes: asked.extend(labels) or list(classes))
    assert one_piece_of_cases([str(i) for i in range(len(maps))], lambda name: maps[int(name)], [1], patch) == [1]
    return asked


def test_patches_lie_around_voxels_of_the_classes_within_the_image(monkeypatch):
    """Of 3 x 4 x 2 voxels around (4, 0, 3), (0, 5, 6) and (2, 3, 1) of 5 x 6 x 7; of slices one voxel thick."""
    maps = []
    for place in ((4, 0, 3), (0, 5, 6), (2, 3, 1)):
        label = -np.arange(5 * 6 * 7, dtype=np.int16).reshape(5, 6, 7) % 5 - 5  # what is negative is no class
        label[3, 5, :] = 0  # nor is background
        label[place] = 1
        maps.append(label)
    asked = cuts_of(monkeypatch, maps, (3, 4, 2))
    for whole, cut, label, start in zip(asked[::2], asked[1::2], maps, ((2, 0, 2), (0, 2, 5), (1, 1, 0)), strict=True):
        assert whole is label
        assert np.array_equal(cut, label[tuple(slice(a, a + n) for a, n in zip(start, (3, 4, 2)))])
    flat = cuts_of(monkeypatch, maps[:1], (4, 2))
    assert len(flat) == 1 and np.array_equal(flat[0], maps[0][4:5, 0:4, 2:4])
    large = cuts_of(monkeypatch, maps[:1], (9, 4, 2))  # a patch that is larger than the image holds all of it
    assert np.array_equal(large[1], maps[0][:, 0:4, 2:4])


def test_no_more_than_64_cases_and_four_patches_of_each_are_asked(monkeypatch):
    maps = [np.ones((2, 3, 3), np.int16) for _ in range(70)]
    asked = cuts_of(monkeypatch, maps, (1, 1, 1))
    assert len(asked) == 64 * 5 and sum(label.size == 18 for label in asked) == 64
    numbered = np.arange(1, 19, dtype=np.int16).reshape(2, 3, 3)
    assert len({int(cut.max()) for cut in cuts_of(monkeypatch, [numbered], (1, 1, 1))[1:]}) == 4  # four different ones


def test_what_a_patch_cuts_in_two_is_not_one_piece():
    horseshoe = np.zeros((1, 7, 7), np.int16)
    horseshoe[0, :, 0] = horseshoe[0, :, 6] = horseshoe[0, 6] = 1
    assert one_piece([horseshoe], [1]) == [1]
    assert one_piece_of_cases(["a"], lambda _: horseshoe, [1], (1, 7, 7)) == [1]
    assert one_piece_of_cases(["a"] * 9, lambda _: horseshoe, [1], (1, 3, 7)) == []


def test_labels_of_regions_are_painted_in_order():
    logits = torch.full((1, 3, 1, 1, 2), -1.0)
    logits[0, 0], logits[0, 2, 0, 0, 1] = 1.0, 1.0
    assert labels_of(logits, [2, 1, 3])[0, 0, 0, 0].tolist() == [2, 3]
    assert labels_of(logits)[0, 0, 0, 0].tolist() == [0, 0]
    assert not labels_of(torch.zeros(1, 3, 1, 1, 2), [2, 1, 3]).any()  # half a chance is not more than half


def test_labels_of_classes_are_the_argmax_first_among_equals():
    logits = torch.randn(2, 4, 3, 5, 7).round()  # with ties
    assert torch.equal(labels_of(logits), logits.argmax(1, keepdim=True))


def test_rate_within_a_stage():
    assert warmup_cosine(0, 100, 0.05) == pytest.approx(0.2)
    assert warmup_cosine(4, 100, 0.05) == pytest.approx(0.5 * (1 + math.cos(math.pi * 0.04)))
    assert warmup_cosine(50, 100, 0.05) == pytest.approx(0.5)
    assert warmup_cosine(100, 100) == pytest.approx(0)
    assert warmup_cosine(0, 10, 0.0) == 1
    assert Stages(100, 300).factor(0) == pytest.approx(0.2)  # the first of five steps
    assert Stages(100, 300).factor(100) == pytest.approx(0.1)  # of ten


def test_the_rate_rises_and_falls_once_in_each_stage():
    stages = Stages.split(30, 1 / 3)
    assert (stages.first, stages.total) == (10, 30)
    assert [stages.second(at) for at in (0, 9, 10, 29)] == [False, False, True, True]
    assert stages.within(9) == (9, 10) and stages.within(10) == (0, 20) and stages.within(29) == (19, 20)
    rates = [stages.factor(at, 0.2) for at in range(30)]
    assert rates[10] == warmup_cosine(0, 20, 0.2)
    assert max(rates[:10]) > 0.9 and max(rates[10:]) > 0.9 and rates[9] < 0.05 and rates[29] < 0.05


@pytest.mark.parametrize(
    ("total", "share", "first"),
    [
        (1, 0.3, 1),
        (2, 0.01, 1),
        (2, 0.99, 1),
        (9, 0.01, 1),
        (9, 0.99, 8),
        (10, 0.26, 3),
        (10, 0.24, 2),
        (9, 0.0, 0),
        (9, 1.0, 9),
    ],
)
def test_neither_stage_is_empty_unless_asked_for(total, share, first):
    stages = Stages.split(total, share)
    assert (stages.first, stages.total) == (first, total) and type(stages.first) is int


def test_a_second_stage_begins_once_and_only_after_a_first():
    assert [at for at in range(9) if Stages(3, 9).begins_second(at)] == [3]
    assert [at for at in range(9) if Stages(1, 9).begins_second(at)] == [1]
    assert not any(Stages(first, 9).begins_second(at) for first in (0, 9) for at in range(10))


def test_confidence_by_hand():
    """Of classes the largest softmax, 3/4 and 1/2; of regions the sigmoid that is nearest to 1/2, whatever its side."""
    logits = torch.tensor([[0.0, math.log(3)], [2.0, 2.0]]).view(2, 2, 1, 1)
    assert confidence(logits).shape == (2, 1, 1, 1) and confidence(logits).flatten().tolist() == pytest.approx(
        [0.75, 0.5]
    )
    regions = torch.tensor([[3.0, -math.log(4)], [-math.log(9), 0.0]]).view(2, 2, 1, 1)
    assert confidence(regions, True).shape == (2, 1, 1, 1)
    assert confidence(regions, True).flatten().tolist() == pytest.approx([0.8, 0.5])


def test_doubtful_voxels_of_classes_and_of_regions_are_ignored():
    """Each image of a batch by its own probabilities; a probability of just the threshold is enough."""
    logits = torch.tensor([[[0.0, 0.0], [math.log(3), 0.0]], [[0.0, 5.0], [5.0, 0.1]]])[..., None]  # (2, 2, 2, 1)
    assert pseudo_label(logits, 0.5, 9).flatten().tolist() == [1, 0, 1, 0]
    assert pseudo_label(logits, 0.6, 9).flatten().tolist() == [1, 9, 1, 0]
    regions = torch.tensor([[[5.0, 5.0], [-5.0, 0.2]], [[-5.0, 5.0], [-5.0, 5.0]]])[..., None]
    assert pseudo_label(regions, 0.0, 9, order=[1, 2]).flatten().tolist() == [1, 2, 0, 2]
    assert pseudo_label(regions, 0.6, 9, order=[1, 2]).flatten().tolist() == [1, 9, 0, 2]


def test_doubtful_voxels_of_a_smaller_component_are_background_of_the_larger_one_ignored():
    """Five voxels of class 1, one of them doubtful, then a gap and two more: 1 1 9 1 1 0 0 0, with 9 for what is ignored."""
    sure = torch.tensor([4.0, 4, 0.1, 4, 4, -4, 4, 4])
    logits = torch.stack([torch.zeros(8), sure])[None, :, None]
    assert pseudo_label(logits, 0.6, 9, largest=[1]).flatten().tolist() == [1, 1, 9, 1, 1, 0, 0, 0]
    assert pseudo_label(logits, 0.0, 9).flatten().tolist() == [1, 1, 1, 1, 1, 0, 1, 1]
