"""Offline: crops from preprocessed files, checkpoints grouped by run, tables, TIS from a CSV, and the command."""

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from nnssl import checkpoint
from nnssl.errors import NnsslError
from nnssl.networks import build_network
from nnssl.plans import load_plan
from nnssl.preprocessed import list_cases
from nnssl.transferability import compare
from nnssl.transferability.checkpoints import Measured
from nnssl.transferability.cli import main
from nnssl.transferability.crops import choose_cases, crop_size, read_crops


@pytest.fixture
def dataset(tiny_preprocessed):
    """Eight cases and the plan of a three-stage network."""
    tiny_preprocessed(901, n=8)
    return load_plan(901)


def save(path, plan, seed, step=None, scale=0.0, method="macl", **extra):
    """One of our checkpoints of a random network."""
    torch.manual_seed(seed)
    network = build_network(plan)
    with torch.no_grad():
        for p in network.encoder.parameters():
            p.add_(scale * torch.randn_like(p))
    path.parent.mkdir(parents=True, exist_ok=True)
    payload = checkpoint.build_payload(
        network,
        plan,
        method=method,
        config={"lr": 0.1},
        crop_size=(16, 24, 16),
        pretrained_parts={"encoder": True, "decoder_stages": []},
        data={"fingerprint": "x"},
        **({} if step is None else {"step": step}),
        **extra,
    )
    checkpoint.save(path, payload)
    return path


@pytest.fixture
def runs(dataset, tmp_path):
    """Two runs: four of our checkpoints and two of stock nnU-Net's."""
    ours = [save(tmp_path / "runA" / f"step_{i}.pth", dataset, i, step=10 * i, scale=0.1) for i in (3, 1, 2)]
    ours.append(save(tmp_path / "runA" / "checkpoint_final.pth", dataset, 3, step=30, scale=0.1))
    stock = []
    for i in (1, 2):
        torch.manual_seed(50 + i)
        content = {
            "network_weights": build_network(dataset).state_dict(),
            "trainer_name": "nnUNetTrainer",
            "current_epoch": i,
            "_best_ema": np.float64(0.5),
        }
        (tmp_path / "runB").mkdir(exist_ok=True)
        stock.append(tmp_path / "runB" / f"checkpoint_{'best' if i == 1 else 'final'}.pth")
        torch.save(content, stock[-1])
    return ours + stock


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"patch": (16, 24, 16), "median_shape": (20, 28, 20)}, (16, 24, 16)),
        ({"patch": (40, 56, 40), "median_shape": (36, 50, 35)}, (36, 48, 32)),
        ({"patch": (4, 4, 4), "median_shape": (3, 3, 3)}, (8, 4, 4)),
        ({"patch": (128, 128, 128), "median_shape": (300, 400, 400)}, (100, 100, 104)),
        ({"patch": (64, 96, 80), "strides": ((1, 1, 1), (1, 2, 2), (2, 2, 2), (1, 2, 2))}, (20, 24, 16)),
    ],
)
def test_crop_size(plan_of, options, expected):
    plan = plan_of(**options)
    size = crop_size(plan)
    assert all(s % t == 0 for s, t in zip(size, plan.total_stride)) and math.prod(size) <= 2**20 + 2**17
    assert math.prod(s // t for s, t in zip(size, plan.total_stride)) > 1
    assert sorted(size) == sorted(expected)


def test_crops_are_fixed_by_seed_and_name(dataset, nnunet_env):
    folder = nnunet_env.preprocessed / dataset.dataset_name / dataset.data_identifier
    names = list_cases(folder)
    assert len(names) == 8 and not any(n.endswith("_seg") for n in names)
    size = (8, 12, 16)
    a = read_crops([(folder, n) for n in names], dataset, size, seed=1)
    b = read_crops([(folder, n) for n in reversed(names)], dataset, size, seed=1)
    assert a.data.shape == (8, 1, *size) and a.case == names
    assert torch.equal(a.data, b.data.flip(0)) and torch.equal(a.intensity, b.intensity.flip(0))
    other = read_crops([(folder, n) for n in names], dataset, size, seed=2)
    assert not torch.equal(a.data, other.data)
    assert (a.data.flatten(1).std(dim=1) > 0.05).all() and (a.intensity[..., 1] > a.intensity[..., 0]).all()
    large = read_crops([(folder, names[0])], dataset, (40, 40, 40)).data
    assert float(large[0, 0, 0].abs().max()) == 0.0 and float(large.abs().max()) > 0  # centred, zeros around it


def test_crops_of_a_2d_plan_are_slices(tiny_preprocessed, nnunet_env):
    tiny_preprocessed(902, n=2, both=True)
    plan = load_plan(902, "2d")
    folder = nnunet_env.preprocessed / plan.dataset_name / plan.data_identifier
    crops = read_crops([(folder, n) for n in list_cases(folder)], plan, crop_size(plan))
    assert crops.data.shape == (2, 1, 24, 16)


def test_choosing_cases_does_not_depend_on_the_others():
    names = [f"case_{i}" for i in range(30)]
    chosen = choose_cases(names, 11, seed=3)
    assert len(chosen) == 10 and chosen == sorted(chosen) and chosen != choose_cases(names, 11, seed=4)
    without = [n for n in names if n in chosen or n not in names[:5]]
    assert set(choose_cases(without, 11, seed=3)) == set(chosen)
    assert choose_cases(names[:1], 10) == []


def test_runs_are_grouped_and_nothing_is_ranked_across(dataset, runs, tmp_path):
    found = compare(901, runs, crops=8, random_inits=3, output=tmp_path / "out")
    assert [(r.name, r.method, [m.epoch for m in r.rows]) for r in found.runs] == [
        ("runA", "macl", [10, 20, 30]),
        ("runB", "nnUNetTrainer", [1, 2]),
    ]
    for run in found.runs:
        assert run.best.result.loss == min(m.result.loss for m in run.rows) and run.lead >= 0
    assert len(found.baseline.losses) == 3 and found.baseline.sd > 0 and found.tis == []
    with open(tmp_path / "out" / "robustness.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    assert [r["run"] for r in rows] == ["runA"] * 3 + ["runB"] * 2 + ["random initialisation"] * 3
    assert float(rows[0]["loss_margin_0.5"]) == float(rows[0]["loss"]) == found.runs[0].rows[0].result.loss
    assert (tmp_path / "out" / "robustness.png").read_bytes()[:4] == b"\x89PNG"
    again = compare(901, list(reversed(runs)), crops=8, random_inits=3)
    assert again.baseline == found.baseline and again.files == []
    assert {r.name: r.losses for r in again.runs} == {r.name: r.losses for r in found.runs}


def test_two_runs_in_one_folder_stay_apart(dataset, tmp_path, caplog):
    a = [save(tmp_path / "all" / f"a{i}.pth", dataset, i, step=i) for i in (1, 2)]
    b = [save(tmp_path / "all" / f"b{i}.pth", dataset, 9 + i, step=i, method="mae") for i in (1, 2)]
    found = compare(901, [a[0], b[0], a[1], b[1]], crops=4, random_inits=2)
    assert [(r.name, r.method, len(r.rows)) for r in found.runs] == [("all", "macl", 2), ("all (2)", "mae", 2)]
    same = [save(tmp_path / "s" / f"x{n}.pth", dataset, i, step=5) for i, n in enumerate("ab")]
    assert [m.epoch for m in compare(901, same, crops=4, random_inits=2).runs[0].rows] == [1, 2]
    assert "order given" in caplog.text


def test_tis_beside_its_baselines(dataset, runs, tmp_path):
    dice = tmp_path / "dice.csv"
    lines = ["checkpoint,dice,setup,seed"]
    table = {"step_1.pth": 0.6, "runA/step_2.pth": 0.8, str(runs[0]): 0.7, "scratch": 0.5}
    for seed, shift in ((0, -0.02), (1, 0.02)):
        lines += [f"{name},{value + shift},8 labels,{seed}" for name, value in table.items()]
    lines += ["runB/checkpoint_best.pth,50,8 labels,0", "runB/checkpoint_final.pth,40,8 labels,0"]
    dice.write_text("\n".join(lines))
    found = compare(
        901, [r for r in runs if r.parent.name == "runB" or "step" in r.name], crops=8, dice=dice, output=tmp_path
    )
    a, b = found.tis
    quality = {0: 0.5, 10: 0.6, 20: 0.8, 30: 0.7}
    assert a.best == 20 and a.setup == "8 labels" and a.checkpoints == 3
    assert a.scores["robustness"] == pytest.approx(quality[a.selected] / 0.8)
    assert a.scores["last"] == pytest.approx(0.7 / 0.8) and a.scores["no pretraining"] == pytest.approx(0.5 / 0.8)
    assert a.scores["random pick, trained"] == pytest.approx(np.mean([0.6, 0.8, 0.7]) / 0.8)
    assert -1 <= a.spearman <= 1
    assert b.run == "runB" and b.best == 1 and math.isnan(b.spearman)
    with open(tmp_path / "tis.csv", newline="") as f:
        assert [r["run"] for r in csv.DictReader(f)] == ["runA", "runB"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file,dice\nx,1", "no column checkpoint"),
        ("checkpoint,dice\nx.pth,many", "line 2: dice 'many'"),
        ("checkpoint,dice\nother.pth,0.5", "'other.pth' is none of the measured"),
        ("checkpoint,dice\n", "no lines"),
    ],
)
def test_bad_dice_tables(dataset, tmp_path, text, message):
    (tmp_path / "d.csv").write_text(text)
    file = save(tmp_path / "r" / "c.pth", dataset, 0, step=1)
    with pytest.raises(NnsslError, match=message):
        compare(901, [file], crops=4, random_inits=2, dice=tmp_path / "d.csv")


def test_the_command(dataset, runs, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    dice = tmp_path / "dice.csv"
    dice.write_text(
        "checkpoint,dice\n" + "\n".join(f"{r},{0.5 + 0.01 * i}" for i, r in enumerate(runs[:3])) + "\nscratch,0.4\n"
    )
    arguments = ["-d", "901", "-device", "cpu", "--crops", "6", "--random-inits", "2", *map(str, runs)]
    assert main([*arguments, "--dice", str(dice)]) == 0
    out = capsys.readouterr().out
    for text in (
        "Run runA (macl)",
        "Run runB (nnUNetTrainer)",
        "lowest",
        "within a run only",
        "no pretraining",
        "Spearman",
    ):
        assert text in out
    folder = tmp_path / "transferability_Dataset901_Tiny"
    assert sorted(p.name for p in folder.iterdir()) == ["robustness.csv", "robustness.png", "tis.csv"]
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["-d", "333"], "333"),
        (["-p", "nnUNetPlanz"], "nnUNetPlans"),
        (["--crops", "1"], "at least 2"),
        (["--random-inits", "1"], "at least 2"),
        (["--level", "-9"], "stages only"),
        (["--cases", "nowhere.txt"], "nowhere.txt"),
    ],
)
def test_mistakes_are_told_without_a_traceback(dataset, tmp_path, capsys, monkeypatch, change, message):
    monkeypatch.chdir(tmp_path)
    file = save(tmp_path / "r" / "c.pth", dataset, 0, step=1)
    assert main(["-d", "901", "-device", "cpu", "--crops", "4", str(file), *change]) == 1
    assert message in capsys.readouterr().err


def test_bad_files_are_all_named(dataset, tmp_path, nnunet_env):
    (tmp_path / "a.pth").write_bytes(b"")
    with pytest.raises(NnsslError, match="found 2 problems") as error:
        compare(901, [tmp_path / "a.pth", tmp_path / "gone.pth"], crops=4)
    assert "a.pth is empty" in str(error.value) and "gone.pth" in str(error.value)
    with pytest.raises(NnsslError, match="case 'nobody'"):
        compare(901, [tmp_path / "a.pth"], cases=["nobody", "case_000"])
    with pytest.raises(NnsslError, match="no checkpoint"):
        compare(901, [])
    plan = json.loads((nnunet_env.preprocessed / "Dataset901_Tiny" / "nnUNetPlans.json").read_text())
    plan["configurations"]["3d_fullres"]["data_identifier"] = "elsewhere"
    (nnunet_env.preprocessed / "Dataset901_Tiny" / "nnUNetPlans.json").write_text(json.dumps(plan))
    with pytest.raises(NnsslError, match="nnUNetv2_preprocess -d 901"):
        compare(901, [tmp_path / "a.pth"])


def test_how_long_was_trained_is_told_in_words():
    told = [(1, "epochs"), (3, "epochs"), (1, "steps"), (1750, "steps"), (None, "epochs")]
    texts = [Measured(Path("a.pth"), ("a", ""), "mae", epoch, 100.0, None, unit).trained for epoch, unit in told]
    assert texts == ["1 epoch", "3 epochs", "1 step", "1,750 steps", "-"]
