"""Counting agreement, and choosing which cases are written as volumes."""

from types import SimpleNamespace

import pytest
import torch

from nnssl.plans import Plan
from nnssl.pretrain.data.case_set import CaseRef
from nnssl.pretrain.omni.cases import LabelledCase
from nnssl.pretrain.omni.pictures import LABELS, PSEUDO, dice_tags, omni_columns
from nnssl.pretrain.omni.pseudo_metrics import Counts, _counted, _masks
from nnssl.pretrain.omni.volumes import _dice, choose_volumes


def test_dice_is_over_all_patches_and_leaves_out_what_is_nowhere():
    counts = Counts(["a", "b", "c"], torch.device("cpu"))
    made = torch.zeros(2, 3, 2, 3, 4, dtype=torch.bool)
    label = made.clone()
    made[0, 0, 0] = True  # 12 voxels of a, 6 of them right
    label[0, 0, 0, :, :2] = True
    label[1, 0, 1, 0, 0] = True  # one missed in another patch
    made[1, 1, 0, 0, 0] = True  # b is only made up
    counts.add(made[:1], label[:1], torch.ones(1, 3, 1, 1, 1, dtype=torch.bool))
    counts.add(made[1:], label[1:], torch.ones(1, 3, 1, 1, 1, dtype=torch.bool))
    assert counts.dice() == {"a": pytest.approx(2 * 6 / (12 + 7)), "b": 0.0}


def test_what_is_not_annotated_is_not_counted(tiny_plans, tiny_dataset_json):
    names = {"liver": 1, "spleen": 2}
    counts = Counts(list(names), torch.device("cpu"))
    plan = Plan.from_dicts(tiny_plans(), "3d_fullres", tiny_dataset_json())
    label = torch.tensor([0, 1, 2, -1]).view(1, 1, 2, 2, 1)
    made = torch.tensor([0, 1, 1, 2]).view(1, 1, 2, 2, 1)
    masks = _masks(plan, made), _masks(plan, label)
    assert masks[0].shape == (1, 2, 2, 2, 1)
    counts.add(*masks, _counted((2,), names, torch.device("cpu"), 5))
    assert counts.dice() == {"spleen": 0.0}
    counts.add_share(torch.tensor(3), 4)
    assert counts.share() == 0.75
    told = _dice(plan, made, label)
    assert told["dice_liver"] == pytest.approx(2 / 3)
    assert told["dice"] == pytest.approx(1 / 3)


def test_volumes_are_cases_that_were_not_learnt_from_half_of_them_with_labels(tmp_path):
    refs = [CaseRef(f"x{i}", tmp_path, "Dataset500_U") for i in range(4)]
    refs += [CaseRef(f"y{i}", tmp_path, "Dataset501_T") for i in range(3)]
    cases = SimpleNamespace(
        dataset="Dataset501_T",
        folder=tmp_path,
        train=[LabelledCase("y0")],
        held_out=[LabelledCase("y1"), LabelledCase("y2"), LabelledCase("y3")],
    )
    auxiliary = SimpleNamespace(cases=cases, seed=0, case_set=SimpleNamespace(cases=refs))
    chosen = [r.key for r in choose_volumes(auxiliary, 4)]
    assert len(set(chosen)) == 4
    assert sum(k.startswith("Dataset501_T") for k in chosen) == 2
    assert "Dataset501_T/y0" not in [r.key for r in choose_volumes(auxiliary, 99)]
    assert len(choose_volumes(auxiliary, 99)) == 7
    assert [r.key for r in choose_volumes(auxiliary, 4)] == chosen
    cases.held_out = []
    assert len(choose_volumes(auxiliary, 4)) == 4


@pytest.mark.parametrize("size", [(4, 6, 8), (6, 8)])
def test_pictures_show_the_slice_with_most_labels(size):
    label = torch.zeros(2, 1, *size, dtype=torch.long)
    label[..., 3, 2:5] = 1
    columns = omni_columns(torch.randn(2, 1, *size), label, torch.zeros_like(label))
    assert columns[LABELS].shape == (2, *size[-2:], 3)
    coloured = columns[LABELS] != columns[PSEUDO]
    assert coloured.any(-1).sum() == (6 if len(size) == 2 else coloured.any(-1).sum())
    assert dice_tags(label, label) == ["Dice 1.00"] * 2 and dice_tags(label, 0 * label) == ["Dice 0.00"] * 2
    assert dice_tags(0 * label, 0 * label) == ["nothing labelled"] * 2
    assert 0 <= columns[LABELS].min() <= columns[LABELS].max() <= 1
