"""What teacher and student see: patches that are moved and changed, half of a batch each, and the processes that make them."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from batchgeneratorsv2.transforms.noise.gaussian_blur import GaussianBlurTransform
from batchgeneratorsv2.transforms.spatial.mirroring import MirrorTransform
from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms

from nnssl.plans.figures import FineTuningConfig
from nnssl.trainers import (
    mean_teacher,
    nnUNetTrainerMeanTeacher,
)
from nnssl.trainers.pool import Halves, shifted, split_transforms, strong_changes, with_strong_changes


def test_the_teacher_sees_what_has_moved_and_the_student_what_has_changed(build, transforms_of):
    trainer = build(nnUNetTrainerMeanTeacher)
    views, targets = split_transforms(transforms_of(trainer), 1.0, "nnunet")
    kinds = {type(t).__name__ for t in views.spatial}
    assert kinds == {"_Shifted", "MirrorTransform"} and len(views.intensity) == 7
    assert [type(t).__name__ for t in targets.transforms] == ["RemoveLabelTransform", "DownsampleSegForDSTransform"]
    patch = tuple(trainer.configuration_manager.patch_size)
    image, changed = torch.rand(1, *patch), 0
    seg = torch.zeros(1, *patch, dtype=torch.int16)
    seg[:, :3] = -1
    values = set(image.unique().tolist())
    for transform in views.spatial:  # nothing but mirroring
        transform.p_rotation = transform.p_scaling = transform.shift = 0
    for _ in range(20):
        out = views(image=image.clone(), segmentation=seg.clone())
        teacher, student = out["image"]
        assert set(teacher.unique().tolist()) == values  # voxels only changed places
        assert set(out["segmentation"].unique().tolist()) == {-1, 0}
        changed += not torch.equal(teacher, student)
    assert changed >= 10  # 1 - .7 ** 4 = 76 % of patches are changed


def test_patches_are_moved_by_up_to_a_share_of_their_size_and_image_and_labels_alike(build):
    patch = build(nnUNetTrainerMeanTeacher).configuration_manager.patch_size
    spatial = SpatialTransform(tuple(patch), 0, False, p_rotation=0, p_scaling=0)
    moving = shifted(ComposeTransforms([spatial]), 0.25)
    wide = [int(1.5 * p) for p in patch]
    middle = torch.zeros(1, *wide)
    middle[(0, *(w // 2 for w in wide))] = 1
    found = []
    for _ in range(200):
        out = moving(image=middle.clone(), segmentation=middle.to(torch.int16))
        assert torch.equal(out["image"].bool(), out["segmentation"].bool())
        found.append(out["image"][0].nonzero()[0].tolist())
    for d, p in enumerate(patch):
        places = [place[d] - p // 2 for place in found]
        assert min(places) < 0 < max(places) and max(map(abs, places)) <= 0.25 * p + 1
    assert shifted(ComposeTransforms([spatial]), 0.0).transforms == [spatial]


def test_strength_makes_the_students_changes_more_likely(build, transforms_of):
    trainer = build(nnUNetTrainerMeanTeacher)
    plain, _ = split_transforms(transforms_of(trainer), 1.0, "nnunet")
    strong, _ = split_transforms(transforms_of(trainer), 2.0, "nnunet")
    noise = strong.intensity[0].transform
    none, _ = split_transforms(transforms_of(trainer), 0.0, "nnunet")
    p = [t.apply_probability for t in plain.intensity]
    assert [t.apply_probability for t in strong.intensity] == pytest.approx([min(1, 2 * x) for x in p])
    assert noise.noise_variance == pytest.approx((0, 0.2)), "nnU-Net's is 0.1"
    assert not any(t.apply_probability for t in none.intensity)


def test_strong_changes_have_the_stated_probabilities_and_sizes():
    torch.manual_seed(0)
    noise, factor, shift, gamma = (c.transform for c in strong_changes(2.0))
    assert [c.apply_probability for c in strong_changes(2.0)] == pytest.approx([0.6] * 4)
    assert [c.apply_probability for c in strong_changes(4.0)] == [1.0] * 4
    zero = torch.zeros(1, 24, 24, 24)
    sizes = [float(noise(image=zero.clone())["image"].std()) for _ in range(200)]
    assert 0.5 < max(sizes) <= 0.62 and np.mean(sizes) == pytest.approx(0.3, abs=0.04)
    factors = [float(factor(image=torch.ones(1, 2, 2, 2))["image"].mean()) for _ in range(200)]
    assert 0.7 <= min(factors) < 0.72 and 1.28 < max(factors) <= 1.3
    shifts = [float(shift(image=torch.zeros(1, 2, 2, 2))["image"].mean()) for _ in range(400)]
    assert np.std(shifts) == pytest.approx(0.17, abs=0.02) and abs(np.mean(shifts)) < 0.04
    x = torch.randn(1, 12, 12, 12)
    made = gamma(image=x.clone())["image"]
    assert float(made.mean()) == pytest.approx(float(x.mean()), abs=1e-4)
    assert float(made.std()) == pytest.approx(float(x.std()), abs=1e-4)
    assert torch.equal(made.flatten().argsort(), x.flatten().argsort()) and not torch.allclose(made, x, atol=1e-2)
    ramp = torch.linspace(0, 1, 65).view(1, 5, 13, 1)
    curve = gamma(image=ramp.clone())["image"].flatten().double()
    quarter, half = (float((curve[i] - curve[0]) / (curve[64] - curve[0])) for i in (16, 32))
    exponent = np.log(half) / np.log(0.5)
    assert quarter == pytest.approx(0.25**exponent, abs=1e-4) and abs(exponent - 1) > 0.02, (
        "u^gamma, not 1 - (1 - u)^gamma"
    )


def test_labelled_patches_change_strongly_too_or_as_nnunets(build, transforms_of):
    def kinds(trainer):
        return [type(getattr(t, "transform", t)).__name__ for t in transforms_of(trainer).transforms]

    changes = [
        "GaussianNoiseTransform",
        "MultiplicativeBrightnessTransform",
        "BrightnessAdditiveTransform",
        "GammaTransform",
    ]
    end = ["MirrorTransform", "RemoveLabelTransform", "DownsampleSegForDSTransform"]
    trainer = build(nnUNetTrainerMeanTeacher)
    trainer.figures = (plan := trainer.figures).with_labels(2)
    assert kinds(trainer) == ["_Shifted", *changes, *end]
    trainer.figures = plan.with_labels(3)
    assert kinds(trainer)[0] == "_Shifted" and len(kinds(trainer)) == 1 + 7 + 3, "labelled patches are nnU-Net's own"
    views, _ = split_transforms(trainer._transforms, 1.0, trainer.figures.intensities)
    assert [type(t.transform).__name__ for t in views.intensity] == changes, "those without labels are not"
    trainer.figures = replace(plan, intensities="nnunet", shift=0.0).with_labels(1)
    assert kinds(trainer)[0] == "SpatialTransform" and len(kinds(trainer)) == 1 + 7 + 3
    assert "SimulateLowResolutionTransform" in kinds(trainer)
    trainer.configuration_manager.configuration["use_mask_for_norm"] = [True]
    trainer.figures = replace(trainer.figures, labelled_intensities="strong")
    assert kinds(trainer) == ["SpatialTransform", *changes, "MirrorTransform", "MaskImageTransform", *end[1:]]
    views, _ = split_transforms(transforms_of(trainer), 4.0, "strong")
    assert [type(t).__name__ for t in views.mask] == ["MaskImageTransform"]
    patch, outside = tuple(trainer.configuration_manager.patch_size), torch.zeros(1, dtype=torch.int16)
    out = views(image=torch.rand(1, *patch) + 1, segmentation=outside.expand(1, *patch).clone() - 1)
    assert not out["image"].any(), "outside of the non-zero image both views stay 0"


def test_the_student_sees_strong_changes_by_default(build, transforms_of):
    trainer = build(nnUNetTrainerMeanTeacher)
    views, _ = split_transforms(transforms_of(trainer), 2.0, trainer.figures.intensities)
    kinds = [type(t.transform).__name__ for t in views.intensity]
    assert kinds == [type(t.transform).__name__ for t in strong_changes(2.0)]
    image = torch.randn(1, *trainer.configuration_manager.patch_size)
    seg = torch.zeros(1, *image.shape[1:], dtype=torch.int16)
    out = [views(image=image.clone(), segmentation=seg.clone())["image"] for _ in range(30)]
    assert sum(not torch.equal(*views_of) for views_of in out) >= 25  # 1 - 0.4^4 = 97 %


@pytest.mark.parametrize(("batch", "labelled", "others"), [(1, 1, 1), (2, 1, 1), (3, 2, 1), (4, 2, 2), (7, 4, 3)])
def test_half_a_batch_is_labelled(batch, labelled, others):
    kind, trainer = nnUNetTrainerMeanTeacher, SimpleNamespace(batch_size=batch)
    assert (kind.labelled_share.fget(trainer), kind.unlabelled_share.fget(trainer)) == (labelled, others)


def test_halves_use_up_a_labelled_batch_over_several_steps():
    batches = iter(
        {
            "data": torch.arange(3.0).view(3, 1) + 3 * i,
            "target": [torch.ones(3, 1) * i, torch.zeros(3, 2)],
            "keys": list("abc"),
        }
        for i in range(2)
    )
    other = iter([{"data": torch.zeros(1, 2), "target": torch.zeros(1, 1)}] * 3)
    halves = Halves(batches, other, 2)
    found = [next(halves) for _ in range(3)]
    assert [b["data"].flatten().tolist() for b in found] == [[0, 1], [2, 3], [4, 5]]
    assert [b["target"][0].flatten().tolist() for b in found] == [[0, 0], [0, 1], [1, 1]]
    assert found[1]["keys"] == ["c", "a"] and found[0]["target"][1].shape == (2, 2)
    assert set(found[0]) == {"data", "target", "keys", "views", "outside"}


def test_each_channel_changes_by_itself():
    """Noise, factor, shift and gamma of two channels that are alike are two."""
    torch.manual_seed(0)
    x = torch.linspace(0.1, 1, 60).view(1, 3, 4, 5).repeat(2, 1, 1, 1)
    for change in strong_changes(4.0):
        apart = [not torch.equal(*change(image=x.clone())["image"]) for _ in range(5)]
        assert all(apart), change.transform
    noise = strong_changes(4.0)[0]
    sizes = [noise(image=torch.zeros(2, 24, 24, 24))["image"].flatten(1).std(1) for _ in range(5)]
    assert max(abs(float(a / b) - 1) for a, b in sizes) > 0.2, "its size, too, is each channel's own"


@pytest.mark.parametrize(
    ("intensities", "first", "count"), [("nnunet", "GaussianNoise", 7), ("strong", "GaussianNoise", 4)]
)
def test_the_students_changes_are_nnunets_or_strong_ones(build, intensities, first, count, transforms_of):
    """Cut from nnU-Net's own augmentation: its seven, blur and low resolution among them, or four others in their place."""
    trainer = build(nnUNetTrainerMeanTeacher)
    trainer.figures = replace(trainer.figures, intensities="nnunet", shift=0.0)
    views, _ = split_transforms(transforms_of(trainer), 2.0, intensities)
    kinds = [type(t.transform).__name__ for t in views.intensity]
    assert len(kinds) == count and kinds[0].startswith(first)
    assert ("GaussianBlurTransform" in kinds) is (intensities == "nnunet")
    assert views.intensity[0].transform.noise_variance == pytest.approx((0, 0.2 if intensities == "nnunet" else 0.6))


@pytest.mark.parametrize("count", [0, 1, 2])
def test_strong_changes_come_where_the_first_change_of_intensities_was(count):
    """Before mirroring and all that follows, however many there were."""
    mirror = MirrorTransform((0, 1, 2))
    made = with_strong_changes(ComposeTransforms([*(GaussianBlurTransform() for _ in range(count)), mirror]))
    assert len(made.transforms) == 5 and made.transforms[-1] is mirror


@pytest.mark.parametrize(("allowed", "processes", "cached"), [(0, 0, 0), (1, 1, 3), (5, 2, 3), (12, 6, 3), (16, 8, 4)])
def test_the_pool_gets_half_of_the_processes(build, monkeypatch, allowed, processes, cached, transforms_of):
    """Each with its own seed, and as many batches waiting as nnU-Net's validation has."""
    trainer, told = build(nnUNetTrainerMeanTeacher), []
    trainer.figures, trainer.batch_size = FineTuningConfig(strength=1.0), 2
    trainer.pool = type("Pool", (), {"cases": []})()
    transforms_of(trainer)
    made = SimpleNamespace()
    monkeypatch.setattr(mean_teacher, "nnUNetDataLoader", lambda *a, **how: made.__dict__.update(how) or made)
    monkeypatch.setattr(mean_teacher, "get_allowed_n_proc_DA", lambda: allowed)
    monkeypatch.setattr(mean_teacher, "SingleThreadedAugmenter", lambda loader, _: told.append((0, 0, 0)))
    monkeypatch.setattr(
        mean_teacher,
        "NonDetMultiThreadedAugmenter",
        lambda loader, _, n, num_cached, seeds, **how: told.append((n, num_cached, len(set(seeds)), how)),
    )
    trainer._load_pool()
    assert made.oversample_foreground_percent == 0 and made.has_ignore is False, "patches anywhere, none around a class"
    as_nnunets = {"pin_memory": False, "wait_time": 0.002}
    assert told == [(processes, cached, processes, as_nnunets)] if allowed else told == [(0, 0, 0)]
