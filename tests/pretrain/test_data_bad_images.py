"""Images that cannot be used, are test images, or are there twice: counted, named and reported."""

from __future__ import annotations

import gzip
import logging
import shutil

import numpy as np
import pytest
import SimpleITK as sitk
from preparing import RAW, prepare

from nnssl.errors import NnsslError
from nnssl.pretrain.prepare.integrity import check_whole

# ---- bad images ----------------------------------------------------------------------------------------------------------


def spoil(folder):
    whole = (folder / "case_000_0000.nii.gz").read_bytes()
    (folder / "case_000_0000.nii.gz").write_bytes(whole[: len(whole) // 2])
    (folder / "case_001_0000.nii.gz").write_bytes(b"")
    image = sitk.ReadImage(str(folder / "case_002_0000.nii.gz"))
    array = sitk.GetArrayFromImage(image)
    for name, value in (("case_002", np.nan), ("case_003", None)):
        bad = np.full_like(array, 7) if value is None else array.copy()
        if value is not None:
            bad[2, 3, 4:6] = value
        sitk.WriteImage(sitk.GetImageFromArray(bad), str(folder / f"{name}_0000.nii.gz"))
    (folder / "case_004_0000.nii.gz").write_bytes(b"no image at all")


REASONS = {
    "case_000": "truncated",
    "case_001": "empty",
    "case_002": "2 of 2304 voxels are NaN or infinite",
    "case_003": "constant",
    "case_004": "damaged",
}


def test_bad_images_are_counted_named_and_reported(target, tiny_raw_dataset, nnunet_env, capfd, caplog):
    plan = target()
    spoil(tiny_raw_dataset(902, "Free", 9, labelled=False, **RAW) / "imagesTr")
    with pytest.raises(NnsslError) as error:
        prepare(plan, "Dataset902_Free")
    text = str(error.value)
    assert "5 of 9 images cannot be used" in text and "--skip-bad" in text and "_report.csv" in text
    for case, reason in REASONS.items():
        assert any(case in line and reason in line and ".nii.gz" in line for line in text.splitlines()), (reason, text)
    with caplog.at_level(logging.WARNING, logger="nnssl"):
        pool = prepare(plan, "Dataset902_Free", skip_bad=True)
    assert [c.name for c in pool.cases] == [f"case_{i:03d}" for i in range(5, 9)]
    assert {b.case for b in pool.bad} == set(REASONS) and "--skip-bad" in caplog.text
    (report,) = pool.reports
    assert report.parent == nnunet_env.preprocessed / "Dataset902_Free" and len(report.read_text().splitlines()) == 6
    assert "ITK" not in capfd.readouterr().err

    shutil.copy(  # repaired images are taken, and the report shrinks
        nnunet_env.raw / "Dataset902_Free/imagesTr/case_005_0000.nii.gz",
        nnunet_env.raw / "Dataset902_Free/imagesTr/case_000_0000.nii.gz",
    )
    again = prepare(plan, "Dataset902_Free", skip_bad=True)
    assert len(again.cases) == 5 and len(report.read_text().splitlines()) == 5


def test_all_bad_is_an_error_even_with_skip_bad(target, tiny_raw_dataset):
    plan = target()
    spoil(tiny_raw_dataset(902, "Free", 5, labelled=False, **RAW) / "imagesTr")
    with pytest.raises(NnsslError, match="No image is left"):
        prepare(plan, "Dataset902_Free", skip_bad=True)


@pytest.mark.parametrize("ending", [".nii.gz", ".nii"])
def test_truncation_of_data_is_seen_however_packed(tmp_path, ending):
    path = tmp_path / "a.nii"
    sitk.WriteImage(sitk.GetImageFromArray(np.arange(1000, dtype=np.float32).reshape(10, 10, 10)), str(path))
    content = path.read_bytes()
    pack = gzip.compress if ending == ".nii.gz" else bytes
    good, short = tmp_path / f"good{ending}", tmp_path / f"short{ending}"
    good.write_bytes(pack(content))
    short.write_bytes(pack(content[:-8]))
    check_whole(str(good))
    with pytest.raises(ValueError, match="holds 4344 of 4352 bytes"):
        check_whole(str(short))


# ---- leaks ---------------------------------------------------------------------------------------------------------------
def test_test_images_are_found_by_content(target, tiny_raw_dataset, nnunet_env, caplog, opened):
    plan = target(n_test=2)
    raw = tiny_raw_dataset(902, "Free", 4, labelled=False, seed=5, **RAW)
    image = sitk.ReadImage(str(nnunet_env.raw / "Dataset901_Tiny/imagesTs/case_006_0000.nii.gz"))
    sitk.WriteImage(image, str(raw / "imagesTr" / "leak_0000.nii.gz"), True, 9)  # packed otherwise, the same voxels
    with caplog.at_level(logging.WARNING, logger="nnssl"):
        pool = prepare(plan, "Dataset902_Free")
    assert pool.leaks == ["Dataset902_Free/leak"] and len(pool.cases) == 5
    (report,) = pool.reports
    assert "test images of Dataset901_Tiny" in caplog.text and f"--exclude {report}" in caplog.text
    assert (nnunet_env.preprocessed / "Dataset901_Tiny" / "nnssl_test_hashes.json").is_file()
    opened.clear()
    clean = prepare(plan, "Dataset902_Free", exclude=report)
    assert clean.leaks == [] and len(clean.cases) == 4
    assert not [f for f in opened if f.endswith(".nii.gz")]


def test_byte_equal_test_images_are_found_in_the_own_dataset(target, nnunet_env, opened):
    plan = target(n_test=1)
    raw = nnunet_env.raw / "Dataset901_Tiny"
    shutil.copy(raw / "imagesTr" / "case_002_0000.nii.gz", raw / "imagesTs" / "other_0000.nii.gz")
    opened.clear()
    assert prepare(plan, "Dataset901_Tiny").leaks == ["Dataset901_Tiny/case_002"]
    assert len([f for f in opened if "imagesTr" in f]) < 5


def test_images_that_are_there_twice_are_told(target, tiny_raw_dataset, caplog):
    plan = target()
    folder = tiny_raw_dataset(902, "Free", 4, labelled=False, **RAW) / "imagesTr"
    shutil.copy(folder / "case_001_0000.nii.gz", folder / "copy_0000.nii.gz")
    with caplog.at_level(logging.WARNING, logger="nnssl"):
        prepare(plan, "Dataset902_Free")
    assert "There twice: 1 image: Dataset902_Free/case_001 = Dataset902_Free/copy" in caplog.text
