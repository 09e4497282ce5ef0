"""The demo's own pieces: phantoms, the runner of commands, the commands that it types, and its report."""

from __future__ import annotations

import importlib
import json
import shlex
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import SimpleITK as sitk

DEMO = Path(__file__).resolve().parents[1] / "examples" / "demo"
MODULES = ("phantoms", "runner", "report", "run_demo")


@pytest.fixture
def demo(monkeypatch):
    monkeypatch.syspath_prepend(str(DEMO))
    yield SimpleNamespace(**{name: importlib.import_module(name) for name in MODULES})
    for name in MODULES:
        sys.modules.pop(name, None)


def test_phantoms_differ_and_are_reproducible(demo):
    image, labels, spacing = demo.phantoms.make_case([0, 0, 0])
    again = demo.phantoms.make_case([0, 0, 0])
    assert np.array_equal(image, again[0])
    assert np.array_equal(labels, again[1])
    assert image.shape == labels.shape
    assert image.dtype == np.int16
    assert spacing[0] > 1.8 * spacing[1]
    sizes, contrasts = [], []
    for i in range(4):
        image, labels, _ = demo.phantoms.make_case([0, 0, i])
        inside = [(labels == value) for value in (1, 2)]
        sizes.append([m.sum() for m in inside])
        contrasts.append([np.median(image[m]) / np.median(image[labels == 0]) for m in inside])
    assert np.min(sizes) > 100
    assert np.ptp(sizes, axis=0).min() > 100
    assert np.ptp(contrasts, axis=0).max() > 0.2


def test_phantom_organs_cannot_be_found_by_brightness(demo):
    """The best window of intensities finds the gland badly, even if it is chosen with the labels in hand."""
    image, labels, _ = demo.phantoms.make_case([0, 0, 1])
    gland, best = labels == 1, 0.0
    edges = np.quantile(image[gland], np.linspace(0, 1, 9))
    for i, low in enumerate(edges):
        for high in edges[i + 1 :]:
            found = (image >= low) & (image <= high)
            best = max(best, 2 * (found & gland).sum() / (found.sum() + gland.sum()))
    assert best < 0.5


def test_datasets_are_in_nnunet_format(demo, tmp_path):
    demo.phantoms.write_datasets(tmp_path, labelled=2, unlabelled=1, test=1)
    labelled, unlabelled = tmp_path / demo.phantoms.LABELLED, tmp_path / demo.phantoms.UNLABELLED
    names = {p.name.replace("_0000", "") for p in (labelled / "imagesTr").iterdir()}
    assert names == {p.name for p in (labelled / "labelsTr").iterdir()} == {"case_000.nii.gz", "case_001.nii.gz"}
    assert len(list((labelled / "imagesTs").iterdir())) == len(list((labelled / "labelsTs").iterdir())) == 1
    assert not (unlabelled / "labelsTr").exists()
    assert json.loads((labelled / "dataset.json").read_text())["numTraining"] == 2
    image = sitk.ReadImage(str(unlabelled / "imagesTr" / "scan_000_0000.nii.gz"))
    assert image.GetSpacing()[2] >= 3


def test_runner_times_logs_and_exports(demo, tmp_path, capsys):
    code = "import os; print('value', os.environ['DEMO_VALUE'])"
    runner = demo.runner.Runner(tmp_path, tmp_path / "logs", {}, total=2)
    runner.run(demo.runner.Step("first", "First", [sys.executable, "-c", code], {"DEMO_VALUE": "7"}))
    runner.run(demo.runner.Step("second", "Second", [sys.executable, "-c", code]))
    assert (tmp_path / "logs" / "02_second.log").read_text().strip() == "value 7"
    shown = capsys.readouterr().out
    assert "[1/2] First\n$ export DEMO_VALUE=7\n$ " in shown
    assert shown.count("export") == 1
    assert set(runner.seconds) == {"first", "second"}


def test_runner_shows_the_end_of_a_failing_log(demo, tmp_path):
    runner = demo.runner.Runner(tmp_path, tmp_path / "logs", {}, total=1)
    step = demo.runner.Step("bad", "Bad", [sys.executable, "-c", "print('\\n'.join(map(str, range(99)))); exit(3)"])
    with pytest.raises(demo.runner.StepFailed, match=r"status 3") as caught:
        runner.run(step)
    assert "\n98\n" in str(caught.value)
    assert "\n70\n" not in str(caught.value)
    assert "01_bad.log" in str(caught.value)
    with pytest.raises(demo.runner.StepFailed, match="cannot be started"):
        runner.run(demo.runner.Step("none", "None", [str(tmp_path / "no_such_command")]))


def test_runner_runs_steps_side_by_side(demo, tmp_path, capsys):
    """Each waits for the other's file, which only ends where both run at once."""
    code = "import pathlib, sys, time; pathlib.Path(sys.argv[1]).touch()\n"
    code += "while not pathlib.Path(sys.argv[2]).exists(): time.sleep(0.01)"
    step = demo.runner.Step
    steps = [
        step("one", "One", [sys.executable, "-c", code, "a", "b"]),
        step("two", "Two", [sys.executable, "-c", code, "b", "a"], beside=True),
        step("three", "Three", [sys.executable, "-c", ""]),
    ]
    runner = demo.runner.Runner(tmp_path, tmp_path / "logs", {}, total=3)
    for together in demo.runner.groups(steps):
        runner.run(*together)
    shown = capsys.readouterr().out
    assert " a b &\n" in shown
    assert " b a &\n\n$ wait\n" in shown
    assert list(runner.seconds) == ["one", "two", "three"]
    assert sorted(p.name for p in runner.logs.iterdir()) == ["01_one.log", "02_two.log", "03_three.log"]


def test_runner_stops_what_runs_beside_a_failing_step(demo, tmp_path):
    step = demo.runner.Step
    runner = demo.runner.Runner(tmp_path, tmp_path / "logs", {}, total=2)
    wait = "import pathlib, time; pathlib.Path('started').touch(); time.sleep(60)"
    fail = "import pathlib, time\nwhile not pathlib.Path('started').exists(): time.sleep(.01)\nexit(4)"
    start = time.monotonic()
    with pytest.raises(demo.runner.StepFailed, match=r"status 4"):
        runner.run(
            step("a", "A", [sys.executable, "-c", wait]), step("b", "B", [sys.executable, "-c", fail], beside=True)
        )
    assert time.monotonic() - start < 30


def test_last_lines_show_the_state_of_a_progress_bar(demo, tmp_path):
    log = tmp_path / "log"
    log.write_bytes(b"start\n\x1b[32mepoch 1\x1b[0m\nstep 1\rstep 2\rstep 3\n\n")
    assert demo.runner.last_lines(log, 2) == ["epoch 1", "step 3"]
    assert demo.runner.clock(75.9) == "1:15"


def test_commands_of_nnssl_are_accepted_by_their_parsers(demo):
    """Quick and full size type the same commands, and our own parsers take them."""
    from nnssl.plan_command import parser as plan_parser
    from nnssl.pretrain.cli import parser

    parsers = {"nnssl_plan": plan_parser(), "nnssl_pretrain": parser()}
    full = demo.run_demo.steps("demo", demo.run_demo.FULL)
    quick = demo.run_demo.steps("demo", demo.run_demo.QUICK)
    assert [s.command[0] for s in full] == [s.command[0] for s in quick]
    seen = set()
    for step in full:
        if step.command[0] in parsers:
            parsers[step.command[0]].parse_args(step.command[1:])
            seen.add(step.command[0])
    assert seen == set(parsers)
    assert "nnUNetv2_train 901 3d_fullres 0 -tr nnUNetTrainerPretrainedMeanTeacher -p nnUNetPlans_cpu -device cpu" in [
        shlex.join(s.command) for s in full
    ]


def test_prepare_deletes_only_what_a_demo_made(demo, tmp_path):
    mine = tmp_path / "mine" / "nnUNet_raw" / "Dataset001_Precious"
    mine.mkdir(parents=True)
    with pytest.raises(SystemExit, match="not made by the demo"):
        demo.run_demo.prepare(tmp_path / "mine")
    assert mine.is_dir()
    folder = tmp_path / "demo"
    demo.run_demo.prepare(folder)
    (folder / "nnUNet_raw" / "old").mkdir()
    (folder / "notes.txt").write_text("kept")
    demo.run_demo.prepare(folder)
    assert not (folder / "nnUNet_raw" / "old").exists()
    assert (folder / "notes.txt").exists()


def test_report_and_pictures(demo, tmp_path):
    demo.phantoms.write_datasets(tmp_path / "nnUNet_raw", labelled=0, unlabelled=2, test=2)
    labels = tmp_path / "nnUNet_raw" / demo.phantoms.LABELLED / "labelsTs"
    dice = {}
    for name, value in (("pretrained", 0.8), ("scratch", 0.5)):
        out = tmp_path / "predictions" / name
        out.mkdir(parents=True)
        cases = []
        for file in sorted(labels.iterdir()):
            (out / file.name).write_bytes(file.read_bytes())
            metrics = {"1": {"Dice": value}, "2": {"Dice": value - 0.2}}
            cases.append({"prediction_file": f"somewhere/{file.name}", "metrics": metrics})
        (out / "summary.json").write_text(json.dumps({"metric_per_case": cases}))
        dice[name] = demo.report.dice_of(out / "summary.json")
    assert dice["scratch"]["test_000"] == {"gland": 0.5, "bladder": 0.3, "mean": 0.4}
    text = demo.report.summary([("Pretrain", "1:15", "there")], dice, ["demo/pictures/a.png", "demo/pictures/b.png"])
    assert "Pictures in demo/pictures: a.png, b.png" in text
    assert "labels only               0.500  0.300    0.400" in text
    assert "by +0.300 against the same steps on labels only, and were better in 2 of 2" in text
    assert demo.report.measured({0: 0.02, 7: 0.04}).startswith(
        "With the seeds 0, 7 of the phantoms it was +0.030 on average (+0.020 to"
    )
    written = demo.report.write_pictures(tmp_path, dice)
    assert [p.name for p in written] == ["phantoms.png", "predictions.png"]
    assert all(p.stat().st_size > 5000 for p in written)


@pytest.mark.slow
@pytest.mark.long
def test_quick_demo_from_end_to_end(demo, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(sys, "argv", ["run_demo.py", "--quick", "--folder", str(tmp_path / "demo")])
    assert demo.run_demo.main() == 0
    text = (tmp_path / "demo" / "report.txt").read_text()
    assert "pretrained, mean teacher" in text
    assert "is missing" not in text
    assert "pretraining_progress.png" in text
