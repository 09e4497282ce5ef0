"""Labelled cases and patches from disk."""

import json
import pickle
from dataclasses import replace

import blosc2
import numpy as np
import pytest
import torch

from nnssl.errors import NnsslError
from nnssl.plans import load_plan
from nnssl.pretrain.omni.auxiliary import OmniLoaders
from nnssl.pretrain.omni.cases import LabelledCase, find_labelled, head_names
from nnssl.pretrain.omni.config import OmniConfig, resolve_omni, take_omni
from nnssl.pretrain.omni.patches import LabelledDataset, Sizes, read_label, stack
from nnssl.pretrain.omni.setup import prepare_omni
from nnssl.pretrain.prepare import prepare_sources

SIZE, WINDOW = (8, 16, 12), (10, 20, 18)
FOLDER = "nnUNetPlans_3d_fullres"


@pytest.fixture
def target(tiny_preprocessed):
    return tiny_preprocessed(501, "Target", 5, plan_options={"features": (4, 4, 4)})


def dataset(plan, cases, folder, **how):
    sizes = Sizes(SIZE[-plan.dim :], WINDOW[-plan.dim :], 4, 4, how.pop("foreground", 0.5))
    return LabelledDataset(cases, folder, plan, sizes, **{"seed": 3, **how})


def make(**how):
    plan = load_plan(501)
    found = find_labelled(plan, fold="all")
    return dataset(plan, found.train, found.folder, **how)


# ---- which cases ---------------------------------------------------------------------------------------------------


def test_a_fold_trains_and_the_others_are_held_out(target):
    found = find_labelled(load_plan(501))
    splits = json.loads((target / "splits_final.json").read_text())
    assert [c.name for c in found.train] == sorted(splits[0]["train"])
    assert [c.name for c in found.held_out] == splits[0]["val"]
    assert find_labelled(load_plan(501), fold="all").held_out == []
    assert "case_000" not in json.dumps(found.identity())
    assert found.identity() != find_labelled(load_plan(501), fold="1").identity()


def test_a_file_names_cases_and_what_is_annotated(target, tmp_path):
    path = tmp_path / "cases.txt"
    path.write_text("# comment\ncase_003: spleen\ncase_001\ncase_000: liver, spleen\n")
    found = find_labelled(load_plan(501), cases=path)
    assert found.train == [LabelledCase("case_000"), LabelledCase("case_001"), LabelledCase("case_003", (2,))]
    assert [c.name for c in found.held_out] == ["case_002", "case_004"]
    partly = find_labelled(load_plan(501), cases=path, annotated=("liver",))
    assert partly.train[1] == LabelledCase("case_001", (1,))
    path.write_text('{"case_002": ["spleen"]}')
    assert find_labelled(load_plan(501), cases=path).train == [LabelledCase("case_002", (2,))]
    path.write_text('["case_002"]')
    assert find_labelled(load_plan(501), cases=path).train == [LabelledCase("case_002")]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("case_9", "'case_9' is no preprocessed case"),
        ("case_001: spleeen", "Did you mean 'spleen'"),
        ("case_001:", "names no class"),
        ('{"case_001": "liver"}', "JSON object"),
        ("", "names no case"),
    ],
)
def test_wrong_files_are_refused(target, tmp_path, text, words):
    path = tmp_path / "cases.txt"
    path.write_text(text)
    with pytest.raises(NnsslError, match=words):
        find_labelled(load_plan(501), cases=path)


def test_what_is_missing_is_told(target, nnunet_env, tiny_preprocessed):
    plan = load_plan(501)
    with pytest.raises(NnsslError, match="has the folds 0, 1, 2, 3, 4, all"):
        find_labelled(plan, fold="7")
    with pytest.raises(NnsslError, match="'livr' is no class.*Did you mean 'liver'"):
        find_labelled(plan, annotated=("livr",))
    (target / FOLDER / "case_003_seg.b2nd").unlink()
    with pytest.raises(NnsslError, match="'case_003', which is not preprocessed"):
        find_labelled(plan)
    for file in (target / FOLDER).glob("*.pkl"):
        properties = pickle.loads(file.read_bytes())
        file.write_bytes(pickle.dumps({**properties, "class_locations": {}}))
    with pytest.raises(NnsslError, match="has no labels.*nnUNetv2_plan_and_preprocess.*leave out --labelled"):
        find_labelled(plan)
    for file in (target / FOLDER).iterdir():
        file.unlink()
    (target / FOLDER).rmdir()
    with pytest.raises(NnsslError, match="nnUNetv2_preprocess -d 501"):
        find_labelled(plan)


def test_a_dataset_that_was_planned_without_labels_is_refused(tiny_preprocessed):
    tiny_preprocessed(502, "Bare", 4, labelled=False)
    with pytest.raises(NnsslError, match="dataset.json names no class"):
        find_labelled(load_plan(502), fold="all")


def test_heads_of_classes_and_regions(target):
    assert head_names(load_plan(501)) == {"liver": 1, "spleen": 2}
    info = json.loads((target / "dataset.json").read_text())
    info["labels"] = {"background": 0, "whole": [1, 2], "core": 2, "ignore": 3}
    info["regions_class_order"] = [1, 2]
    (target / "dataset.json").write_text(json.dumps(info))
    assert head_names(load_plan(501)) == {"whole": 0, "core": 1}


# ---- patches ---------------------------------------------------------------------------------------------------------


def test_patches_are_parts_of_image_and_segmentation(target):
    """Against the whole arrays, padded; with three different sizes."""
    data = make(foreground=0.0)
    for step in range(4):
        patch = data[step, 0]
        image = blosc2.open(str(target / FOLDER / f"{patch.case.name}.b2nd"))[:]
        label = blosc2.open(str(target / FOLDER / f"{patch.case.name}_seg.b2nd"))[:]
        assert patch.data.shape == (1, *WINDOW)
        assert patch.label.shape == (1, *WINDOW)
        found = False
        pad = [(0, 0), *[(w, w) for w in WINDOW]]
        image, label = np.pad(image, pad), np.pad(label, pad, constant_values=-1)
        windows = np.lib.stride_tricks.sliding_window_view(image[0], WINDOW)
        for at in np.argwhere(windows[..., 0, 0, 0] == patch.data[0, 0, 0, 0]):
            if np.array_equal(windows[tuple(at)], patch.data[0]):
                part = tuple(slice(a, a + w) for a, w in zip(at, WINDOW))
                found |= np.array_equal(label[(0, *part)], patch.label[0])
        assert found


def test_patches_are_a_pure_function_of_seed_step_and_sample(target):
    one, two = make(), pickle.loads(pickle.dumps(make()))
    _ = two[7, 1]
    for item in [(0, 0), (0, 3), (5, 2)]:
        a, b = one[item], two[item]
        assert a.case == b.case
        assert np.array_equal(a.data, b.data)
        assert np.array_equal(a.label, b.label)
    assert not np.array_equal(one[0, 0].data, make(seed=4)[0, 0].data)


def test_the_last_samples_are_around_a_labelled_voxel(target):
    """As in nnU-Net: the first half of the batch anywhere, the second with foreground, inside of the inner crop."""
    data = make()
    first = [(w - s) // 2 for w, s in zip(WINDOW, SIZE)]
    inner = (0, *[slice(f, f + s) for f, s in zip(first, SIZE)])
    for step in range(12):
        for sample in (2, 3):
            assert (data[step, sample].label[inner] > 0).any()
    asked, original = [], data._voxel
    data._voxel = lambda case, rng, wanted: (asked.append(wanted), original(case, rng, wanted))[1]
    for sample in range(4):
        asked.clear()
        _ = data[0, sample]
        assert asked == [True] * (sample >= 2)
    data._voxel = original
    seen = {int(v) for step in range(12) for v in np.unique(data[step, 3].label[inner]) if v > 0}
    assert seen == {1, 2}
    partly = [LabelledCase(c.name, (2,)) for c in data.cases]
    only = dataset(load_plan(501), partly, data.folder, foreground=1.0)
    assert all((only[step, 0].label[inner] == 2).any() for step in range(12))


def test_a_voxel_lies_in_the_middle_of_the_inner_crop_unless_the_image_ends(target):
    """Inner crops of 4, 6 and 8 voxels in windows of 8, 7 and 10; the last axis is shorter than the crop."""
    data = make()
    data.size, data.read_size = (4, 6, 8), (8, 7, 10)
    for voxel, first in (((10, 12, 2), (6, 9, -3)), ((10, 29, 2), (6, 24, -3)), ((1, 2, 2), (-2, 0, -3))):
        data._voxel = lambda *_, at=voxel: np.array(at)
        assert data._start(data.cases[0], (20, 30, 5), np.random.default_rng(0), True).tolist() == list(first)


def test_with_an_ignore_label_patches_are_drawn_where_something_is_annotated(target):
    info = json.loads((target / "dataset.json").read_text())
    info["labels"]["ignore"] = 3
    (target / "dataset.json").write_text(json.dumps(info))
    for file in (target / FOLDER).glob("*.pkl"):
        properties = pickle.loads(file.read_bytes())
        properties["class_locations"][(-1, 0, 1, 2)] = np.array([[0, 2, 3, 4]])
        file.write_bytes(pickle.dumps(properties))
    data = make(foreground=0.0)
    assert data.has_ignore
    assert {tuple(data._voxel(data.cases[0], np.random.default_rng(i), False)) for i in range(5)} == {(2, 3, 4)}
    assert len({tuple(data._voxel(data.cases[0], np.random.default_rng(i), True)) for i in range(5)}) > 1


def test_slices_of_2d_plans(tiny_preprocessed):
    tiny_preprocessed(503, "Flat", 3, dim=2)
    plan = load_plan(503, "2d")
    found = find_labelled(plan, fold="all")
    data = dataset(plan, found.train, found.folder, foreground=1.0)
    patch = data[0, 0]
    assert patch.data.shape == (1, *WINDOW[1:])
    assert patch.label.shape == (1, *WINDOW[1:])
    assert all((data[s, 0].label > 0).any() for s in range(5))


def test_damaged_cases_are_named(target):
    data = make()
    for name in ("case_000", "case_001", "case_002", "case_003", "case_004"):
        (target / FOLDER / f"{name}_seg.b2nd").write_bytes(b"nothing")
    with pytest.raises(NnsslError, match="_seg.b2nd cannot be read.*Preprocess"):
        data[0, 0]
    for file in (target / FOLDER).glob("*_seg.b2nd"):
        file.unlink()
    with pytest.raises(NnsslError, match="_seg.b2nd does not exist"):
        data[0, 0]


# ---- both streams ----------------------------------------------------------------------------------------------------


def test_loaders_of_unequal_length_cycle(target, tiny_raw_dataset):
    """Test 35: two labelled cases beside five images, many more steps than either has; every case comes up."""
    tiny_raw_dataset(500, "Unlabelled", 5, labelled=False)
    plan = load_plan(501)
    pool = prepare_sources(plan, ["Dataset500_Unlabelled"], n_processes=1, held_out=0.0)
    found = find_labelled(plan, fold="all")
    few = type(found)(found.dataset, found.folder, found.train[:2], found.train[2:], "two")
    auxiliary = OmniLoaders(plan, pool, few, Sizes(SIZE, WINDOW, 2, 4, 0.33), seed=0, switch=3, augment=True)
    reader = auxiliary.reader("train")
    seen = {"labelled": set(), "unlabelled": set()}
    for step in range(25):
        labelled, unlabelled = reader.read(step)
        assert (unlabelled is None) == (step < 3)
        seen["labelled"] |= set(labelled.case)
        seen["unlabelled"] |= set(unlabelled.case if unlabelled is not None else ())
    assert seen == {"labelled": {"case_000", "case_001"}, "unlabelled": {f"case_{i:03d}" for i in range(5)}}
    held_out, none = auxiliary.reader("held_out").read(0)
    assert none is None
    assert not held_out.augment
    assert set(held_out.case) <= {"case_002", "case_003", "case_004"}
    halves = [replace(reader, rank=r, world_size=2).read(9) for r in range(2)]
    whole = reader.read(9)
    for kind in range(2):
        assert torch.equal(torch.cat([h[kind].data for h in halves]), whole[kind].data)
        assert [h[kind].first for h in halves] == [0, len(halves[0][kind])]
    moved = auxiliary.random(_crops()).to(torch.device("cpu"))
    assert len(moved) == 2
    assert moved.labelled.label is not None
    assert moved.unlabelled.label is None


def _crops():
    from nnssl.pretrain.methods import Crops

    zero = torch.zeros(2, 3)
    return Crops(
        torch.zeros(2, 1, 4, 4, 4), torch.zeros(2, 1, 4, 4, 4), zero, zero, torch.zeros(2, 1, 2), zero, ["a", "b"]
    )


def test_stack_keeps_what_is_annotated(target):
    data = make()
    patches = stack([data[0, 0], data[0, 1]], 2, 4, augment=False)
    assert patches.annotated == [None, None]
    assert (patches.first, patches.total, len(patches)) == (2, 4, 2)


# ---- options ---------------------------------------------------------------------------------------------------------


def test_options_are_split_and_checked():
    method, omni = take_omni({"lr": "1", "omni.switch": "0.25", "omni.preset": "paper"})
    assert method == {"lr": "1"}
    config = resolve_omni(omni)
    assert (config.switch, config.teacher, config.threshold) == (0.25, "snapshot", 0.0)
    assert resolve_omni({"annotated": "a,b", "patch": "8,8,16"}).annotated == ("a", "b")
    assert (config.schedule, config.largest, config.pseudo_from) == ("method", "never", "clean")
    assert resolve_omni({}, {"switch": 0.75, "schedule": "stages"}).switch == 0.75
    plain = OmniConfig()
    assert (plain.switch, plain.schedule, plain.threshold, plain.teacher) == (1 / 3, "stages", 0.0, "ema")
    running = resolve_omni({"preset": "running"})
    assert (running.switch, running.schedule, running.threshold, running.teacher) == (0.5, "method", 0.8, "running")
    with pytest.raises(NnsslError, match="began with a version that had one schedule.*omni.preset=running"):
        resolve_omni({}, {"switch": 0.5, "threshold": 0.8})
    for given, words in [
        ({"swich": 1}, "omni.*Did you mean 'switch'"),
        ({"switch": 2}, "omni.*must be a number in"),
        ({"preset": "papr"}, "Did you mean 'paper'"),
    ]:
        with pytest.raises(NnsslError, match=words):
            resolve_omni(given)


def test_the_labelled_cases_say_which_classes_are_one_piece(target, monkeypatch):
    """A class in two pieces in any case is not cleaned; nothing is read where nothing is asked."""
    whole, split = np.zeros((2, 12, 12, 12), np.int16)
    whole[2:6, 2:6, 2:6] = split[2:6, 2:6, 2:6] = 1
    whole[8:10, 2:6, 2:6] = split[8:9, 2:6, 2:6] = split[10:11, 2:6, 2:6] = 2
    read = []
    monkeypatch.setattr(
        "nnssl.pretrain.omni.setup.read_label",
        lambda folder, case: (read.append(case), whole if read[1:] else split)[1],
    )
    plan = load_plan(501)
    omni = prepare_omni(plan, {})
    assert omni.largest == [1] and omni.identity()["largest"] == [1]
    assert omni._kept() == "liver" and sorted(read) == sorted(c.name for c in omni.cases.train)
    read.clear()
    assert prepare_omni(plan, {"largest": "always"}).largest == [1, 2]
    assert prepare_omni(plan, {"largest": "never"}).largest == prepare_omni(plan, {"switch": 1}).largest == []
    assert not read
    monkeypatch.setattr("nnssl.pretrain.omni.setup.read_label", read_label)
    prepare_omni(plan, {})
    (omni.cases.folder / f"{omni.cases.train[0].name}_seg.b2nd").write_bytes(b"no")
    with pytest.raises(NnsslError, match=f"{omni.cases.train[0].name}_seg.b2nd cannot be read"):
        prepare_omni(plan, {})


def test_patches_and_batches_that_cannot_be_are_refused(target):
    plan = load_plan(501)
    assert prepare_omni(plan, {}).sizes.size == plan.patch_size
    assert prepare_omni(plan, {}, ranks=4).sizes.labelled == 4
    assert prepare_omni(plan, {"patch": "8,12,16", "augment": False}).sizes.read_size == (8, 12, 16)
    for given, words in [({"patch": "8,13,16"}, "multiples of 4,4,4"), ({"patch": "4,4,4"}, "more than one")]:
        with pytest.raises(NnsslError, match=words):
            prepare_omni(plan, given)
    with pytest.raises(NnsslError, match="multiple of 2"):
        prepare_omni(plan, {"batch": 3}, ranks=2)
    assert prepare_omni(plan, {"switch": 0.3}).switch(10) == 3
    assert OmniConfig().fold == "0"


def test_changes_of_intensity_are_strong_but_in_presets_and_runs_from_before():
    assert (resolve_omni({}).intensities, resolve_omni({}).strength) == ("strong", 2.0)
    assert {resolve_omni({"preset": p}).intensities for p in ("paper", "code", "running")} == {"nnunet"}
    assert resolve_omni({}, {"schedule": "stages"}).intensities == "nnunet"
    assert resolve_omni({}, {"schedule": "stages", "intensities": "strong"}).intensities == "strong"
