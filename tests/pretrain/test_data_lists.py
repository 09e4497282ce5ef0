"""Lists and dataset.json as people write them: read, or refused before planning with the right entry."""

from __future__ import annotations

import json
import logging
import unicodedata

import numpy as np
import pytest
import SimpleITK as sitk

from nnssl.case_lists import read_case_list
from nnssl.errors import NnsslError
from nnssl.plans import Plan, load_plan
from nnssl.plans.description import check_description
from nnssl.plans.labels import choose_validating
from nnssl.pretrain.prepare.fingerprint import FigureWorker
from nnssl.pretrain.prepare.planning import planned
from nnssl.pretrain.prepare.raw import RawCase, describe, list_unplanned
from nnssl.pretrain.prepare.request import PrepareOptions
from nnssl.pretrain.prepare.selection import select
from nnssl.pretrain.prepare.worker import CaseWorker, Task

NAME = "Müller Jörg"
FORMS = [unicodedata.normalize(form, NAME) for form in ("NFC", "NFD")]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_lists_in_windows_encodings(tmp_path, encoding, end):
    file = tmp_path / "list.txt"
    file.write_bytes(f"case_1{end}# a comment{end}{end}{FORMS[0]}{end}".encode(encoding))
    assert read_case_list(file, "--exclude") == ["case_1", FORMS[0]]
    file.write_bytes(json.dumps(["case_1", "b"], indent=1).replace("\n", end).encode(encoding))
    assert read_case_list(file, "--exclude") == ["case_1", "b"]


def test_a_list_in_another_encoding_says_what_to_do(tmp_path):
    file = tmp_path / "list.txt"
    file.write_bytes("Müller".encode("latin-1"))
    with pytest.raises(
        NnsslError, match="--exclude .*list.txt cannot be read: it is neither UTF-8 nor UTF-16; save it as UTF-8"
    ):
        read_case_list(file, "--exclude")


@pytest.mark.parametrize("there, listed", [FORMS, FORMS[::-1]])
def test_accents_taken_apart_or_not_are_one_name(tmp_path, there, listed):
    file = tmp_path / "list.txt"
    for text in (listed, f"Dataset1_A/{listed}"):
        file.write_text(text, encoding="utf-8")
        assert select({"Dataset1_A": {there, "b"}}, file, None) == {"Dataset1_A": {there}}
        assert select({"Dataset1_A": {there, "b"}}, None, file) == {"Dataset1_A": {"b"}}
    file.write_text(listed, encoding="utf-16")
    assert choose_validating({"all": ([there, "b"], ["b"])}, file) == {"all": [there]}


@pytest.mark.parametrize(
    "entry, told",
    [
        ({"channel_names": {"MR": 0}}, 'the wrong way round. Write "channel_names": {"0": "MR"}'),
        ({"channel_names": {"T1": 1, "CT": "0"}}, 'Write "channel_names": {"0": "CT", "1": "T1"}'),
        ({"channel_names": ["T1", "T2"]}, 'Write "channel_names": {"0": "T1", "1": "T2"}'),
        ({"channel_names": "CT"}, 'Write "channel_names": {"0": "CT"}'),
        ({"channel_names": {"1": "CT", "2": "PET"}}, 'from 0. Write "channel_names": {"0": "CT", "1": "PET"}'),
        ({"file_ending": "nii.gz"}, 'is no ending with its dot. Write "file_ending": ".nii.gz"'),
        ({"file_ending": 3}, 'Write "file_ending": ".nii.gz"'),
        ({"dataset": {"a": {"images": ["imagesTr\\a_0000.nii.gz"]}}}, "with backslashes. Write imagesTr/a_0000.nii.gz"),
        ({"dataset": {"a": {"image": "imagesTr/a.nii.gz"}}}, 'Write "images": ["imagesTr/a_0000.nii.gz"]'),
        ({"dataset": ["a"]}, '"dataset" is no object'),
    ],
)
def test_wrong_entries_are_refused_before_planning(tiny_raw_dataset, entry, told):
    folder = tiny_raw_dataset(902, "Free", 2, labelled=False)
    path = folder / "dataset.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **entry}))
    with pytest.raises(NnsslError) as error:
        planned(["Dataset902_Free"], PrepareOptions("Dataset902_Free"))
    assert str(path) in str(error.value) and told in str(error.value)


V1 = {
    "modality": {"0": "MRI"},
    "labels": {"0": "background", "1": "mask"},
    "numTraining": 9,
    "training": [{"image": "./imagesTr/c.nii.gz", "label": "./labelsTr/c.nii.gz"}],
    "test": [],
}


def test_a_file_of_nnunet_v1_is_shown_as_it_has_to_be(tiny_raw_dataset):
    path = tiny_raw_dataset(902, "Free", 2, labelled=False) / "dataset.json"
    path.write_text(json.dumps(V1))
    with pytest.raises(NnsslError, match="'training' is an entry of nnU-Net v1's form") as error:
        planned(["Dataset902_Free"], PrepareOptions("Dataset902_Free"))
    content = json.loads(str(error.value).partition("with this content: ")[2])
    assert content == {
        "channel_names": {"0": "MRI"},
        "labels": {"background": 0, "mask": 1},
        "numTraining": 2,
        "file_ending": ".nii.gz",
    }
    check_description(content, path)  # whoever follows the advice is not told again
    path.write_text(json.dumps(content))
    assert len(list_unplanned("Dataset902_Free").cases) == 2


def test_what_nnunets_conversion_of_the_decathlon_leaves_is_no_v1(tiny_preprocessed, nnunet_env):
    tiny_preprocessed(901, "Tiny", 3, shape=(12, 16, 12), plan_options={"patch": (8, 8, 8)})
    for path in (nnunet_env.raw, nnunet_env.preprocessed):
        path = path / "Dataset901_Tiny" / "dataset.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "tensorImageSize": "3D", "training": []}))
    assert load_plan(901).channel_names == {0: "MR"} and describe("Dataset901_Tiny")["tensorImageSize"] == "3D"


def test_labels_are_checked_where_they_are_used(tiny_preprocessed, nnunet_env):
    tiny_preprocessed(901, "Tiny", 3, shape=(12, 16, 12), plan_options={"patch": (8, 8, 8)})
    for root in (nnunet_env.raw, nnunet_env.preprocessed):
        path = root / "Dataset901_Tiny" / "dataset.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "labels": {"liver": "one"}}))
    assert describe("Dataset901_Tiny")["labels"]  # of a source, whose labels are never used
    with pytest.raises(
        NnsslError, match="dataset.json of Dataset901_Tiny: 'labels' must be a whole number, or several"
    ):
        load_plan(901)
    path.write_text(json.dumps({**json.loads(path.read_text()), "channel_names": {"00": "CT"}}))
    with pytest.raises(NnsslError, match="'channel_names' must be names by index"):
        load_plan(901)


def test_the_target_is_checked_too(tiny_preprocessed, nnunet_env):
    tiny_preprocessed(901, "Tiny", 3, shape=(12, 16, 12), plan_options={"patch": (8, 8, 8)})
    path = nnunet_env.preprocessed / "Dataset901_Tiny" / "dataset.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "channel_names": {"MR": 0}}))
    with pytest.raises(NnsslError, match="the wrong way round"):
        load_plan(901)


def test_entries_that_do_not_exist_are_named_before_planning(tiny_raw_dataset):
    path = tiny_raw_dataset(902, "Free", 2, labelled=False) / "dataset.json"
    entries = {f"c{i}": {"images": [f"imagesTr/case_00{i}_0000.nii.gz"]} for i in range(7)}
    path.write_text(json.dumps({**json.loads(path.read_text()), "dataset": entries}))
    with pytest.raises(
        NnsslError, match="(?s)Entries of .dataset. .* are not there: .*c2 names .*case_002.*and 2 more"
    ):
        planned(["Dataset902_Free"], PrepareOptions("Dataset902_Free"))


def test_other_endings_beside_the_datasets_are_mentioned(tiny_raw_dataset, caplog):
    folder = tiny_raw_dataset(902, "Free", 2, labelled=False) / "imagesTr"
    image = sitk.ReadImage(str(folder / "case_000_0000.nii.gz"))
    sitk.WriteImage(image, str(folder / "x_0000.nrrd"))
    (folder / "Thumbs.db").write_bytes(b"x")
    with caplog.at_level(logging.WARNING, "nnssl"):
        assert len(list_unplanned("Dataset902_Free").cases) == 2
    assert (
        "the name does not end with .nii.gz as the dataset's do: 1 image in" in caplog.text
        and "x_0000.nrrd" in caplog.text
    )


def raw_case(folder, *arrays, spacing=(1.0, 1.0, 1.0)):
    files = []
    for c, array in enumerate(arrays):
        files.append(str(folder / f"a_{c:04d}.nii.gz"))
        image = sitk.GetImageFromArray(array)
        image.SetSpacing(spacing)
        sitk.WriteImage(image, files[-1])
    return RawCase("a", tuple(files), tuple((f, 1, 1) for f in files))


def noise(*shape):
    return np.random.default_rng(0).normal(100, 20, shape).astype(np.float32)


ONE = np.zeros((12, 12, 12), np.float32)
ONE[3, 4, 5] = 7


@pytest.mark.parametrize(
    "arrays, options, told",
    [
        ([noise(12, 10, 8), noise(10, 10, 8)], {}, "channel 0 has 8x10x12 voxels, channel 1 has 8x10x10"),
        ([noise(12, 10, 8)], {"spacing": (1e-7, 1.0, 1.0)}, "absurd voxel size: 1e-07 x 1 x 1 mm"),
        ([noise(12, 10, 8)], {"spacing": (1e6, 1.0, 1.0)}, "absurd voxel size: 1e+06 x 1 x 1 mm"),
        ([ONE], {}, "it is empty: all but 1 of its voxels have one value"),
        ([noise(1, 40, 40)], {}, "a single slice"),
        ([noise(12, 12, 12).astype(np.float64) * 1e300], {}, "too large for 32-bit floating point"),
        ([noise(12, 12, 12).astype(np.complex64)], {}, "complex numbers"),
    ],
)
def test_bad_images_are_named_for_planning_and_for_training(
    tmp_path, tiny_plans, tiny_dataset_json, arrays, options, told
):
    case = raw_case(tmp_path, *arrays, **options)
    figures = FigureWorker("SimpleITKIO")(("a", case))
    if "single" not in told:
        assert told in figures.bad
    for folder in ("out", "tmp"):
        (tmp_path / folder).mkdir()
    plan = Plan.from_dicts(tiny_plans(), "3d_fullres", tiny_dataset_json())
    worker = CaseWorker(plan, tmp_path / "out", tmp_path / "tmp")
    result = worker(Task(case))
    assert result.fatal == "" and told in result.entry.bad
