"""Labelled patches of given arrays: what is refused, which class is looked at; what a run with labels is and says of itself."""

import logging
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from nnssl.errors import NnsslError
from nnssl.plans import Plan
from nnssl.pretrain.omni import patches, setup
from nnssl.pretrain.omni.cases import LabelledCase, LabelledSet
from nnssl.pretrain.omni.config import PRESETS, OmniConfig, resolve_omni
from nnssl.pretrain.omni.patches import LabelledDataset, Sizes
from nnssl.pretrain.omni.setup import Omni, prepare_omni
from nnssl.pretrain.omni.volumes import _predictor

FOLD = "training cases of fold 0"
REGIONS = {"labels": {"background": 0, "whole": [1, 2], "core": 2}, "regions_class_order": [1, 2]}


@pytest.fixture
def plan_of(tiny_plans, tiny_dataset_json):
    """``plan_of(**info)``: tiny plans whose ``dataset.json`` says something else."""
    return lambda **info: Plan.from_dicts(tiny_plans(), "3d_fullres", {**tiny_dataset_json(), **info})


def dataset_of(plan, annotated=None, foreground=1.0, batch=2):
    cases = [LabelledCase("a", annotated)]
    return LabelledDataset(cases, Path(), plan, Sizes((4, 6, 8), (6, 8, 10), batch, batch, foreground), seed=0)


def given(monkeypatch, image, label, locations=None):
    """The files of every case."""
    monkeypatch.setattr(patches, "_open", lambda file: label if file.name.endswith("_seg.b2nd") else image)
    monkeypatch.setattr(patches, "class_locations", lambda folder, name: locations or {})


def test_a_patch_has_the_image_and_its_labels_and_minus_one_outside(monkeypatch, plan_of):
    image, label = np.random.rand(1, 5, 9, 12).astype(np.float32), np.ones((1, 5, 9, 12), np.int8)
    given(monkeypatch, image, label, {1: np.array([[0, 0, 0, 0]])})
    patch = dataset_of(plan_of())[0, 0]
    assert np.array_equal(patch.data[:, 1:, 1:, 1:], image[:, :5, :7, :9]) and not patch.data[:, 0].any()
    assert (patch.label[:, 1:, 1:, 1:] == 1).all() and (patch.label[:, 0] == -1).all()
    assert (patch.label[:, :, 0] == -1).all() and (patch.label[:, :, :, 0] == -1).all()


@pytest.mark.parametrize("shapes", [((1, 5, 9), (1, 5, 9)), ((2, 5, 9, 12),) * 2, ((1, 5, 9, 12), (1, 5, 9, 13))])
def test_an_image_that_does_not_fit_its_labels_or_the_plan_is_refused(monkeypatch, plan_of, shapes):
    given(monkeypatch, *(np.zeros(shape, np.float32) for shape in shapes))
    with pytest.raises(NnsslError, match="Labelled case a: image .* do not fit each other or the plan .1 channels"):
        dataset_of(plan_of())[0, 0]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_voxel_that_is_no_number_is_refused(monkeypatch, plan_of, value):
    image = np.zeros((1, 5, 9, 12), np.float32)
    image[0, 2, 3, 4] = value
    given(monkeypatch, image, np.zeros((1, 5, 9, 12), np.int8), {1: np.array([[0, 2, 3, 4]])})
    with pytest.raises(NnsslError, match="Labelled case a has NaN or infinite voxels"):
        dataset_of(plan_of())[0, 0]


@pytest.mark.parametrize(
    ("info", "locations", "annotated", "found"),
    [
        ({}, {1: 10, 2: 20}, None, {10, 20}),
        ({}, {1: 10, 2: 20}, (1,), {10}),  # classes are counted from 1
        ({}, {1: 10, 2: 20}, (2,), {20}),
        (REGIONS, {(1, 2): 10, 2: 20}, None, {10, 20}),
        (REGIONS, {(1, 2): 10, 2: 20}, (0,), {10}),  # regions from 0
        (REGIONS, {(1, 2): 10, 2: 20}, (1,), {20}),
        ({}, {1: None, 2: 20}, None, {20}),  # a class without a voxel
        ({}, {1: None, 2: 20}, (1,), {None}),
    ],
)
def test_which_class_a_patch_is_around(monkeypatch, plan_of, info, locations, annotated, found):
    """nnU-Net's record of some voxels, ``(channel, z, y, x)``, of each class or region."""
    told = {k: np.array([[0, z, 1, 2]] if z else []).reshape(-1, 4) for k, z in locations.items()}
    given(monkeypatch, None, None, told)
    data, case = dataset_of(plan_of(**info), annotated), LabelledCase("a", annotated)
    voxels = [data._voxel(case, np.random.default_rng(i), True) for i in range(20)]
    assert {None if v is None else int(v[0]) for v in voxels} == found
    assert all(v is None or v.tolist()[1:] == [1, 2] for v in voxels)


@pytest.mark.parametrize(
    ("batch", "foreground", "around"), [(2, 0.33, [0, 1]), (4, 0.5, [0, 0, 1, 1]), (3, 1.0, [1, 1, 1])]
)
def test_the_last_of_a_batch_are_around_a_label(monkeypatch, plan_of, batch, foreground, around):
    """As nnU-Net: those from ``round(batch (1 - share))`` on."""
    shape, asked = (1, 5, 9, 12), []
    given(monkeypatch, np.zeros(shape, np.float32), np.zeros(shape, np.int8))
    data = dataset_of(plan_of(), batch=batch, foreground=foreground)
    data._start = lambda case, shape, rng, wanted: (asked.append(wanted), np.zeros(3, np.int64))[1]
    for sample in range(batch):
        _ = data[0, sample]
    assert asked == [bool(a) for a in around]


# ---- what a run is and says ------------------------------------------------------------------------------------------


def omni_of(plan, train=(None,), why="all of the dataset", largest=(), **options):
    cases = [LabelledCase(f"c{i}", a) for i, a in enumerate(train)]
    found = LabelledSet("Dataset501_T", Path(), cases, [], why)
    return Omni(plan, OmniConfig(**options), found, Sizes((4, 6, 8), (6, 8, 10), 2, 3, 0.33), list(largest))


def test_cases_vary_where_not_all_have_the_same_annotated(plan_of):
    from nnssl.pretrain.methods import get_method

    base = get_method("robust")
    assert [
        omni_of(plan_of(), train).method(base).omni_varied for train in ((None, None), ((1,), (1,)), (None, (1,)))
    ] == [
        False,
        False,
        True,
    ]


def test_regions_of_which_the_largest_component_is_kept_are_named(plan_of):
    regions = omni_of(plan_of(**REGIONS), largest=[(1, 2)])
    assert regions._kept() == "whole" and regions.identity()["largest"] == [[1, 2]]
    assert omni_of(plan_of(**REGIONS), largest=[2])._kept() == "core"
    classes = omni_of(plan_of(), largest=[2])
    assert classes._kept() == "spleen" and classes.identity()["largest"] == [2]
    told = classes.identity()
    assert (told["patch"], told["batch"], told["unlabelled"]) == ([4, 6, 8], 2, 3)
    assert "volumes" not in told["options"] and told["options"]["switch"] == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("options", "why", "said", "unsaid"),
    [
        ({}, FOLD, ["from step 2 of 6", "no voxel is ignored", "starts anew at step 2", "only fold 0 of 501"], ["none ("]),
        ({"threshold": 0.8}, FOLD, ["voxels below 0.80 are ignored"], ["no voxel is ignored"]),
        ({"schedule": "method"}, FOLD, ["from step 2 of 6"], ["starts anew"]),
        ({"switch": 1.0}, FOLD, ["Pseudo-labels: none (-o omni.switch=1)"], ["starts anew", "from step"]),
        ({"fold": "all"}, "all of the dataset", ["evaluate on images that are in none"], ["only fold"]),
        ({}, "listed in few.txt", ["evaluate on images that are in none"], ["only fold"]),
    ],
)  # fmt: skip
def test_what_is_said_before_a_run(plan_of, caplog, options, why, said, unsaid):
    with caplog.at_level(logging.INFO, logger="nnssl"):
        omni_of(plan_of(), why=why, largest=[1], **options).introduce(6)
    assert all(text in caplog.text for text in said) and not any(text in caplog.text for text in unsaid), caplog.text


def test_sizes_of_patches_and_batches(monkeypatch, plan_of):
    monkeypatch.setattr(setup, "find_labelled", lambda *a, **k: LabelledSet("Dataset501_T", Path(), [], [], ""))
    plan, known = plan_of(), {"largest": "never"}
    assert prepare_omni(plan, {**known, "batch": 3}).sizes.labelled == 3
    assert prepare_omni(plan, {**known, "batch": 4, "unlabelled": 6}, ranks=2).sizes.unlabelled == 6
    default = prepare_omni(plan, known, ranks=3).sizes  # the plan's batch of 2, to the next multiple
    assert (default.labelled, default.unlabelled, default.foreground) == (3, 3, 0.33)
    assert all(r > s for r, s in zip(default.read_size, default.size))
    for patch, words in (("8,12", "3 multiples"), ("8,12,18", "multiples of 4,4,4"), ("4,4,4", "more than one")):
        with pytest.raises(NnsslError, match=words):
            prepare_omni(plan, {**known, "patch": patch})
    assert prepare_omni(plan, {**known, "patch": "4,4,8"}).sizes.size == (4, 4, 8)


def test_presets_of_the_stages():
    paper, code, running = (resolve_omni({"preset": p}) for p in PRESETS)
    assert {c.switch for c in (paper, code, running)} == {0.5}
    assert [c.teacher for c in (paper, code, running)] == ["snapshot", "snapshot", "running"]
    assert [c.pseudo_from for c in (paper, code, running)] == ["clean", "augmented", "clean"]
    assert [c.semi_through_encoder for c in (paper, code, running)] == [True, False, True]
    assert [c.threshold for c in (paper, code, running)] == [0, 0, 0.8]


def test_volumes_are_predicted_without_mirroring_and_without_a_word(plan_of, monkeypatch, capsys):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    spec = SimpleNamespace(plan=plan_of(), device=torch.device("cpu"))
    predictor = _predictor(SimpleNamespace(spec=spec))
    assert not (predictor.use_mirroring or predictor.perform_everything_on_device or predictor.allow_tqdm)
    assert predictor.device.type == "cpu" and torch.backends.cudnn.benchmark is False
    assert capsys.readouterr().out == ""
