"""The example that compares schedules on few labels: the plans and commands that it makes, and its table."""

import importlib.util
import json
from pathlib import Path

import pytest

from nnssl.plans import load_plan

FILE = Path(__file__).resolve().parents[2] / "examples" / "few_labels" / "compare.py"


@pytest.fixture
def example():
    spec = importlib.util.spec_from_file_location("few_labels_compare", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_arms_share_cases_and_an_arm_and_its_control_a_plan(example, dataset, pretraining, capsys, nnunet_env):
    file = pretraining()
    arguments = [
        "-d",
        "901",
        "--checkpoint",
        str(file),
        "--labels",
        "2",
        "--seeds",
        "0",
        "1",
        "--epochs",
        "3",
        "--dry-run",
    ]
    assert example.main(arguments) == 0
    shown = [line for line in capsys.readouterr().out.splitlines() if line.startswith("$ nnUNetv2_train")]
    assert len(shown) == 10
    plans = sorted(p.stem for p in dataset.glob("nnUNetPlans_few-*.json"))
    assert len(plans) == 6
    told = {p: load_plan(901, plans_name=p).nnssl for p in plans}
    for seed in (0, 1):
        mine = [t for p, t in told.items() if p.endswith(f"-n2-s{seed}")]
        assert len(mine) == 3 and all(t["train_cases"] == mine[0]["train_cases"] and t["epochs"] == 3 for t in mine)
    assert told["nnUNetPlans_few-nnunet-n2-s0"]["peak_lr"] == 0.01
    assert example.main(arguments) == 0, "the variants are there and are used again"


def test_results_that_are_there_are_read(example, dataset, pretraining, capsys, tmp_path):
    arguments = ["-d", "901", "--checkpoint", str(pretraining()), "--arms", "default", "nnunet", "--seeds", "0", "1"]
    arguments += ["--labels", "1", "--csv", str(tmp_path / "out.csv")]
    args = example.parse(arguments)
    for seed in (0, 1):
        for arm, value in (("default", 0.8 + seed / 10), ("nnunet", 0.7)):
            _, summary = example.commands(args, arm, example.variant_of(args, arm, seed))
            summary.parent.mkdir(parents=True)
            summary.write_text(json.dumps({"foreground_mean": {"Dice": value}}))
    assert example.main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["default", "2", "0.8500", "0.0707", "0.1500", "0.0707"]
    assert (tmp_path / "out.csv").read_text().splitlines()[1] == "default,1,0,0.8"
