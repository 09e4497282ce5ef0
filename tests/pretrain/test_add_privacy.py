"""What ``nnssl_add_images`` writes and says: nothing of a patient, links, the mapping, and what nnU-Net makes of it."""

from __future__ import annotations

import csv
import gzip
import os

import nibabel
import numpy as np
import pytest
from exports import SECRET, labels, nnunet_dataset, same, series, volume, write
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner

from nnssl.pretrain.images import cli as command
from nnssl.pretrain.images.convert import tells_nothing
from nnssl.pretrain.prepare import prepare_sources
from nnssl.pretrain.prepare.planning import planned
from nnssl.pretrain.prepare.request import PrepareOptions


def everything_written(folder):
    """Names and contents of all files, gzip unpacked, links by their target."""
    for path in folder.rglob("*"):
        yield str(path.relative_to(folder)).encode()
        if path.is_symlink():
            yield os.readlink(path).encode()
        if path.is_file():
            content = path.read_bytes()
            yield content
            if content[:2] == b"\x1f\x8b":
                yield gzip.decompress(content)


def test_nothing_of_the_patient_is_kept(place, monkeypatch, caplog, capfd):
    temporary = place.tmp / "temporary"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    caplog.set_level("DEBUG")
    series(place.export / SECRET / "4711", volume(1))
    series(place.export / "uneven", volume(5), edit=lambda d, i: setattr(d, "StudyTime", f"1010{i:02d}.5"))
    header = nibabel.Nifti1Header()
    header["descrip"] = b"Mueller Hans"
    header.extensions.append(nibabel.nifti1.Nifti1Extension("comment", b"Mueller"))
    data = volume(2).transpose(2, 1, 0)
    nibabel.save(nibabel.Nifti1Image(data, np.diag([1, 1.5, 2, 1]), header), str(place.export / "named.nii.gz"))
    named = write(place.export / "Mueller.nii", volume(3))
    with gzip.open(place.export / "Mueller_gz.nii.gz", "wb") as file:  # keeps the file's name in its header
        file.write(named.read_bytes())
    named.unlink()
    write(place.export / "Mueller.mha", volume(4))
    (place.export / "Mueller_bad.nii.gz").write_bytes(b"x" * 30)
    summary = place.guess()
    assert len(summary.added) == 5 and len(summary.rejected) == 1
    for content in everything_written(place.env.raw):
        assert b"mueller" not in content.lower() and b"4711" not in content and b"20260101" not in content
    assert list(temporary.iterdir()) == [] and not list(place.tmp.glob("*mapping*"))
    told = caplog.text + "".join(capfd.readouterr())
    assert "Mueller" not in told and "4711" not in told and "Scans_0001 to Scans_0005" in told
    assert "Mueller" in summary.report.read_text()  # the user's own file, outside of nnU-Net's folders


@pytest.mark.parametrize(
    "key, text, quiet",
    [
        ("descrip", b"", True),
        ("descrip", b"FSL5.0", True),
        ("descrip", b"Mueller", False),
        ("aux_file", b"none", True),
        ("aux_file", b"Mueller.hdr", False),
        ("db_name", b"Mueller", False),
        ("extension", b"Mueller", False),
        ("gzip", b"Mueller.nii", False),
    ],
)
def test_what_a_header_may_hold(tmp_path, key, text, quiet):
    header = nibabel.Nifti1Header()
    if key == "extension":
        header.extensions.append(nibabel.nifti1.Nifti1Extension("comment", text))
    elif key != "gzip":
        header[key] = text
    file = tmp_path / "a.nii.gz"
    nibabel.save(nibabel.Nifti1Image(volume(2), np.eye(4), header), str(file))
    if key == "gzip":
        content = gzip.decompress(file.read_bytes())
        with open(file, "wb") as raw, gzip.GzipFile(text.decode(), "wb", fileobj=raw) as packed:
            packed.write(content)
    assert tells_nothing(str(file)) is quiet


def test_the_mapping_is_written_only_when_asked_and_is_kept_up(place):
    write(place.export / "a.nrrd", volume(1))
    place.add()
    series(place.export / "series", volume(2))
    place.add(mapping=place.tmp / "map.csv")
    write(place.tmp / "other" / "c.nrrd", volume(3))
    place.add(place.tmp / "other", mapping=place.tmp / "map.csv")
    with open(place.tmp / "map.csv", newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["case", "channel", "file", "files"]
    assert [(r[0], r[1], os.path.basename(r[2]), r[3]) for r in rows[1:]] == [
        ("Scans_0001", "CT", "a.nrrd", "1"),
        ("Scans_0002", "CT", "IM0010", "10"),
        ("Scans_0003", "CT", "c.nrrd", "1"),
    ]


def test_clean_files_are_linked(place):
    source = write(place.export / "a.nii.gz", volume(1))
    assert tells_nothing(str(source))
    summary = place.add()
    made = place.dataset / "imagesTr" / "Scans_0001_0000.nii.gz"
    assert summary.linked == 1 and made.samefile(source) and not made.is_symlink()
    write(place.tmp / "b" / "b.nii.gz", volume(2))
    assert place.add(place.tmp / "b", link="never").linked == 0
    write(place.tmp / "c" / "c.nii.gz", volume(3))
    assert place.add(place.tmp / "c", link="symbolic").linked == 1
    link = place.dataset / "imagesTr" / "Scans_0003_0000.nii.gz"
    assert link.is_symlink() and os.readlink(link) == str(place.tmp / "c" / "c.nii.gz")
    same(place, "Scans_0003", volume(3))


def test_another_file_system_gets_a_copy(place, monkeypatch):
    write(place.export / "a.nii.gz", volume(1))
    real = os.link

    def link(source, target, **options):
        if "export" in os.fspath(source):
            raise OSError(18, "Invalid cross-device link")
        real(source, target, **options)

    monkeypatch.setattr(os, "link", link)
    assert place.add().linked == 0
    same(place, "Scans_0001", volume(1))


def test_what_was_added_can_be_planned_and_preprocessed(place, monkeypatch):
    monkeypatch.setattr(ExperimentPlanner, "static_estimate_VRAM_usage", staticmethod(lambda *args: 2e7))
    for i in range(3):
        series(place.export / str(i), volume(i, (12, 20, 18)) - 1000)
    place.guess()
    plan = planned(["Dataset500_Scans"], PrepareOptions("Dataset500_Scans"))
    assert plan.normalization_schemes == ("CTNormalization",)
    pool = prepare_sources(plan, ["Dataset500_Scans"], n_processes=0)
    assert [r.name for r in pool.cases] == ["Scans_0001", "Scans_0002", "Scans_0003"]


def test_the_command(place, capsys):
    write(place.export / "a_t1.nrrd", volume(1))
    write(place.export / "a_t2.nrrd", volume(2))
    arguments = ["-d", "500", "--name", "Scans", str(place.export), "--channels", "T1=_t1", "T2=_t2", "-np", "1"]
    assert command.main([*arguments, "--report", str(place.tmp / "r.csv")]) == 0
    out = capsys.readouterr().out
    assert out.endswith("Next, which trains nothing yet: nnssl_pretrain -d 500 -m mae --dry-run\n")
    assert "1 case added (Scans_0001)" in out and not (place.tmp / "r.csv").exists()
    assert command.main(["-d", "500", str(place.tmp / "nowhere")]) == 1
    assert "does not exist" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        command.main(["-d", "500", str(place.export), "--channels", "T1"])
    assert "not of the form NAME=PATTERN" in capsys.readouterr().err


def test_the_command_says_what_it_did(place, capsys):
    nnunet_dataset(place.env.raw / "Dataset501_Target", ("MRI",))
    write(place.export / "a.nii.gz", volume(1))
    write(place.export / "b_mask.nii.gz", labels())
    assert command.main(["-d", "500", "--name", "Scans", "-t", "501", "-np", "1", str(place.export)]) == 0
    told = capsys.readouterr().out
    assert "1 case added (Scans_0001)" in told and "links to your files" in told and "1 file is in these cases" in told
    assert "1 file is not used:\n       1  looks like a label map (see --keep label-maps)" in told
    assert command.main(["-d", "500", "-np", "1", "--keep", "label-maps", str(place.export)]) == 0
    told = capsys.readouterr().out
    assert "added before" in told and "not used" not in told and not list(place.tmp.glob("*.csv"))
