"""Counting Dice, and choosing which cases are written as volumes."""

import contextlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from nnssl.plans import Plan
from nnssl.pretrain.data.case_set import CaseRef
from nnssl.pretrain.omni import pseudo_metrics
from nnssl.pretrain.omni.cases import LabelledCase
from nnssl.pretrain.omni.config import OmniConfig
from nnssl.pretrain.omni.dice import Counts, class_masks, mean_dice
from nnssl.pretrain.omni.pictures import LABELS, PSEUDO, dice_tags, omni_columns
from nnssl.pretrain.omni.pseudo_metrics import PseudoMetricsHook, _counted
from nnssl.pretrain.omni.volumes import _dice, choose_volumes
from nnssl.weights import label_set


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
    masks = class_masks(plan, made), class_masks(plan, label)
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
    assert coloured.any(-1).sum() == 6
    assert dice_tags(label, label) == ["Dice 1.00"] * 2 and dice_tags(label, 0 * label) == ["Dice 0.00"] * 2
    assert dice_tags(0 * label, 0 * label) == ["nothing labelled"] * 2
    assert 0 <= columns[LABELS].min() <= columns[LABELS].max() <= 1


def hook_of(monkeypatch, tmp_path, held_out=("a",), train=(), **options):
    """The watcher with measurements that are given, and what it writes down."""
    cases = SimpleNamespace(
        folder=tmp_path,
        held_out=[LabelledCase(n) for n in held_out],
        train=[LabelledCase(f"t{i}", annotated=a) for i, a in enumerate(train)],
        dataset="Dataset501_T",
        why="all",
    )
    auxiliary = SimpleNamespace(cases=cases, labelled_dataset=lambda found, held_out, batch: [c.name for c in found])
    hook, events, written = PseudoMetricsHook(OmniConfig(**options), auxiliary), [], []
    monkeypatch.setattr(
        pseudo_metrics, "class_locations", lambda folder, name: {1: [0]} if name != "empty" else {1: []}
    )
    numbers = {"dice": 0.5, "student_dice": 0.4, "confident": 0.25}
    monkeypatch.setattr(hook, "_measure", lambda engine, epoch: {**numbers, "at": epoch})
    monkeypatch.setattr(hook, "_write", lambda engine, epoch: written.append(epoch))
    log = SimpleNamespace(event=lambda kind, **row: events.append((kind, row)))
    return hook, SimpleNamespace(step=0, log=log, spec=SimpleNamespace(seed=0)), events, written


@pytest.mark.parametrize(
    ("held_out", "step", "measured"), [(("a",), 0, True), (("a",), 5, False), ((), 0, False), (("empty",), 0, False)]
)
def test_the_untrained_network_is_measured_where_there_are_labels_to_compare_with(
    monkeypatch, tmp_path, held_out, step, measured
):
    hook, engine, events, _ = hook_of(monkeypatch, tmp_path, held_out)
    engine.step = step
    hook.start(engine)
    written = [(kind, row["epoch"], row["step"], row["at"], row["dice"]) for kind, row in events]
    assert written == [("pseudo", 0, 0, 0, 0.5)] * measured
    assert (hook.panel() is not None) == (held_out == ("a",))
    row = {"epoch": 1}
    hook.after_epoch(engine, row)
    assert ("pseudo/dice" in row) == (held_out == ("a",))


class Painter(nn.Module):
    """A method whose averaged network finds what the image says, surely where that is given, and whose network finds nothing."""

    omni_ignore = 9

    def __init__(self):
        super().__init__()
        self.network, self.teacher, self.modes = nn.Identity(), nn.Identity(), []

    def omni_network(self):
        return self.teacher

    def omni_logits(self, x, network=None):
        self.modes.append(self.training)
        found = torch.cat([(x[:, :1] == k).float() for k in range(3)], 1)
        return 0 * found if network is self.network else found * x[:, 1:]

    def omni_labels(self, logits):
        return logits.argmax(1, keepdim=True)

    def omni_confidence(self, logits):
        return logits.softmax(1).amax(1, keepdim=True)


def test_what_is_measured_of_held_out_cases_by_hand(monkeypatch, tiny_plans, tiny_dataset_json):
    """Two patches of four voxels: one ignored, and in the second only the liver annotated."""
    monkeypatch.setattr(pseudo_metrics, "omni_of", lambda method: method)
    plan = Plan.from_dicts(tiny_plans(), "3d_fullres", tiny_dataset_json())
    hook = PseudoMetricsHook(OmniConfig(threshold=0.6), SimpleNamespace(plan=plan))
    patches = []
    for found, surely, label, annotated in (
        ([1, 1, 2, 0], 5.0, [1, 2, 2, 9], None),  # liver: one right, one wrong; spleen: one right, one missed
        ([2, 2, 1, 1], 0.1, [2, 0, 1, 1], (1,)),  # liver: two right
    ):
        image = np.array([found, [surely] * 4], dtype=np.float32).reshape(2, 1, 2, 2)
        case = SimpleNamespace(annotated=annotated)
        patches.append(SimpleNamespace(data=image, label=np.array(label).reshape(1, 1, 2, 2), case=case))

    class Data:
        batch = 2

        def __getitem__(self, index):
            return patches[index[1]]

    hook._data, method = Data(), Painter()
    engine = SimpleNamespace(
        method=method,
        spec=SimpleNamespace(device=torch.device("cpu")),
        stepper=SimpleNamespace(autocast=contextlib.nullcontext),
    )
    numbers = hook._measure(engine, 3)
    liver, spleen = 2 * 3 / (2 * 3 + 1), 2 / 3
    assert numbers["dice_liver"] == pytest.approx(liver) and numbers["dice_spleen"] == pytest.approx(spleen)
    assert numbers["dice"] == pytest.approx((liver + spleen) / 2) and numbers["student_dice"] == 0
    assert numbers["confident"] == 0.5 and hook.trace == [{"epoch": 3, **numbers}]
    assert method.modes == [False] * 4 and method.training, "measured as at inference, then trained on"


@pytest.mark.parametrize("threshold", [0.0, 0.6])
def test_an_epochs_line_has_the_share_above_the_threshold_where_there_is_one(monkeypatch, tmp_path, caplog, threshold):
    hook, engine, _, written = hook_of(monkeypatch, tmp_path, threshold=threshold, volumes_every=2)
    hook.start(engine)
    with caplog.at_level("INFO"):
        for epoch in (1, 2, 3, 4):
            hook.after_epoch(engine, {"epoch": epoch})
    assert written == [2, 4] and "Dice 0.500 with held-out labels (network itself 0.400)" in caplog.text
    assert ("25 % of the voxels above the threshold" in caplog.text) == (threshold > 0)


def test_the_panel_has_the_dice_of_both_networks_and_of_each_class(monkeypatch, tmp_path):
    from matplotlib.figure import Figure

    hook, *_ = hook_of(monkeypatch, tmp_path)
    early = {"dice": 0.1, "student_dice": 0.2}
    hook.trace = [
        {"epoch": 0, **early},
        {"epoch": 1, **early, "dice_liver": 0.3},
        {"epoch": 2, **early, "dice_liver": 0.4, "dice_spleen": 0.6},
    ]
    axis = Figure().subplots()
    hook._draw(axis)
    lines = {line.get_label(): line.get_xydata()[-1].tolist() for line in axis.get_lines()}
    means = {"averaged network, mean": [2, 0.1], "network itself, mean": [2, 0.2]}
    assert lines == {**means, "liver": [2, 0.4], "spleen": [2, 0.6]} and axis.get_ylim() == (0, 1)


def test_a_checkpoint_names_every_class_that_any_case_has_labels_of(
    monkeypatch, tmp_path, tiny_plans, tiny_dataset_json
):
    hook, *_ = hook_of(monkeypatch, tmp_path, train=[(1,), (2,)])
    hook.auxiliary.plan = Plan.from_dicts(tiny_plans(), "3d_fullres", tiny_dataset_json())
    assert hook.checkpoint_info()["heads"] == label_set(tiny_dataset_json(), {"liver", "spleen"})
    hook.auxiliary.cases.train = [LabelledCase("t", annotated=(2,))]
    assert hook.checkpoint_info()["heads"] == label_set(tiny_dataset_json(), {"spleen"})


def test_mean_of_the_classes():
    assert mean_dice({"a": 0.5, "b": 1.0, "c": 0.0}) == 0.5 and mean_dice({}) == 0.0


def test_of_many_held_out_cases_64_are_compared_on_and_those_with_any_label(monkeypatch, tmp_path):
    hook, engine, *_ = hook_of(monkeypatch, tmp_path, held_out=[f"c{i:02d}" for i in range(70)])
    hook.start(engine)
    assert len(set(hook._data)) == len(hook._data) == 64
    hook, engine, *_ = hook_of(monkeypatch, tmp_path, held_out=["a", "b", "empty"])
    shown = {"a": {1: [0], 2: []}, "b": {1: [0], 2: [0]}, "empty": {1: [], 2: []}}
    monkeypatch.setattr(pseudo_metrics, "class_locations", lambda folder, name: shown[name])
    hook.start(engine)
    assert hook._data == ["a", "b"], "one class of two is enough"
    hook, engine, *_ = hook_of(monkeypatch, tmp_path, held_out=["a"], compared=0)
    hook.start(engine)
    assert hook._data is None


def test_the_last_sentence_has_the_first_the_last_and_the_best(monkeypatch, tmp_path):
    hook, engine, _, written = hook_of(monkeypatch, tmp_path)
    engine.step, engine.spec.iterations = 7, 2
    assert hook.finish(engine) is None
    hook.trace = [{"epoch": e, "dice": d} for e, d in enumerate((0.1, 0.5, 0.3))]
    told = "Pseudo-labels agree with held-out labels by Dice 0.300 (0.100 at epoch 0, most 0.500 at epoch 1)."
    assert hook.finish(engine) == told and written == [3, 3]
    again, *_ = hook_of(monkeypatch, tmp_path)
    again.load_state_dict(hook.state_dict())
    assert again.trace == hook.trace and again.trace[0] is not hook.trace[0]


@pytest.mark.parametrize(("volumes", "rank"), [(2, 0), (0, 0), (2, 1)])
def test_volumes_are_written_once_an_epoch_by_one_process(monkeypatch, tmp_path, volumes, rank):
    hook, asked, events = PseudoMetricsHook(OmniConfig(volumes=volumes), "loaders"), [], []
    monkeypatch.setattr(pseudo_metrics, "rank", lambda: rank)
    monkeypatch.setattr(
        pseudo_metrics, "write_volumes", lambda engine, *told: (asked.append(told), [{"case": "a"}, {"case": "b"}])[1]
    )
    log = SimpleNamespace(event=lambda kind, **row: events.append((kind, row)))
    engine = SimpleNamespace(log=log, spec=SimpleNamespace(folder=SimpleNamespace(path=tmp_path)))
    for epoch in (3, 3, 4):
        hook._write(engine, epoch)
    folders = [tmp_path / "pseudo_labels" / f"epoch_000{epoch}" for epoch in (3, 4)]
    due = volumes > 0 and rank == 0
    assert asked == [("loaders", 2, folder) for folder in folders] * due
    assert events == [("volume", {"epoch": e, "case": c}) for e in (3, 4) for c in "ab"] * due


def test_a_share_of_one_voxel_and_of_none():
    one, none = (Counts(["a"], torch.device("cpu")) for _ in range(2))
    one.add_share(torch.tensor(1), 1)
    assert (one.share(), none.share()) == (1.0, 0.0)
