"""Which raw images a source has, which of them a run takes, and whether their channels are the target's."""

from __future__ import annotations

import json
import logging
import shutil

import blosc2
import numpy as np
import pytest
from nnunetv2.utilities.utils import create_lists_from_splitted_dataset_folder
from preparing import RAW, own_folder, prepare

from nnssl.errors import NnsslError
from nnssl.pretrain.prepare.raw import list_raw

# ---- listing, selection, split -------------------------------------------------------------------------------------------


def test_listing_agrees_with_nnunet(target, tiny_raw_dataset):
    plan = target()
    folder = tiny_raw_dataset(902, "Free", 4, labelled=False, channels=2, **RAW) / "imagesTr"
    (folder / "._case_000_0000.nii.gz").write_bytes(b"of a Mac")
    (folder / "notes.txt").write_text("x")
    theirs = create_lists_from_splitted_dataset_folder(str(folder), ".nii.gz", ["case_000", "case_003"], 1)
    ours = list_raw("Dataset902_Free", plan).cases
    assert [list(ours[n].files) for n in ("case_000", "case_003")] == theirs and len(ours) == 4


def test_source_without_dataset_json_or_labels(target, tiny_raw_dataset, caplog):
    plan = target()
    (tiny_raw_dataset(902, "Free", 4, labelled=False, **RAW) / "dataset.json").unlink()
    with caplog.at_level(logging.WARNING, logger="nnssl"):
        assert len(prepare(plan, "Dataset902_Free").cases) == 4
    assert "no dataset.json" in caplog.text


def test_images_that_dataset_json_names_one_by_one(target, tiny_raw_dataset, nnunet_env):
    plan = target()
    source = tiny_raw_dataset(902, "Free", 4, labelled=False, **RAW)
    info = json.loads((source / "dataset.json").read_text())
    info["dataset"] = {f"p{i}": {"images": [f"imagesTr/case_{i:03d}_0000.nii.gz"], "label": None} for i in (1, 3)}
    (source / "dataset.json").write_text(json.dumps(info))
    assert [c.name for c in prepare(plan, "Dataset902_Free").cases] == ["p1", "p3"]


def test_incomplete_and_misnamed_files_are_named(target, tiny_raw_dataset, nnunet_env):
    plan = target(channels=2)
    folder = tiny_raw_dataset(902, "Free", 5, labelled=False, channels=2, **RAW) / "imagesTr"
    (folder / "case_001_0001.nii.gz").unlink()
    shutil.copy(folder / "case_000_0000.nii.gz", folder / "lonely.nii.gz")
    shutil.copy(folder / "case_000_0000.nii.gz", folder / "case_002_0002.nii.gz")
    (folder / "case_003_0000.nii.gz").unlink()
    (folder / "case_003_0000.nii.gz").symlink_to(folder / "gone.nii.gz")
    with pytest.raises(NnsslError) as error:
        prepare(plan, "Dataset902_Free")
    for text in (
        "4 of 6",
        "case_001",
        "_0001 is missing",
        "lonely.nii.gz",
        "_0002 is not one",
        "case_003",
        "dead link",
    ):
        assert text in str(error.value), (text, str(error.value))


def test_cases_and_exclude(target, tiny_raw_dataset, tmp_path):
    plan = target()
    tiny_raw_dataset(902, "Free", 5, labelled=False, prefix="free", **RAW)
    both = ("Dataset901_Tiny", "Dataset902_Free")
    wanted, without = tmp_path / "cases.txt", tmp_path / "exclude.json"
    wanted.write_text("# the good ones\ncase_001\n\nfree_000\n free_002 \nDataset902_Free/free_003\n")
    without.write_text(json.dumps(["free_002"]))
    pool = prepare(plan, *both, cases=wanted, exclude=without)
    assert [c.key for c in pool.cases] == [
        "Dataset901_Tiny/case_001", "Dataset902_Free/free_000", "Dataset902_Free/free_003",
    ]  # fmt: skip
    assert sorted(p.stem for p in pool.cases[1].folder.glob("*.pkl")) == [
        "free_000",
        "free_003",
    ]  # no other was preprocessed
    wanted.write_text("case_001\nfre_001\ncase_001_0000.nii.gz\n")
    with pytest.raises(
        NnsslError, match=r"--cases .*2 name.*fre_001 Did you mean 'free_001'\?.*case_001_0000"
    ) as error:
        prepare(plan, *both, cases=wanted)
    assert "neither channel number" in str(error.value)
    without.write_text("{}")
    with pytest.raises(NnsslError, match=r"--exclude .*expected one case name per line"):
        prepare(plan, *both, exclude=without)
    with pytest.raises(NnsslError, match="--exclude .*cannot be read"):
        prepare(plan, *both, exclude=tmp_path / "none.txt")


def test_held_out_cases_depend_on_names_alone(target, tiny_raw_dataset, caplog):
    plan = target()
    tiny_raw_dataset(902, "Free", 30, labelled=False, shape=(6, 8, 7))
    pool = prepare(plan, "Dataset902_Free", held_out=0.2)
    assert len(pool.held_out) == 6 and not {c.key for c in pool.held_out} & {c.key for c in pool.train}
    assert prepare(plan, "Dataset902_Free", held_out=0.2) == pool
    assert len(prepare(plan, "Dataset902_Free").held_out) == 2  # 5 % of 30 is 1.5
    assert prepare(plan, "Dataset902_Free", held_out=0.0).held_out == []
    both = prepare(plan, "Dataset901_Tiny", "Dataset902_Free", held_out=0.2)
    stayed = {c.name for c in both.held_out if c.source == "Dataset902_Free"} & {c.name for c in pool.held_out}
    assert len(stayed) >= 4
    assert both.fingerprint_hash != pool.fingerprint_hash


def test_too_few_cases_hold_none_out(target, caplog):
    plan = target(3)
    with caplog.at_level(logging.WARNING, logger="nnssl"):
        pool = prepare(plan, "Dataset901_Tiny")
    assert pool.held_out == [] and len(pool.train) == 3 and "No case is held out" in caplog.text


# ---- channels ------------------------------------------------------------------------------------------------------------
def test_modality_and_channel_names_must_agree(target, tiny_raw_dataset, caplog):
    plan = target()
    tiny_raw_dataset(902, "Free", 4, labelled=False, modality="CT", **RAW)
    with pytest.raises(NnsslError, match=r"channel 0 is 'CT'.*'MR'.*another modality(.|\n)*--allow-mismatch"):
        prepare(plan, "Dataset902_Free")
    with caplog.at_level(logging.WARNING, logger="nnssl"):
        assert len(prepare(plan, "Dataset902_Free", allow_mismatch=True).cases) == 4
    assert "--allow-mismatch" in caplog.text


def test_ct_target_refuses_mr(target, tiny_raw_dataset):
    plan = target(modality="CT")
    tiny_raw_dataset(902, "Free", 4, labelled=False, **RAW)
    with pytest.raises(NnsslError, match="CTNormalization of the target's plans is not meant for 'MR'"):
        prepare(plan, "Dataset902_Free")


def test_other_order_is_matched_by_name_when_allowed(target, tiny_raw_dataset, nnunet_env, caplog):
    plan = target(channels=2)
    source = tiny_raw_dataset(902, "Free", 4, labelled=False, channels=2, **RAW)
    prepare(plan, "Dataset902_Free")
    straight = blosc2.open(str(own_folder(nnunet_env) / "case_000.b2nd"))[:]
    info = json.loads((source / "dataset.json").read_text())
    info["channel_names"] = {"0": "mr1 ", "1": "MR"}
    (source / "dataset.json").write_text(json.dumps(info))
    with pytest.raises(NnsslError, match=r"found 2 problems(.|\n)*channel 0 is 'mr1 '(.|\n)*channel 1 is 'MR'"):
        prepare(plan, "Dataset902_Free")
    with caplog.at_level(logging.WARNING, logger="nnssl"):
        prepare(plan, "Dataset902_Free", allow_mismatch=True)
    assert "matched by name" in caplog.text
    assert np.array_equal(blosc2.open(str(own_folder(nnunet_env) / "case_000.b2nd"))[:], straight[::-1])


def test_another_number_of_channels(target, tiny_raw_dataset):
    plan = target()
    source = tiny_raw_dataset(902, "Free", 4, labelled=False, channels=2, **RAW)
    with pytest.raises(NnsslError, match=r"Dataset902_Free has 2 channels, Dataset901_Tiny has 1"):
        prepare(plan, "Dataset902_Free")
    assert len(prepare(plan, "Dataset902_Free", allow_mismatch=True).cases) == 4  # channel 0 has the target's name
    info = json.loads((source / "dataset.json").read_text())
    info["channel_names"] = {"0": "T1", "1": "T2"}
    (source / "dataset.json").write_text(json.dumps(info))
    with pytest.raises(NnsslError, match="cannot be matched by name"):
        prepare(plan, "Dataset902_Free", allow_mismatch=True)


def test_target_that_cannot_read_the_files(target, nnunet_env):
    plan = target()
    folder = nnunet_env.raw / "Dataset902_Free" / "imagesTr"
    folder.mkdir(parents=True)
    (folder / "a_0000.png").write_bytes(b"x")
    (folder.parent / "dataset.json").write_text(json.dumps({"channel_names": {"0": "MR"}, "file_ending": ".png"}))
    with pytest.raises(NnsslError, match=r"SimpleITKIO, which does not read .png"):
        prepare(plan, "Dataset902_Free")
    (folder / "a_0000.png").unlink()
    with pytest.raises(NnsslError, match="There are no images in"):
        prepare(plan, "Dataset902_Free")
    with pytest.raises(NnsslError, match="raw images .* are not there"):
        prepare(plan, "Dataset905_Nothing")
