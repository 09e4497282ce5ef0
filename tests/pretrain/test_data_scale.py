"""Many machines and many cases: parts of the preprocessing, the manifest that spares looking at each case, weights."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap

import blosc2
import numpy as np
import pytest

from nnssl.errors import NnsslError
from nnssl.plans import load_plan
from nnssl.pretrain import preprocess, run
from nnssl.pretrain.data import SampleStream, make_loader
from nnssl.pretrain.data.sampling import TRAIN, draw_cases
from nnssl.pretrain.data.weights import case_weights, parse_sources, relative
from nnssl.pretrain.methods import CropRequest
from nnssl.pretrain.prepare import manifest, prepare_sources, sources
from nnssl.pretrain.prepare.parts import Part

SOURCE = "Dataset902_Free"
RAW = {"shape": (12, 16, 12)}


@pytest.fixture
def plan(tiny_preprocessed):
    tiny_preprocessed(901, "Tiny", 2, shape=(12, 16, 12), plan_options={"patch": (8, 8, 8)})
    return load_plan(901)


@pytest.fixture
def raw(plan, tiny_raw_dataset):
    """imagesTr of seven unlabelled images."""
    return tiny_raw_dataset(902, "Free", 7, labelled=False, **RAW) / "imagesTr"


def prepare(plan, **options):
    return prepare_sources(plan, [SOURCE], n_processes=0, **options)


def made(env):
    """Preprocessed files by name -> (time, inode)."""
    folders = [f for f in (env.preprocessed / SOURCE).glob("nnssl_*") if f.is_dir() and not f.name.endswith("_tmp")]
    return {f.name: (f.stat().st_mtime_ns, f.stat().st_ino) for folder in folders for f in folder.iterdir()}


# ---- parts -----------------------------------------------------------------------------------------------------------------


def test_parts_share_the_cases_evenly_and_by_name_alone():
    names = [f"case_{i:05d}" for i in range(20_000)]
    parts = [Part(i, 8).take(names) for i in range(1, 9)]
    assert sum(map(len, parts)) == len(set().union(*parts)) == 20_000
    assert all(abs(len(p) - 2500) < 250 for p in parts)  # five standard deviations
    assert Part(3, 8).take(names[::2]) == parts[2] & set(names[::2])
    assert Part(1, 1).take(names) == set(names)
    assert Part.parse(" 3/8") == Part(3, 8) and Part(3, 8).label == "3of8"


@pytest.mark.parametrize("text", ["0/4", "5/4", "1/0", "half", "1", "1/2/3", "-1/4"])
def test_parts_that_cannot_be(text):
    with pytest.raises(NnsslError, match="--part"):
        Part.parse(text)


def test_each_part_makes_its_own_cases_and_nothing_is_made_twice(plan, raw, nnunet_env):
    done, cases = {}, 0
    for i in (3, 1, 2):
        result = preprocess(902, target=901, part=f"{i}/3", processes=1)
        assert {n: made(nnunet_env)[n] for n in done} == done
        done = made(nnunet_env)
        cases += result.cases
        assert len(done) == 3 * cases
    assert cases == 7
    pool = prepare(plan)
    assert [c.name for c in pool.cases] == [f"case_{i:03d}" for i in range(7)]
    assert made(nnunet_env) == done
    journals = sorted(p.name.rpartition("_index")[2] for p in (nnunet_env.preprocessed / SOURCE).glob("*_index*"))
    assert set(journals) <= {"_1of3.jsonl", "_2of3.jsonl", "_3of3.jsonl"}
    shutil.rmtree(nnunet_env.preprocessed / SOURCE)
    assert prepare(plan) == pool


def test_a_part_without_cases_is_no_error(plan, raw):
    parts = [preprocess(902, target=901, part=f"{i}/40", processes=1).cases for i in (1, 2, 3)]
    assert 0 in parts and sum(parts) < 7


def test_bad_images_of_a_part_are_told_after_the_others_are_done(plan, raw, nnunet_env):
    part = next(i for i in (1, 2) if Part(i, 2).holds("case_000"))
    (raw / "case_000_0000.nii.gz").write_bytes(b"no image")
    with pytest.raises(NnsslError, match="case_000"):
        preprocess(902, target=901, part=f"{part}/2", processes=1)
    preprocess(902, target=901, part=f"{3 - part}/2", processes=1)
    assert len(made(nnunet_env)) == 18
    (report,) = (nnunet_env.preprocessed / SOURCE).glob(f"*_report_{part}of2.csv")
    assert "case_000" in report.read_text()
    result = preprocess(902, target=901, part=f"{part}/2", processes=1, skip_bad=True)
    assert len(result.bad) == 1


def test_a_case_made_again_by_another_journal_is_not_made_a_third_time(plan, raw, nnunet_env):
    preprocess(902, target=901, processes=1)
    for turn, part in enumerate([None, "1/1", None]):
        shutil.copy(raw / f"case_00{turn + 1}_0000.nii.gz", raw / "case_000_0000.nii.gz")
        os.utime(raw / "case_000_0000.nii.gz", ns=(1, 10**18 + turn))
        preprocess(902, target=901, part=part, processes=1)
        before = made(nnunet_env)
        preprocess(902, target=901, processes=1)
        assert made(nnunet_env) == before


def test_the_command_preprocesses_a_part(plan, raw, nnunet_env, capsys):
    from nnssl.pretrain.cli import main

    assert main(["-d", "902", "-t", "901", "--preprocess-only", "--part", "1/2", "-np", "1"]) == 0
    assert main(["-d", "902", "-t", "901", "-m", "hdense", "--preprocess-only", "--part", "2/2", "-np", "1"]) == 0
    out = capsys.readouterr()
    assert "of part 1 of 2 are preprocessed" in out.out
    assert len([n for n in made(nnunet_env) if n.endswith(".pkl")]) == 7
    assert main(["-d", "902", "-t", "901", "--preprocess-only", "--part", "2", "-np", "1"]) == 1
    assert "3/8" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["-d", "902", "-t", "901", "-m", "hdense", "--part", "1/2"])
    assert "--preprocess-only" in capsys.readouterr().err


MACHINE = textwrap.dedent("""
    import os, socket, sys
    socket.gethostname = lambda: sys.argv[1]
    from nnssl.pretrain import preprocess
    if __name__ == "__main__":
        preprocess(902, target=901, part="1/1", processes=1)
""")


def voxels(pool):
    return {p.name: blosc2.open(str(p))[:] for p in pool.cases[0].folder.glob("*.b2nd")}


@pytest.mark.slow
def test_two_machines_on_the_same_part_do_no_harm(plan, raw, nnunet_env, tmp_path):
    expected = prepare(plan)
    content = voxels(expected)
    shutil.rmtree(nnunet_env.preprocessed / SOURCE)
    script = tmp_path / "machine.py"
    script.write_text(MACHINE)
    machines = [subprocess.Popen([sys.executable, script, f"node{i}"]) for i in range(2)]
    assert [m.wait() for m in machines] == [0, 0]
    assert prepare(plan) == expected
    for name, image in voxels(expected).items():
        assert np.array_equal(image, content[name]), name
    assert not list((nnunet_env.preprocessed / SOURCE).glob("*_tmp"))


# ---- the manifest ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def looks(monkeypatch):
    """Counts starts that look at each case; changes count at once, however coarse the clock."""
    monkeypatch.setattr(manifest, "RACY_SECONDS", -3600.0)
    counted = []
    original = sources.list_raw

    def list_raw(source, *args):
        counted.extend([source] * (len(args) == 1))  # not the test images
        return original(source, *args)

    monkeypatch.setattr(sources, "list_raw", list_raw)
    return counted


def the_manifest(env):
    (path,) = (env.preprocessed / SOURCE).glob("*_manifest.json")
    return path


def test_a_second_start_looks_at_no_case(plan, raw, looks, monkeypatch, nnunet_env):
    first = prepare(plan)
    assert looks == [SOURCE]
    monkeypatch.setattr(sources, "done_cases", None)
    monkeypatch.setattr(sources, "preprocess_source", None)
    assert prepare(plan) == first
    assert prepare(plan, preprocess=False) == first
    assert looks == [SOURCE]
    assert not [p for p in (nnunet_env.preprocessed / SOURCE).iterdir() if ".tmp" in p.name]


def test_what_an_older_version_wrote_spares_the_look_too(plan, raw, looks, nnunet_env):
    first = prepare(plan)
    path = the_manifest(nnunet_env)
    path.rename(path.with_name(path.name.replace("manifest", "catalogue")))
    assert prepare(plan) == first and looks == [SOURCE]


def change(kind, raw, env):
    path = the_manifest(env)
    lines = path.read_bytes().splitlines(keepends=True)
    folder = next(p for p in path.parent.iterdir() if p.is_dir())
    if kind == "added":
        shutil.copy(raw / "case_000_0000.nii.gz", raw / "new_0000.nii.gz")
    elif kind == "removed":
        (raw / "case_000_0000.nii.gz").unlink()
    elif kind == "overwritten":
        (raw / "case_000_0000.nii.gz").write_bytes((raw / "case_001_0000.nii.gz").read_bytes())
    elif kind == "preprocessed file deleted":
        (folder / "case_003.b2nd").unlink()
    elif kind == "index line added":
        index = next(path.parent.glob("*_index.jsonl"))
        index.write_text(index.read_text() + "\n")
    elif kind == "dataset.json":
        text = (raw.parent / "dataset.json").read_text()
        (raw.parent / "dataset.json").write_text(text + "\n")
    elif kind == "half-written":
        path.write_bytes(lines[0] + lines[1][: len(lines[1]) // 2])
    elif kind == "only a head":
        path.write_bytes(lines[0][:40])
    elif kind == "a bit has turned":
        path.write_bytes(lines[0] + lines[1].replace(b"case_001", b"case_0O1", 1))
    elif kind == "another version":
        path.write_bytes(lines[0].replace(b'"schema": 1', b'"schema": 99') + lines[1])
    elif kind == "gone":
        path.unlink()


KINDS = ["added", "overwritten", "removed", "preprocessed file deleted", "index line added", "dataset.json"]
KINDS += ["half-written", "only a head", "a bit has turned", "another version", "gone"]


def test_a_manifest_that_no_longer_holds_is_noticed_and_made_anew(plan, raw, looks, nnunet_env):
    known = prepare(plan)
    for kind in KINDS:
        looks.clear()
        change(kind, raw, nnunet_env)
        pool = prepare(plan)
        assert looks == [SOURCE], kind
        names = [c.name for c in pool.cases]
        expected = {c.name for c in known.cases} | ({"new"} if kind == "added" else set())
        assert set(names) == expected - ({"case_000"} if kind == "removed" else set()), kind
        assert prepare(plan) == pool
        assert looks == [SOURCE], kind
        assert {f"{n}.b2nd" for n in names} <= set(made(nnunet_env)), kind
        known = pool


def test_a_change_right_before_the_manifest_was_written_is_not_trusted(plan, raw, looks, monkeypatch):
    monkeypatch.setattr(manifest, "RACY_SECONDS", 3600.0)
    prepare(plan)
    prepare(plan)
    assert looks == [SOURCE] * 2
    times = {"a": 10 * 10**9, "b": None}
    monkeypatch.setattr(manifest, "RACY_SECONDS", 2.0)
    assert manifest.settled_times(times, 13 * 10**9) and not manifest.settled_times(times, 11 * 10**9)


def test_the_check_of_all_files_can_be_asked_for(plan, raw, looks, monkeypatch, nnunet_env):
    monkeypatch.setattr(manifest, "SPOT_CHECKS", 0)
    prepare(plan)
    change("overwritten", raw, nnunet_env)
    before = made(nnunet_env)
    prepare(plan)
    assert made(nnunet_env) == before and looks == [SOURCE]
    preprocess(902, target=901, processes=1)
    assert made(nnunet_env)["case_000.b2nd"] != before["case_000.b2nd"] and looks == [SOURCE] * 2


def test_cases_that_were_left_out_need_not_be_preprocessed(plan, raw, looks, tmp_path):
    few = tmp_path / "few.txt"
    few.write_text("case_000\ncase_001\ncase_002\n")
    rest = prepare(plan, exclude=few)
    assert prepare(plan, exclude=few) == rest and len(rest.cases) == 4
    assert looks == [SOURCE]
    assert len(prepare(plan, cases=few).cases) == 3  # not done yet
    assert looks == [SOURCE] * 2
    assert len(prepare(plan).cases) == 7
    assert looks == [SOURCE] * 2


def test_bad_images_are_looked_at_again_unless_they_are_skipped(plan, raw, looks):
    (raw / "case_000_0000.nii.gz").write_bytes(b"no image")
    (raw / "odd.nii.gz").write_bytes(b"no case")
    first = prepare(plan, skip_bad=True)
    assert [b.case for b in first.bad] == ["case_000", "odd.nii.gz"]
    assert prepare(plan, skip_bad=True) == first
    assert looks == [SOURCE]
    with pytest.raises(NnsslError, match="2 of 8 images cannot be used"):
        prepare(plan)
    assert looks == [SOURCE] * 2


def test_channels_of_a_known_source_are_still_compared_with_the_targets(
    plan, raw, looks, tiny_preprocessed, nnunet_env
):
    prepare(plan)
    tiny_preprocessed(905, "CT", 2, modality="CT", **RAW)
    other = load_plan(905)
    with pytest.raises(NnsslError, match="another modality"):
        prepare(other)
    prepare(other, allow_mismatch=True)
    with pytest.raises(NnsslError, match="another modality"):
        prepare(other)
    assert looks == [SOURCE] * 3


def test_a_manifest_that_cannot_be_written_is_no_error(plan, raw, looks, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(manifest, "write_atomic", full)
    assert prepare(plan) == prepare(plan)
    assert looks == [SOURCE] * 2


def test_a_case_of_our_own_is_looked_at_without_reading_voxels(plan, raw, monkeypatch, nnunet_env):
    """Preprocessing keeps the intensity range, which in nnU-Net's folders has to be looked for in the image."""
    from nnssl.pretrain.data import CaseFormat, CaseReader, case, intensity_range

    pool, form = prepare(plan), CaseFormat.from_plan(plan)
    (stock,) = prepare_sources(plan, ["Dataset901_Tiny"], n_processes=0, held_out=0.0).cases[:1]
    found = CaseReader(form).open(stock).info.intensity
    assert found.shape == (1, 2) and found[0, 0] < found[0, 1]
    expected = [intensity_range(blosc2.open(str(c.folder / f"{c.name}.b2nd"))) for c in pool.cases]
    monkeypatch.setattr(case, "intensity_range", None)
    for ref, values in zip(pool.cases, expected):
        info = CaseReader(form).open(ref).info
        assert np.array_equal(info.intensity, values) and info.intensity.dtype == np.float32
    with pytest.raises(TypeError):
        CaseReader(form).open(stock)


# ---- weights ---------------------------------------------------------------------------------------------------------------


def test_weights_are_read_from_the_command_and_from_python(plan, raw):
    one = {"Dataset901_Tiny": 1.0, "Dataset902_Free": 8.0}
    assert parse_sources(["902:8", "901"]) == (one, True)
    assert parse_sources({902: 8, "Dataset901_Tiny": 1}) == (one, True)
    assert parse_sources([901, "902"]) == (dict.fromkeys(one, 1.0), False)
    assert parse_sources("902:0.5")[0] == {"Dataset902_Free": 0.5}
    assert relative(one) == relative({k: 0.1 * v for k, v in one.items()}) == one
    assert relative({"a": 3.0, "b": 3.0}) is None
    for bad in ("902:0", "902:-1", "902:nan", "902:inf"):
        with pytest.raises(NnsslError, match="above 0"):
            parse_sources(["901", bad])
    with pytest.raises(NnsslError, match="number is wanted after the colon"):
        parse_sources(["902:eight"])
    with pytest.raises(NnsslError, match="twice, with different weights"):
        parse_sources(["902:8", "Dataset902_Free:4"])
    with pytest.raises(NnsslError, match="name at least one"):
        parse_sources([])


def test_cases_are_drawn_as_often_as_their_weights_say(plan, raw):
    pool = prepare_sources(plan, ["Dataset901_Tiny", SOURCE], n_processes=0, held_out=0.0)
    weights = case_weights(pool.train, {"Dataset901_Tiny": 1.0, SOURCE: 8.0})
    counts = np.zeros(len(pool.train))
    for step in range(2000):
        np.add.at(counts, draw_cases(3, step, TRAIN, len(pool.train), 1, weights / weights.sum()), 1)
    free = np.array([r.source == SOURCE for r in pool.train])
    share = counts[free].sum() / counts.sum()
    assert share == pytest.approx(7 * 8 / (7 * 8 + 2), abs=0.02)
    assert counts[free].std() / counts[free].mean() < 0.15
    request = CropRequest(size=(8, 8, 8), read_size=(8, 8, 8))
    stream = SampleStream(3, 2, weights=weights)
    a, b = (list(make_loader(pool, plan, request, stream, range(4), num_workers=n)) for n in (0, 1))
    assert [x.case for x in a] == [x.case for x in b]
    later = list(make_loader(pool, plan, request, stream, range(2, 4)))
    assert [x.case for x in later] == [x.case for x in a[2:]]
    assert case_weights(pool.train, None) is None
    with pytest.raises(NnsslError, match="no case to learn from of Dataset903"):
        case_weights(pool.train, {"Dataset901_Tiny": 1.0, SOURCE: 8.0, "Dataset903_X": 1.0})


def test_weights_are_part_of_what_a_run_is(plan, raw):
    common = {"target": 901, "method": "mae", "device": "cpu", "epochs": 1, "iterations": 1, "processes": 1}
    common["options"] = {"workers": 0, "held_out_batches": 1, "picture_every": 0}
    done = run(["901", "902:8"], **common)
    saved = json.loads((done.folder / "config.json").read_text())
    assert saved["identity"]["weights"] == {"Dataset901_Tiny": 1.0, "Dataset902_Free": 8.0}
    with pytest.raises(NnsslError, match="weights: .* in the folder, None now"):
        run([901, 902], **common)
    with pytest.raises(NnsslError, match="finished. Nothing is to be done"):
        run({901: 2, 902: 16}, **common)
    go_on = {"target": 901, "method": "mae", "device": "cpu", "continue_run": True, "processes": 1}
    assert run([901, 902], **go_on).checkpoint == done.checkpoint
    with pytest.raises(NnsslError, match="weights"):
        run(["901:3", "902"], **go_on)
    assert run(["901:2", "902:16"], **common | {"continue_run": "auto"}).checkpoint == done.checkpoint
