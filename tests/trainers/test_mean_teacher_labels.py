"""Pseudo-labels of every kind of labels, their largest components, and what is measured of them."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from nnssl.teacher.components import foreground_classes
from nnssl.trainers import (
    nnUNetTrainerMeanTeacher,
)
from nnssl.trainers.pool import split_transforms
from nnssl.trainers.pseudo_label_trace import draw_trace


@pytest.fixture
def second_stage(transforms_of):
    """``second_stage(trainer)``: a trainer at the start of its second stage, without loaders."""

    def make(trainer):
        trainer.initialize()
        trainer.figures = trainer.figures.with_labels(1)
        _, trainer._targets = split_transforms(transforms_of(trainer), 1.0, "nnunet")
        trainer._make_teacher()
        return trainer

    return make


def a_batch(trainer, labels):
    patch = trainer.configuration_manager.patch_size
    channels = trainer.num_input_channels
    outside = torch.zeros(1, 1, *patch, dtype=torch.int16)
    outside[:, :, :2] = -1
    return {
        "data": torch.randn(1, channels, *patch),
        "target": trainer.targets_of(labels.to(torch.int16)),
        "views": torch.randn(1, 2 * channels, *patch),
        "outside": outside,
    }


KINDS = {
    "classes": ({"background": 0, "liver": 1, "spleen": 2}, None),
    "regions": ({"background": 0, "whole": [1, 2], "spleen": 2}, [1, 2]),
    "ignore": ({"background": 0, "liver": 1, "spleen": 2, "ignore": 3}, None),
    "regions with ignore": ({"background": 0, "whole": [1, 2], "spleen": 2, "ignore": 3}, [1, 2]),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("configuration", ["3d_fullres", "2d"])
def test_every_kind_of_labels_channels_and_dimensions(
    kind, channels, configuration, tiny_plans, tiny_dataset_json, nnunet_env, second_stage
):
    labels, order = KINDS[kind]
    info = {**tiny_dataset_json(channels), "labels": labels, **({"regions_class_order": order} if order else {})}
    plans = tiny_plans(3, channels=channels, both=True, features=(4, 6, 8), patch=(16, 16, 16))
    for config in plans["configurations"].values():
        config["batch_dice"] = configuration == "2d"
    plans["nnssl"] = {"epochs": 2, "iterations": 1}
    plans["continue_training"] = False
    (nnunet_env.preprocessed / plans["dataset_name"] / plans["configurations"][configuration]["data_identifier"]).mkdir(
        parents=True
    )
    (
        nnunet_env.preprocessed
        / plans["dataset_name"]
        / plans["configurations"][configuration]["data_identifier"]
        / "a.b2nd"
    ).touch()
    trainer = second_stage(nnUNetTrainerMeanTeacher(plans, configuration, 0, info, torch.device("cpu")))
    patch = trainer.configuration_manager.patch_size
    label = torch.zeros(1, 1, *patch, dtype=torch.int64)
    label[..., 2:6], label[..., 8:10] = 1, 2
    if "ignore" in kind:
        label[..., 12:] = 3
    batch = a_batch(trainer, label)
    trainer._largest = foreground_classes(trainer.label_manager)
    made = trainer.pseudo_labels(batch["views"][:, :channels], batch["outside"])
    assert made.dtype == torch.int16 and set(made.unique().tolist()) <= {0, 1, 2} and not made[:, :, :2].any()
    targets = trainer.targets_of(made)
    assert [t.shape for t in targets] == [t.shape for t in batch["target"]] and targets[0].dtype == batch["target"][
        0
    ].dtype
    loss = trainer.train_step(batch)["loss"]
    assert np.isfinite(loss) and trainer._followed == 1
    with torch.no_grad():  # half of each: nnU-Net's loss on the labels, and against the teacher's
        trainer._make_teacher()
        made = trainer.pseudo_labels(batch["views"][:, :channels], batch["outside"])
        mixed = trainer.batch_loss(batch)
        parts = [trainer.loss(trainer.network(batch["data"]), batch["target"]),
                 trainer.loss(trainer.network(batch["views"][:, channels:]), trainer.targets_of(made))]  # fmt: skip
    assert float(mixed) == pytest.approx(float(sum(parts)) / 2, abs=1e-5)


def test_an_empty_pseudo_label_has_a_finite_loss(few, build, second_stage):
    trainer = second_stage(build(nnUNetTrainerMeanTeacher, few()))
    patch = trainer.configuration_manager.patch_size
    batch = a_batch(trainer, torch.ones(1, 1, *patch, dtype=torch.int64))
    batch["outside"].fill_(-1)
    assert np.isfinite(trainer.train_step(batch)["loss"])


def test_classes_that_are_one_piece_are_found_in_the_labelled_cases(few, build, monkeypatch):
    trainer = build(nnUNetTrainerMeanTeacher, few())
    trainer.initialize()
    whole, split = np.zeros((1, 16, 16, 16), np.int16), np.zeros((1, 16, 16, 16), np.int16)
    whole[0, 3:8, 3:8, 3:8] = split[0, 3:8, 3:8, 3:8] = 1
    whole[0, 10:14, 3:8, 3:8] = split[0, 10:12, 3:8, 3:8] = split[0, 13:15, 3:8, 3:8] = 2
    maps = {"a": whole, "b": split}

    class Labels:
        def __init__(self, folder, cases):
            self.identifiers = cases

        def load_case(self, case):
            return None, maps[case], None, {}

    monkeypatch.setattr(trainer, "dataset_class", Labels)
    assert trainer._one_piece_classes(["a"]) == [1, 2] and trainer._one_piece_classes(["a", "b"]) == [1]
    for choice, want in (("never", []), ("always", [1, 2])):
        object.__setattr__(trainer.figures, "largest", choice)
        assert trainer._one_piece_classes(["a", "b"]) == want


@pytest.mark.parametrize(
    ("choice", "told"),
    [
        ("auto", "liver, spleen (all labelled cases show it as one piece)"),
        ("always", "liver, spleen (as the plan asks)"),
        ("never", "none"),
    ],
)
def test_the_log_says_why_the_largest_component_is_kept(few, build, choice, told):
    trainer = build(nnUNetTrainerMeanTeacher, few())
    trainer.initialize()
    trainer.before_loading()
    object.__setattr__(trainer.figures, "largest", choice)
    trainer._largest = [] if choice == "never" else [1, 2]
    assert f"  largest component kept of: {told}\n" in trainer._introduction(1)


@pytest.mark.parametrize(("ignore", "shown"), [(None, 4), (3, 3)])
def test_sums_of_an_epoch_by_hand(ignore, shown):
    """Teacher 0 1 2 2, student 0 1 1 2: two of three voxels alike; the labels 1 2 3 1 0 0, with 3 ignored or a class."""
    manager = SimpleNamespace(ignore_label=ignore, has_regions=False)
    trainer = SimpleNamespace(_order=lambda: None, label_manager=manager, _sums=None)
    made, own = (torch.tensor(v).view(1, 1, 4, 1) for v in ([0, 1, 2, 2], [0, 1, 1, 2]))
    logits = torch.cat([(own == k).float() for k in range(3)], 1)
    target = torch.tensor([1, 2, 3, 1, 0, 0]).view(1, 1, 6, 1)
    for times in (1, 2):
        nnUNetTrainerMeanTeacher._measure(trainer, made, logits, target)
        assert trainer._sums.tolist() == [times * n for n in (2 * 2, 3 + 3, 3, shown, 4, 6)]
    regions = SimpleNamespace(ignore_label=3, has_regions=True, foreground_regions=[(1, 2), (2,)])
    trainer = SimpleNamespace(_order=lambda: [1, 2], label_manager=regions, _sums=None)
    masks = torch.tensor([[1, 0], [1, 1], [0, 0]]).T.reshape(1, 2, 3, 1)  # and last what is ignored
    target = torch.cat([masks, torch.ones(1, 1, 3, 1, dtype=torch.long)], 1)
    nnUNetTrainerMeanTeacher._measure(trainer, made, 2 * logits[:, 1:] - 1, target)
    assert trainer._sums.tolist() == [2 * 2, 3 + 3, 3, 2, 4, 3]


def test_the_panel_hides_no_curve_and_counts_epochs():

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    trace = [{"epoch": e, "agreement": 0.9, "foreground": 0.05, "labelled_foreground": 0.04} for e in (1, 2)]
    figure = Figure(figsize=(30, 12))
    ax = figure.subplots()
    draw_trace(trace, ax)
    FigureCanvasAgg(figure).draw()
    left, right = figure.axes
    assert all(tick == round(tick) for tick in left.get_xticks())
    frame = left.get_window_extent()
    legends = [axis.get_legend().get_window_extent() for axis in (left, right)]
    assert all(box.y0 >= frame.y1 - 1 for box in legends) and not legends[0].overlaps(legends[1])


def test_several_patches_get_a_pseudo_label_each(build):
    """One by one as together, and background outside of the image."""
    trainer = build(nnUNetTrainerMeanTeacher)
    trainer.initialize()
    trainer._make_teacher()
    seen, outside = torch.randn(3, 1, 16, 16, 16), torch.zeros(3, 1, 16, 16, 16)
    outside[1, :, :4] = -1
    made = trainer.pseudo_labels(seen, outside)
    each = torch.cat([trainer.pseudo_labels(seen[i : i + 1], outside[i : i + 1]) for i in range(3)])
    assert made.shape == (3, 1, 16, 16, 16) and float((made == each).float().mean()) > 0.999
    assert not made[1, :, :4].any() and made[0].any() and not torch.equal(made[0], made[2])


@pytest.mark.parametrize("weight", [0.0, 0.25, 0.5])
def test_patches_without_labels_have_their_share_of_the_loss(build, few, second_stage, weight):
    trainer = second_stage(build(nnUNetTrainerMeanTeacher, few(figures={"weight": weight}, schedule="mean-teacher")))
    losses = iter((1.0, 3.0))  # of the labelled patch, of the other
    trainer.loss = lambda outputs, target: torch.as_tensor(next(losses))
    batch = a_batch(trainer, torch.zeros(1, 1, *trainer.configuration_manager.patch_size))
    assert float(trainer.batch_loss(batch)) == pytest.approx(1 + 2 * weight)
