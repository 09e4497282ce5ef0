"""Which channels the datasets of ``nnssl_add_images`` get: from patterns, the target, the dataset, DICOM, or the files' names."""

from __future__ import annotations

import numpy as np
import pytest
import SimpleITK as sitk
from exports import brats, nnunet_dataset, reasons, series, volume, write

from nnssl.errors import NnsslError
from nnssl.pretrain.images.kinds import modality_of_path
from nnssl.pretrain.prepare.channels import modality_of, same_name


def seeds(place, summary, channels):
    """Of each new case the seeds of the volumes that its channels are."""
    cases = [[sitk.GetArrayFromImage(place.read(case, c)) for c in range(channels)] for case in summary.added]
    known = {s: volume(s) for s in range(20)}
    return {tuple(next(s for s, v in known.items() if np.array_equal(a, v)) for a in arrays) for arrays in cases}


def test_channels_by_name_in_one_folder_and_by_folder(place):
    e = place.export
    for i in range(2):
        write(e / f"p{i}_T1.nii.gz", volume(10 * i + 1))
        write(e / f"p{i}_t2.nrrd", volume(10 * i + 2))
        write(e / f"sub{i}" / "t1.mha", volume(10 * i + 3))
        write(e / f"sub{i}" / "t2.mha", volume(10 * i + 4))
    write(e / "p2_t1.nii.gz", volume(50))
    write(e / "flair.nii.gz", volume(51))
    write(e / "p3_t1_t2.nii.gz", volume(52))
    write(e / "p4_t1.nii.gz", volume(53))
    write(e / "p4_t2.nii.gz", volume(54), (2.0, 1.5, 1.2))
    summary = place.guess(channels={"T1": r"t1\b", "T2": r"t2\b"})
    assert len(summary.added) == 4 and seeds(place, summary, 2) == {(1, 2), (11, 12), (3, 4), (13, 14)}
    assert reasons(summary, e) == {
        "p2_t1.nii.gz": "a channel of its case is missing",
        "flair.nii.gz": "it matches no channel",
        "p3_t1_t2.nii.gz": "a channel of its case is missing",
        "p4_t1.nii.gz": "its channels differ in size or place: register and resample them first",
    }
    assert place.told()["channel_names"] == {"0": "T1", "1": "T2"} and place.told()["numTraining"] == 4


def test_the_longest_match_counts_and_label_maps_are_left_out(place):
    for i in range(2):
        brats(place.export, i)
    summary = place.guess(channels={"T1": "_t1", "T1CE": "_t1ce", "T2": "_t2", "FLAIR": "_flair"})
    assert len(summary.added) == 2 and set(reasons(summary, place.export).values()) == {"looks like a label map"}
    assert seeds(place, summary, 4) == {(10 * i, 10 * i + 1, 10 * i + 2, 10 * i + 3) for i in range(2)}


def test_channels_of_dicom_studies_by_description(place):
    def study(folder, number, *kinds):
        for c, kind in enumerate(kinds):
            names = {"study": f"8.{number}", "uid": f"9.{number}.{c}", "modality": "MR", "SeriesDescription": kind}
            series(folder / f"{number}{c}", volume(10 * number + c), **names)

    for i in range(2):
        study(place.export, i, "ax T1", "ax T2 fs")
    channels = {"T1": "T1", "T2": "T2"}
    assert len(place.guess(channels=channels).added) == 2
    study(place.tmp / "more", 5, "T1", "T1 late", "T2")
    again = place.guess(place.tmp / "more", channels=channels)
    assert again.added == [] and {r.reason for r in again.rejected} == {"its case has several images for a channel"}


def test_modality(place):
    series(place.export / "ct", volume(1), modality="CT")
    series(place.export / "mr", volume(2), modality="MR")
    with pytest.raises(NnsslError, match=r"several kinds \(1 CT, 1 MR images\): choose one with --modality"):
        place.guess()
    assert not place.dataset.exists()
    summary = place.add(modality="MRI")
    assert len(summary.added) == 1 and [r.reason for r in summary.rejected] == ["another modality"]
    assert place.told()["channel_names"] == {"0": "MRI"}
    with pytest.raises(NnsslError, match="has the channel MRI, not CT"):
        place.add()
    assert place.guess().known == 1


def test_files_that_do_not_tell(place):
    write(place.export / "a.nii.gz")
    with pytest.raises(
        NnsslError, match="do not tell what kind of images they are: say it, for example --modality CT.*-t"
    ):
        place.guess()
    assert not place.dataset.exists()


def test_spellings():
    assert same_name("MR", "MRI") and same_name("T1w", "t1") and same_name("T1-CE", "T1Gd") and same_name("PT", "PET")
    assert not same_name("T1", "T2") and not same_name("CT", "MR") and same_name("my channel", "My_Channel")
    assert [modality_of(n) for n in ("MRI", "FLAIR", "ct", "PET", "other")] == ["MR", "MR", "CT", "PT", ""]
    paths = {"s/ct.nii.gz": "CT", "a_t1ce.nii": "MR", "a_flair.nii.gz": "MR", "a_ct_t1.nii": "", "act.nii.gz": ""}
    assert {p: modality_of_path(p) for p in paths} == paths


@pytest.mark.parametrize("channel, files", [("MRI", "mr"), ("CT", "ct"), ("T2w", "a")])
def test_the_target_names_the_channel(place, channel, files):
    nnunet_dataset(place.env.raw / "Dataset501_Target", (channel,))
    write(place.export / f"{files}.nii.gz", volume(7))
    summary = place.guess(target=501)
    assert len(summary.added) == 1 and place.told()["channel_names"] == {"0": channel}
    assert summary.report is None and not list(place.tmp.glob("*.csv"))  # nothing to list, no table


def test_images_of_another_kind_than_the_target(place):
    nnunet_dataset(place.env.raw / "Dataset501_Target", ("MRI",))
    write(place.export / "ct.nii.gz", volume(7))
    write(place.export / "b_t1.nii.gz", volume(8))
    summary = place.guess(target=501)
    assert len(summary.added) == 1 and reasons(summary, place.export) == {"ct.nii.gz": "another modality"}
    with pytest.raises(NnsslError, match="has the channel MRI, not CT"):
        place.add(target=501)


def test_a_target_with_several_channels(place):
    nnunet_dataset(place.env.raw / "Dataset501_Target", ("FLAIR", "T1w", "T1Gd"))
    for i in range(2):
        brats(place.export, i)
    with pytest.raises(
        NnsslError, match="Dataset501_Target has 3 channels: give a pattern for each, --channels FLAIR=_flair"
    ):
        place.guess(target=501)
    with pytest.raises(NnsslError, match="has 3 channels .FLAIR, T1w, T1Gd., not T1, T2"):
        place.guess(target=501, channels={"T1": "_t1", "T2": "_t2"})
    summary = place.guess(target=501, channels={"T1": "_t1", "T1CE": "_t1ce", "FLAIR": "_flair"})
    assert len(summary.added) == 2 and list(place.told()["channel_names"].values()) == ["FLAIR", "T1w", "T1Gd"]
