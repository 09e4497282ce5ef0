"""Labels only against the recommended recipe, with few labels: the part ``recipe`` of gpu.py, through the ordinary commands."""

from __future__ import annotations

import csv
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from common import make_dataset, workspace

EXPERIMENT = Path(__file__).resolve().parents[1] / "examples" / "label_efficiency" / "recipe_gpu.yaml"
TINY = """\
title: Recipe
dataset: 901
methods:
  - scratch
  - mean-teacher
  - {name: mae-mean-teacher, method: mae, training: {schedule: mean-teacher}}
labels: [1]
seeds: 1
pictures: false
mirroring: false
training: {epochs: 3, iterations: 2, val_iterations: 1, val_cases: 1}
pretraining: {epochs: 1, iterations: 2, robustness_every: 0, options: {workers: 0, batch_size: 2}}
environment: {OMP_NUM_THREADS: 1, OMP_WAIT_POLICY: PASSIVE, nnUNet_n_proc_DA: 0, nnUNet_def_n_proc: 1}
"""
FOLDERS = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")
GRACE = 60.0
"""Seconds that an interrupted experiment gets to save what its jobs have done."""


def compare(
    file: Path, output: Path, device: str, minutes: float, jobs: int, env: Mapping[str, str]
) -> tuple[list[dict[str, Any]], list[str]]:
    """Run what is missing of an experiment for some minutes, and read its table.

    Args:
        file: the experiment, as ``nnssl_label_efficiency`` takes it.
        output: its folder; a call that finds it goes on there.
        device: ``cuda`` or ``cpu``.
        minutes: most for this call; then the experiment is interrupted, and its jobs save themselves.
        jobs: how many run at a time.
        env: its environment.

    Returns:
        A row for each method and number of labels with its finished draws, and what is left, in words (empty: nothing).

    Raises:
        RuntimeError: with the last lines of the command, where it failed.
    """
    start = "import sys; from nnssl.experiments.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", start, str(file), "-device", device, "--output", str(output)]
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(
            [*command, "--jobs", str(jobs)],
            env=dict(env),
            stdout=said,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(60 * minutes)
        except subprocess.TimeoutExpired:
            process.terminate()  # SIGINT is ignored where this runs behind nohup
            try:
                process.wait(GRACE)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            code = None
        said.seek(0)
        lines = said.read().strip().splitlines()
    if code:
        raise RuntimeError("\n".join([f"nnssl_label_efficiency {file} ended with exit code {code}:", *lines[-12:]]))
    if code is None:
        subprocess.run([*command, "--report-only"], env=dict(env), capture_output=True, check=False)
    last = next((line for line in reversed(lines) if " of " in line), "")
    left = [] if code == 0 else [f"stopped after {minutes:g} min ({last}); the same call goes on"]
    left += [line for line in lines if " FAILED (" in line]
    return rows_of(output / "table.csv"), left


def rows_of(table: Path) -> list[dict[str, Any]]:
    """Of an experiment's ``table.csv``: mean Dice over labels and draws in %, and the gain over labels only with its interval."""
    if not table.is_file():
        return []
    with table.open(newline="", encoding="utf-8") as text:
        found = [row for row in csv.DictReader(text) if row["label"] == "mean"]
    return [
        {
            "what": f"{row['method']}, {row['labels']} labelled",
            "draws": f"{row['seeds']} of {row['seeds_wanted']}",
            **{key: float(row[key]) for key in ("dice", "dice_sd", "gain", "gain_low", "gain_high") if row[key]},
        }
        for row in found
    ]


def recipe(bench: Any) -> list[dict[str, Any]]:
    """Scratch, the mean teacher from random weights, and from the encoder of a masked autoencoder."""
    device = bench.device.type
    with ExitStack() as stack:
        if bench.tiny:
            folder = stack.enter_context(workspace())
            tiny_dataset()
            file, output, jobs = folder / "recipe.yaml", folder / "experiment", 1
            file.write_text(TINY)
            env = dict(os.environ)
        else:
            file, output, jobs = bench.experiment or EXPERIMENT, bench.folder, 3
            # the other parts work in folders and with settings of their own
            env = {k: v for k, v in os.environ.items() if k not in ("nnUNet_n_proc_DA", "OMP_NUM_THREADS", *FOLDERS)}
            env |= {k: v for k, v in bench.users.items() if v}
        rows, left = compare(file, output, device, bench.minutes, jobs, env)
    bench.left_out.extend(left)
    return rows or [{"what": "no draw has finished yet"}]


def tiny_dataset() -> None:
    """Four cases to learn from, and two more as test cases."""
    make_dataset(6, shape=(24, 24, 24), patch=(16, 16, 16), features=(4, 8, 8), different=6)
    raw = Path(os.environ["nnUNet_raw"]) / "Dataset901_Phantom"
    for kind in ("images", "labels"):
        (raw / f"{kind}Ts").mkdir()
        for file in sorted((raw / f"{kind}Tr").iterdir())[-2:]:
            shutil.move(file, raw / f"{kind}Ts" / file.name)
    preprocessed = Path(os.environ["nnUNet_preprocessed"]) / raw.name
    for part in (raw, preprocessed):
        content = (part / "dataset.json").read_text().replace('"numTraining": 6', '"numTraining": 4')
        (part / "dataset.json").write_text(content)
    (preprocessed / "dataset_fingerprint.json").write_text("{}")  # nnU-Net copies it beside a training
    shutil.copytree(raw / "labelsTr", preprocessed / "gt_segmentations")
    for file in preprocessed.glob("*/case_00000[45]*"):
        file.unlink()
