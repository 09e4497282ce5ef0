"""The mean teacher as a trainer: which images it takes, what the teacher sees, the two stages, files, and what it tells."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms

from nnssl import checkpoint
from nnssl.errors import NnsslError
from nnssl.networks import canonical_state_dict
from nnssl.plans import load_plan
from nnssl.plans.figures import FineTuningConfig
from nnssl.plans.unlabelled import case_key_hash, find_unlabelled, prepared_folder
from nnssl.teacher.averaging import averaging_momentum
from nnssl.teacher.components import foreground_classes
from nnssl.trainers import (
    nnUNetTrainerMeanTeacher,
    nnUNetTrainerPretrained,
    nnUNetTrainerPretrainedMeanTeacher,
    nnUNetTrainerPretrainedScratch,
)
from nnssl.trainers.mean_teacher import TEACHER
from nnssl.trainers.pool import Halves, UnlabelledDataset, shifted, split_transforms, strong_changes
from nnssl.trainers.pseudo_label_trace import draw_trace
from nnssl.weights import write_variant

OWN = "Dataset901_Tiny"


def cases_of(dataset):
    return sorted(p.stem for p in (dataset / "nnUNetPlans_3d_fullres").glob("*.pkl"))


@pytest.fixture
def few(dataset):
    """``few(name="few", labels=1, **told)``: a few-label variant; returns the plans' name."""

    def make(name="few", labels=1, fold="0", **told):
        write_variant(load_plan(901), name, labels=labels, **told)
        return f"nnUNetPlans_{name}"

    return make


# --------------------------------------------------------------------------------------------- the pool


def test_the_pool_of_a_few_label_variant_is_what_it_leaves_out(dataset):
    plan, cases = load_plan(901), cases_of(dataset)
    pool = find_unlabelled(plan, cases[:1], cases[4:], rest=cases[1:4])
    assert [c.name for c in pool.cases] == cases[1:4]
    assert "3 images without labels" in str(pool) and "whose labels the plans leave out" in str(pool)


def test_validation_cases_labelled_cases_and_test_images_are_held_back(dataset):
    plan, cases = load_plan(901), cases_of(dataset)
    seen = {"sources": [OWN]}
    pool = find_unlabelled(plan, cases[:1], cases[4:], pretrained_on=seen)
    assert [c.name for c in pool.cases] == cases[1:4]
    assert pool.held_back == {"labelled training cases": 1, "validation cases": 1, "test images of the dataset": 0}
    (dataset / "nnssl_leaks_d901.txt").write_text(f"{OWN}/{cases[2]}\n")
    assert [c.name for c in find_unlabelled(plan, cases[:1], cases[4:], pretrained_on=seen).cases] == [
        cases[1],
        cases[3],
    ]
    plan.plans["nnssl"]["transductive"] = True
    assert [c.name for c in find_unlabelled(plan, cases[:1], cases[4:], pretrained_on=seen).cases] == cases[1:]


def test_of_a_pretraining_only_the_cases_it_saw(dataset):
    plan, cases = load_plan(901), cases_of(dataset)
    seen = {"sources": [OWN], "case_hashes": [case_key_hash(f"{OWN}/{cases[3]}")]}
    assert [c.name for c in find_unlabelled(plan, cases[:1], [], pretrained_on=seen).cases] == [cases[3]]


def test_named_datasets_come_before_everything_else(dataset):
    plan, cases = load_plan(901), cases_of(dataset)
    plan.plans["nnssl"]["unlabelled"] = ["Dataset900_Pool"]
    with pytest.raises(NnsslError, match="Dataset900_Pool.*is not preprocessed.*nnssl_pretrain -d 900 -t 901"):
        find_unlabelled(plan, cases[:1], [], rest=cases[1:])
    folder = prepared_folder(plan, "Dataset900_Pool")
    folder.mkdir(parents=True)
    shutil.copy(dataset / "nnUNetPlans_3d_fullres" / f"{cases[0]}.b2nd", folder / "x.b2nd")
    pool = find_unlabelled(plan, cases[:1], [], rest=cases[1:])
    assert [c.key for c in pool.cases] == ["Dataset900_Pool/x"]
    data, seg, previous, properties = UnlabelledDataset(pool.cases).load_case("Dataset900_Pool/x")
    assert (
        seg.shape == (1, *data.shape[1:]) and not seg.any() and previous is None and properties["class_locations"] == {}
    )


def test_no_image_is_an_error_that_says_what_to_type(dataset, build, start):
    with pytest.raises(NnsslError, match="no images without labels.*nnssl_plan -d 901.*--unlabelled DATASET"):
        start(build(nnUNetTrainerMeanTeacher))


def test_from_random_weights_it_is_not_called_the_control(few, build, start):
    from nnssl.trainers import nnUNetTrainerPretrainedScratch

    plans = few()
    own, control = (start(build(cls, plans)) for cls in (nnUNetTrainerMeanTeacher, nnUNetTrainerPretrainedScratch))
    assert "nnssl: random weights. " in Path(own.log_file).read_text()
    assert "nnssl: random weights (the control without pretraining). " in Path(control.log_file).read_text()


def test_plans_name_the_pool(dataset):
    path = write_variant(load_plan(901), "pool", schedule="mean-teacher", unlabelled=[901], transductive=True)
    told = json.loads(path.read_text())["nnssl"]
    assert (told["schedule"], told["unlabelled"], told["transductive"]) == ("mean_teacher", [OWN], True)
    with pytest.raises(NnsslError, match="for the schedule mean-teacher, not sawtooth"):
        write_variant(load_plan(901), "other", schedule="sawtooth", unlabelled=[901])


@pytest.mark.parametrize("asked", [{"unlabelled": [901]}, {"transductive": True}])
def test_a_plan_that_names_the_pool_has_the_schedule_that_learns_from_it(dataset, asked):
    """Otherwise it would be trained by a trainer without a pool, and its control would follow another schedule."""
    path = write_variant(load_plan(901), "pool", **asked)
    assert json.loads(path.read_text())["nnssl"]["schedule"] == "mean_teacher"
    write_variant(load_plan(901), "saw", schedule="sawtooth")
    with pytest.raises(NnsslError, match="for the schedule mean-teacher, not sawtooth"):
        write_variant(load_plan(901, plans_name="nnUNetPlans_saw"), "pool", **asked)


# --------------------------------------------------------------------------------------------- what is seen


def transforms_of(trainer):
    rotation, dummy, _, mirror = trainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
    manager, config = trainer.label_manager, trainer.configuration_manager
    return trainer.get_training_transforms(
        config.patch_size, rotation, trainer._get_deep_supervision_scales(), mirror, dummy,
        use_mask_for_norm=config.use_mask_for_norm, foreground_labels=manager.foreground_labels,
        regions=manager.foreground_regions if manager.has_regions else None, ignore_label=manager.ignore_label,
    )  # fmt: skip


def test_the_teacher_sees_what_has_moved_and_the_student_what_has_changed(build):
    trainer = build(nnUNetTrainerMeanTeacher)
    views, targets = split_transforms(transforms_of(trainer))
    kinds = {type(t).__name__ for t in views.spatial}
    assert kinds == {"_Shifted", "MirrorTransform"} and len(views.intensity) == 4
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


def test_strength_makes_the_students_changes_more_likely(build):
    trainer = build(nnUNetTrainerMeanTeacher)
    plain, _ = split_transforms(transforms_of(trainer))
    strong, _ = split_transforms(transforms_of(trainer), 2.0)
    none, _ = split_transforms(transforms_of(trainer), 0.0)
    p = [t.apply_probability for t in plain.intensity]
    assert [t.apply_probability for t in strong.intensity] == pytest.approx([min(1, 2 * x) for x in p])
    assert strong.intensity[0].transform.noise_variance == pytest.approx((0, 0.6))
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


def test_labelled_patches_change_strongly_too_or_as_nnunets(build):
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
    assert kinds(trainer) == ["_Shifted", *changes, *end]
    trainer.figures = replace(trainer.figures, intensities="nnunet", shift=0.0)
    assert kinds(trainer)[0] == "SpatialTransform" and len(kinds(trainer)) == 1 + 7 + 3
    assert "SimulateLowResolutionTransform" in kinds(trainer)
    trainer.configuration_manager.configuration["use_mask_for_norm"] = [True]
    trainer.figures = replace(trainer.figures, intensities="strong")
    assert kinds(trainer) == ["SpatialTransform", *changes, "MirrorTransform", "MaskImageTransform", *end[1:]]
    views, _ = split_transforms(transforms_of(trainer), 4.0, "strong")
    assert [type(t).__name__ for t in views.mask] == ["MaskImageTransform"]
    patch, outside = tuple(trainer.configuration_manager.patch_size), torch.zeros(1, dtype=torch.int16)
    out = views(image=torch.rand(1, *patch) + 1, segmentation=outside.expand(1, *patch).clone() - 1)
    assert not out["image"].any(), "outside of the non-zero image both views stay 0"


@pytest.mark.parametrize(("batch", "labelled", "others"), [(1, 1, 1), (2, 1, 1), (3, 2, 1), (4, 2, 2), (7, 4, 3)])
def test_half_a_batch_is_labelled(batch, labelled, others):
    kind, trainer = nnUNetTrainerMeanTeacher, SimpleNamespace(batch_size=batch)
    assert (kind.labelled_share.fget(trainer), kind.unlabelled_share.fget(trainer)) == (labelled, others)


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


def test_the_student_sees_strong_changes_by_default(build):
    trainer = build(nnUNetTrainerMeanTeacher)
    views, _ = split_transforms(transforms_of(trainer), trainer.figures.strength_for(1), trainer.figures.intensities)
    kinds = [type(t.transform).__name__ for t in views.intensity]
    assert kinds == [type(t.transform).__name__ for t in strong_changes(2.0)]
    image = torch.randn(1, *trainer.configuration_manager.patch_size)
    seg = torch.zeros(1, *image.shape[1:], dtype=torch.int16)
    out = [views(image=image.clone(), segmentation=seg.clone())["image"] for _ in range(30)]
    assert sum(not torch.equal(*views_of) for views_of in out) >= 25  # 1 - 0.4^4 = 97 %


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


# --------------------------------------------------------------------------------------------- training


def run_epoch(trainer, whole=True):
    trainer.on_epoch_start()
    trainer.on_train_epoch_start()
    outputs = [trainer.train_step(next(trainer.dataloader_train)) for _ in range(trainer.num_iterations_per_epoch)]
    trainer.on_train_epoch_end(outputs)
    if whole:
        with torch.no_grad():
            trainer.on_validation_epoch_start()
            trainer.on_validation_epoch_end([trainer.validation_step(next(trainer.dataloader_val))])
        trainer.on_epoch_end()
    else:
        trainer.current_epoch += 1
    return outputs


def state(module):
    return {k: v.clone() for k, v in canonical_state_dict(module).items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def started(build, plans, cls=nnUNetTrainerMeanTeacher):
    trainer = build(cls, plans)
    trainer.on_train_start()
    return trainer


def test_two_stages(few, build):
    trainer = started(build, few(schedule="mean-teacher", epochs=3, iterations=3))
    assert (trainer.first_epochs, trainer.figures.optimizer, trainer.initial_lr) == (1, "adam", 2e-3)
    assert len(trainer.pool.cases) == 3  # fold 0: four training cases, one labelled, one case validates
    run_epoch(trainer)
    assert trainer.teacher is None and not trainer.trace
    learnt = state(trainer.network)
    old = next(iter(trainer.optimizer.state.values()))["step"]
    trainer.on_train_epoch_start()  # of epoch 1: the teacher is a copy, the optimiser forgets
    assert same(state(trainer.teacher.module), learnt) and old == 3 and not trainer.optimizer.state
    assert trainer.teacher.module.decoder.deep_supervision is False and trainer.network.decoder.deep_supervision is True
    assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(2e-3)  # six steps, of which less than one warms up
    expected = {k: v.double() for k, v in learnt.items()}
    for step in range(3):
        batch = next(trainer.dataloader_train)
        assert batch["data"].shape[0] == 1 and batch["views"].shape[:2] == (1, 2)
        assert np.isfinite(trainer.train_step(batch)["loss"])
        m = averaging_momentum(step)
        expected = {k: m * v + (1 - m) * state(trainer.network)[k].double() for k, v in expected.items()}
    got = state(trainer.teacher.module)
    assert all(torch.allclose(got[k].double(), v, atol=1e-6) for k, v in expected.items())
    assert not same(got, state(trainer.network))
    assert trainer.teacher.training is False and not any(p.requires_grad for p in trainer.teacher.parameters())


def test_labels_beside_the_pool_are_never_learnt_from(few, build, monkeypatch):
    """Another label map beside each image of the pool changes nothing."""
    plans = few(schedule="mean-teacher", epochs=2, iterations=2)
    losses = []
    for value in (None, 2):
        trainer = started(build, plans)
        if value is not None:
            load = UnlabelledDataset.load_case

            def other(self, key, load=load, value=value):
                data, seg, previous, properties = load(self, key)
                return data, np.where(np.asarray(seg[:]) < 0, -1, value).astype(np.int16), previous, properties

            monkeypatch.setattr(UnlabelledDataset, "load_case", other)
        trainer.current_epoch = 1
        trainer.on_train_epoch_start()
        np.random.seed(3)
        torch.manual_seed(3)
        losses.append([next(trainer.dataloader_unlabelled)["target"].sum().item() for _ in range(4)])
    assert losses[0] == losses[1]


def test_a_continued_training_keeps_teacher_stage_and_step(few, build, dataset):
    plans = few(schedule="mean-teacher", epochs=4, iterations=2)
    trainer = started(build, plans)
    for _ in range(3):
        run_epoch(trainer)
    file = f"{trainer.output_folder}/checkpoint_latest.pth"
    trainer.save_checkpoint(file)
    content = checkpoint.load(file).content  # read without running code
    assert content["trainer_name"] == "nnUNetTrainer" and content[TEACHER]["followed"] == 4
    again = build(nnUNetTrainerMeanTeacher, plans, resume=True)
    again.load_checkpoint(file)
    assert same(state(again.teacher.module), state(trainer.teacher.module)) and again._followed == 4
    assert again.trace == trainer.trace and [r["epoch"] for r in again.trace] == [1, 2]
    again.on_train_start()
    before, steps = state(again.teacher.module), again.optimizer.state_dict()["state"][0]["step"]
    again.on_train_epoch_start()
    assert same(state(again.teacher.module), before) and int(steps) == 4  # neither starts again
    again.train_step(next(again.dataloader_train))
    m = averaging_momentum(4)
    new, net = state(again.teacher.module), state(again.network)
    assert all(torch.allclose(new[k], m * before[k] + (1 - m) * net[k], atol=1e-6) for k in new)


def test_without_the_teacher_of_a_continued_training_it_starts_again_and_says_so(few, build):
    plans = few(schedule="mean-teacher", epochs=4, iterations=2)
    trainer = started(build, plans)
    for _ in range(3):
        run_epoch(trainer)
    content = {TEACHER: {k: v for k, v in trainer.extra_content(False)[TEACHER].items() if k != "teacher"}}
    again = started(build, plans)
    again.current_epoch = 3
    again.take_extra_content(content)
    again.optimizer.state["kept"] = {}
    again.on_train_epoch_start()
    assert "WARNING: the checkpoint held no teacher; it starts again as the network" in Path(again.log_file).read_text()
    assert "kept" in again.optimizer.state and same(state(again.teacher.module), state(again.network))


def test_a_continued_training_keeps_the_changes_that_it_began_with(few, build):
    """Of a version whose patches were changed by nnU-Net and not moved, and whose checkpoints do not name these figures."""
    plans = few(schedule="mean-teacher", epochs=4, iterations=2)
    trainer = started(build, plans)
    file = f"{trainer.output_folder}/checkpoint_latest.pth"
    trainer.save_checkpoint(file)
    again = build(nnUNetTrainerMeanTeacher, plans, resume=True)
    again.load_checkpoint(file)
    assert again.figures == trainer.figures and "began with" not in Path(again.log_file).read_text()
    content = checkpoint.load(file).content
    begun = content["nnssl_finetuning"]
    begun.update(strength=1.0, momentum=0.9)
    del begun["intensities"], begun["shift"]
    checkpoint.save(file, content)
    older = build(nnUNetTrainerMeanTeacher, plans, resume=True)
    older.load_checkpoint(file)
    wanted = replace(trainer.figures, intensities="nnunet", shift=0.0, strength=1.0, momentum=0.9)
    assert older.figures == wanted and type(transforms_of(older).transforms[0]) is SpatialTransform
    text = Path(older.log_file).read_text()
    assert (
        "keeps what it began with" in text
        and "intensities nnunet (now strong), strength 1.0 (now 2.0), shift 0.0" in text
    )
    assert "WARNING: the plan has changed" not in text


@pytest.mark.parametrize("labels, strength", [(1, 2.0), (3, 1.0)])
def test_strength_goes_by_the_labelled_cases_and_stays(few, build, labels, strength):
    """A checkpoint of a version with strength 2 for all goes on with it."""
    plans = few(schedule="mean-teacher", epochs=4, iterations=2, labels=labels)
    trainer = started(build, plans)
    assert trainer.figures.strength == strength and trainer.provenance["labelled_cases"] == labels
    assert f"strong changes, strength {strength:g}" in Path(trainer.log_file).read_text()
    file = f"{trainer.output_folder}/checkpoint_latest.pth"
    trainer.save_checkpoint(file)
    content = checkpoint.load(file).content
    del content["nnssl_finetuning"]["labelled_cases"]
    content["nnssl_finetuning"]["strength"] = 2.0
    checkpoint.save(file, content)
    older = build(nnUNetTrainerMeanTeacher, plans, resume=True)
    older.load_checkpoint(file)
    assert older.figures.strength == 2.0
    assert ("strength 2.0 (now 1.0)" in Path(older.log_file).read_text()) is (strength == 1.0)


def test_a_plan_that_was_changed_after_the_start_is_told(few, build):
    trainer = started(build, few(schedule="mean-teacher", epochs=4, iterations=2))
    trainer.save_checkpoint(f"{trainer.output_folder}/checkpoint_latest.pth")
    changed = build(
        nnUNetTrainerMeanTeacher, few("other", schedule="mean-teacher", epochs=4, iterations=2, figures={"shift": 0.2})
    )
    changed.load_checkpoint(f"{trainer.output_folder}/checkpoint_latest.pth")
    assert changed.figures.shift == 0.2
    assert (
        "WARNING: the plan has changed since this training began: shift 0.1 -> 0.2"
        in Path(changed.log_file).read_text()
    )


def test_the_final_file_has_no_teacher_and_predicts_as_stock(few, build, tmp_path):
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    trainer = started(build, few(schedule="mean-teacher", epochs=2, iterations=1))
    run_epoch(trainer)
    run_epoch(trainer)
    trainer.on_train_end()
    content = checkpoint.load(f"{trainer.output_folder}/checkpoint_final.pth").content
    assert "teacher" not in content[TEACHER] and content[TEACHER]["followed"] == 1
    predictor = nnUNetPredictor(device=torch.device("cpu"), perform_everything_on_device=False, allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(trainer.output_folder_base, (0,), "checkpoint_final.pth")
    assert type(predictor.network).__name__ == "PlainConvUNet"


def test_log_and_picture_tell_of_the_pool(few, build):
    trainer = started(build, few(schedule="mean-teacher", epochs=2, iterations=2))
    run_epoch(trainer)
    run_epoch(trainer)
    (row,) = trainer.trace
    assert 0 <= row["agreement"] <= 1 and 0 <= row["foreground"] <= 1 and 0 < row["labelled_foreground"] < 1
    text = Path(trainer.log_file).read_text()
    assert "3 images without labels" in text and "teacher and student agree on the pool by Dice" in text
    assert "stage 2 begins" in text


def test_a_collapse_is_named(few, build):
    trainer = started(build, few(schedule="mean-teacher", epochs=2, iterations=1))
    trainer.current_epoch = 1
    trainer.on_train_epoch_start()
    trainer._sums = torch.tensor([0, 10, 1, 100, 1000, 1000], dtype=torch.float64)
    trainer.on_train_epoch_end([{"loss": np.array(1.0)}])
    assert "pseudo-labels have collapsed" in Path(trainer.log_file).read_text()


def test_from_pretrained_weights_the_pool_is_what_they_saw(dataset, pretraining, build):
    file = pretraining()
    payload = checkpoint.load(file).content
    seen = [case_key_hash(f"{OWN}/{c}") for c in cases_of(dataset)]
    payload["nnssl"]["data"] = {"sources": [OWN], "case_hashes": seen}
    checkpoint.save(file, payload)
    with pytest.raises(
        NnsslError, match="no images without labels.*labelled training cases"
    ):  # fold 0 trains on all the others
        started(build, "nnUNetPlans", nnUNetTrainerPretrainedMeanTeacher)
    write_variant(load_plan(901), "mt", labels=2, schedule="mean-teacher", epochs=2, iterations=1)
    trainer = started(build, "nnUNetPlans_mt", nnUNetTrainerPretrainedMeanTeacher)
    assert len(trainer.pool.cases) == 2 and trainer.provenance["weights"] == "pretrained"
    assert trainer.extra_content(final=False)[TEACHER]["pretrained_on"]["sources"] == [OWN]


# --------------------------------------------------------------------------------------------- kinds of labels


def second_stage(trainer):
    """A trainer at the start of its second stage, without loaders."""
    trainer.initialize()
    _, trainer._targets = split_transforms(transforms_of(trainer))
    trainer._make_teacher()
    return trainer


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
    kind, channels, configuration, tiny_plans, tiny_dataset_json, nnunet_env
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


def test_an_empty_pseudo_label_has_a_finite_loss(few, build):
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
        ("auto", "1, 2 (all labelled cases show it as one piece)"),
        ("always", "1, 2 (as the plan asks)"),
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


def test_with_all_cases_only_those_that_the_plan_names_validate_and_are_kept_out_of_the_pool(
    few, build, dataset, tmp_path
):
    """Of five cases one is labelled and one validates; without such a list the four others are the pool."""
    cases = cases_of(dataset)
    for named, left in (([], 4), (cases[-1:], 3)):
        listed = tmp_path / "validate.txt"
        listed.write_text("\n".join(named))
        plans = few(
            f"few{left}", labels=1, fold="all", schedule="mean-teacher", **({"validate": listed} if named else {})
        )
        trainer = build(nnUNetTrainerMeanTeacher, plans)
        trainer.fold = "all"
        trainer.initialize()
        trainer.before_loading()
        (labelled,) = trainer.do_split()[0]
        pool = {case.name for case in trainer.pool.cases}
        assert pool == {*cases} - {labelled, *named} and len(pool) == left


# --------------------------------------------------------------------------------------------- controls and refusals


def test_the_control_has_one_schedule_over_as_many_steps():
    plans = {"plans_name": "p", "nnssl": {"schedule": "mean_teacher", "epochs": 9, "iterations": 10}}
    figures = FineTuningConfig.from_plans(plans, "mean_teacher", "nnUNetTrainerMeanTeacher")
    assert (figures.stages.first, figures.optimizer, figures.peak_lr) == (3, "adam", 2e-3)
    assert [figures.strength_for(n) for n in (1, 2, 3, 40)] == [2.0, 2.0, 1.0, 1.0]
    named = FineTuningConfig.from_plans(
        {"plans_name": "p", "nnssl": {"strength": 1.5}}, "mean_teacher", "nnUNetTrainerMeanTeacher"
    )
    assert named.strength_for(1) == named.strength_for(9) == 1.5
    long = {"plans_name": "p", "nnssl": {"schedule": "mean_teacher"}}
    figures = FineTuningConfig.from_plans(long, "mean_teacher", "nnUNetTrainerMeanTeacher")
    assert (figures.optimizer, figures.peak_lr, figures.epochs) == ("sgd", 1e-2, 1000)  # nnU-Net's own


def test_scratch_on_the_same_plans_learns_from_labels_only(few, build, start):
    plans = few(schedule="mean-teacher", epochs=6, iterations=2)
    control = start(build(nnUNetTrainerPretrainedScratch, plans))
    rates = [control.lr_scheduler.rates.at(step, control.lr_scheduler.rates.groups[0]) for step in range(12)]
    assert np.argmax(rates) == 0 and rates == sorted(rates, reverse=True) and rates[0] == pytest.approx(2e-3)
    with pytest.raises(NnsslError, match="use -tr nnUNetTrainerPretrainedMeanTeacher or -tr nnUNetTrainerMeanTeacher"):
        build(nnUNetTrainerPretrained, plans)


def test_the_second_stage_of_a_cascade_is_refused(build, dataset):
    plans = json.loads((dataset / "nnUNetPlans.json").read_text())
    plans["configurations"]["3d_cascade_fullres"] = {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"}
    plans["continue_training"] = False
    info = json.loads((dataset / "dataset.json").read_text())
    with pytest.raises(NnsslError, match="cannot train 3d_cascade_fullres.*3d_lowres"):
        nnUNetTrainerMeanTeacher(plans, "3d_cascade_fullres", 0, info, torch.device("cpu"))


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
