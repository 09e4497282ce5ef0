"""The averaged teacher, hard pseudo-labels, the largest component and the two stages: values worked out by hand."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from nnssl.ema import EMA
from nnssl.teacher.averaging import averaging_momentum
from nnssl.teacher.components import keep_largest, one_piece, share_of_largest
from nnssl.teacher.pseudo_labels import labels_of, pseudo_label
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


def test_labels_of_regions_are_painted_in_order():
    logits = torch.full((1, 3, 1, 1, 2), -1.0)
    logits[0, 0], logits[0, 2, 0, 0, 1] = 1.0, 1.0
    assert labels_of(logits, [2, 1, 3])[0, 0, 0, 0].tolist() == [2, 3]
    assert labels_of(logits)[0, 0, 0, 0].tolist() == [0, 0]


def test_labels_of_classes_are_the_argmax_first_among_equals():
    logits = torch.randn(2, 4, 3, 5, 7).round()  # with ties
    assert torch.equal(labels_of(logits), logits.argmax(1, keepdim=True))


def test_rate_within_a_stage():
    assert warmup_cosine(0, 100, 0.05) == pytest.approx(0.2)
    assert warmup_cosine(4, 100, 0.05) == pytest.approx(0.5 * (1 + math.cos(math.pi * 0.04)))
    assert warmup_cosine(50, 100, 0.05) == pytest.approx(0.5)
    assert warmup_cosine(100, 100) == pytest.approx(0)
    assert warmup_cosine(0, 10, 0.0) == 1


def test_the_rate_rises_and_falls_once_in_each_stage():
    stages = Stages.split(30, 1 / 3)
    assert (stages.first, stages.total) == (10, 30)
    assert [stages.second(at) for at in (0, 9, 10, 29)] == [False, False, True, True]
    assert stages.within(9) == (9, 10) and stages.within(10) == (0, 20) and stages.within(29) == (19, 20)
    rates = [stages.factor(at, 0.2) for at in range(30)]
    assert rates[10] == warmup_cosine(0, 20, 0.2)
    assert max(rates[:10]) > 0.9 and max(rates[10:]) > 0.9 and rates[9] < 0.05 and rates[29] < 0.05


@pytest.mark.parametrize(
    ("total", "share", "first"), [(1, 0.3, 1), (2, 0.01, 1), (2, 0.99, 1), (9, 0.0, 0), (9, 1.0, 9)]
)
def test_neither_stage_is_empty_unless_asked_for(total, share, first):
    assert Stages.split(total, share).first == first


def test_a_second_stage_begins_once_and_only_after_a_first():
    assert [at for at in range(9) if Stages(3, 9).begins_second(at)] == [3]
    assert not any(Stages(first, 9).begins_second(at) for first in (0, 9) for at in range(10))


def test_doubtful_voxels_of_a_smaller_component_are_background_of_the_larger_one_ignored():
    """Five voxels of class 1, one of them doubtful, then a gap and two more: 1 1 9 1 1 0 0 0, with 9 for what is ignored."""
    sure = torch.tensor([4.0, 4, 0.1, 4, 4, -4, 4, 4])
    logits = torch.stack([torch.zeros(8), sure])[None, :, None]
    assert pseudo_label(logits, 0.6, 9, largest=[1]).flatten().tolist() == [1, 1, 9, 1, 1, 0, 0, 0]
    assert pseudo_label(logits, 0.0, 9).flatten().tolist() == [1, 1, 1, 1, 1, 0, 1, 1]
