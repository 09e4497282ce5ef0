"""An experiment with nnU-Net's and this package's real commands, tiny: killed in training and pretraining, then finished."""

import csv
import json
import os
import signal
import subprocess
import sys
import time

import pytest

EXPERIMENT = """
dataset: 901
network: {features: [4, 6, 8], patch: [16, 24, 16]}
methods: [scratch, mae]
labels: [2]
seeds: 1
mirroring: false
training: {epochs: 8, iterations: 2, val_iterations: 1, val_cases: 1}
pretraining: {epochs: 12, iterations: 2, robustness_every: 0, options: {workers: 0, batch_size: 4}}
environment: {OMP_NUM_THREADS: 1, nnUNet_n_proc_DA: 0, nnUNet_def_n_proc: 1, nnUNet_compile: f}
"""


def _kill_once(command, results, pattern, records, phase):
    """Start the program; kill it and its job once the file that the pattern names is there. Returns the job."""
    process = subprocess.Popen(command, start_new_session=True)
    while not list(results.glob(pattern)):
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.02)
    record = next(records.glob(f"{phase}-*.json"))
    os.killpg(json.loads(record.read_text())["pid"], signal.SIGKILL)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return record.stem


@pytest.mark.slow
def test_killed_while_training_then_finished(tiny_preprocessed, tmp_path, nnunet_env):
    pytest.importorskip("surface_distance")
    tiny_preprocessed(901, "Tiny", 5, n_test=2)
    (tmp_path / "tiny.yaml").write_text(EXPERIMENT)
    out = tmp_path / "out"
    code = "import sys; from nnssl.experiments.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", code, str(tmp_path / "tiny.yaml"), "-device", "cpu", "--output", str(out)]
    results = nnunet_env.results / "Dataset901_Tiny"
    begun = {
        "train": "nnUNetTrainerPretrainedScratch*/fold_all/checkpoint_best.pth",
        "pretrain": "nnsslMae*/checkpoint_latest.pth",
    }
    killed = [_kill_once(command, results, pattern, out / "jobs", phase) for phase, pattern in begun.items()]
    assert subprocess.run(command, check=False).returncode == 0
    for log in (out / "logs").glob("*.log"):
        starts = [line for line in log.read_text().splitlines() if line.startswith("$ ")]
        assert len(starts) == (2 if log.stem in killed else 1), "only what was killed was started twice"
        assert all(line.endswith(" --c") for line in starts[1:])
    with (out / "cases.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 2 * 2 and {(r["method"], r["labels"], r["fold"]) for r in rows} == {
        ("scratch", "2", "all"), ("mae", "2", "all")}  # fmt: skip
    with (out / "runs.csv").open(newline="") as file:
        epochs = [(r["method"], r["epoch"], r["step"]) for r in csv.DictReader(file)]
    assert epochs == [(m, str(e), str(2 * e + 2)) for m in ("scratch", "mae") for e in range(8)]
    plans = [json.loads(f.read_text()) for f in (nnunet_env.preprocessed / "Dataset901_Tiny").glob("*tiny-*-n2-*.json")]
    assert len(plans) == 2 and plans[0]["nnssl"]["train_cases"] == plans[1]["nnssl"]["train_cases"]
    for told in (p["nnssl"] for p in plans):
        assert len(told["val_cases"]["all"]) == 1 and set(told["val_cases"]["all"]).isdisjoint(
            told["train_cases"]["all"]
        )
    reports = list(results.glob("nnUNetTrainerPretrained__*/fold_all/transfer_report.json"))
    assert len(reports) == 1, "the pretrained weights were loaded"
    assert all(
        (out / name).is_file() for name in ("table.md", "table.csv", "table.tex", "report.html", "experiment.json")
    )
    page = (out / "report.html").read_text()
    assert "scratch" in page and "mae" in page
