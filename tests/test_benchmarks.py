"""Each benchmark runs on tiny input and gives numbers; how large they are is nobody's business here."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
EXPECTED = {
    "loader": ("what", {"macl", "mae", "hdense"}),
    "step_time": ("method", {"macl", "mae", "glmae", "hdense"}),
    "data_wait": ("workers", {0, 1}),
    "memory": ("cases", {20, 200}),
    "startup": ("start", {"nnU-Net's folder", "own folder, every file", "own folder, manifest"}),
    "ema_infonce": ("what", {"EMA update", "InfoNCE, D=128"}),
    "preprocessing": ("image", {"40x48x40"}),
    "options": ("options", {"none", "checkpointing=true", "accumulate=2"}),
    "growth": ("what", {"step of mae, by voxels", "start, by cases", "step of macl on all ranks, by ranks"}),
    "peers": ("what", {"loader, crops of 16^3", "training step", "--help", "command to the end of its first step"}),
}


def run(name, *arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", BENCHMARKS / f"{name}.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=BENCHMARKS)


def imported(name, monkeypatch):
    for variable in ("OMP_NUM_THREADS", "MPLBACKEND", "nnUNet_n_proc_DA"):  # which the benchmarks set
        monkeypatch.setenv(variable, os.environ.get(variable, "Agg" if variable == "MPLBACKEND" else "1"))
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module(name)


@pytest.fixture
def peers(monkeypatch):
    return imported("peers", monkeypatch)


@pytest.fixture
def growth(monkeypatch):
    return imported("growth", monkeypatch)


def test_run_all_knows_every_benchmark():
    text = (BENCHMARKS / "run_all.py").read_text()
    apart = {
        "common",
        "run_all",
        "nearest_voxel",
        "local_to_global",
        "probe_order",
        "gpu",
        "training",
        "recipe",
        "faults",
    }
    there = {p.stem for p in BENCHMARKS.glob("*.py")} - apart
    assert there == set(EXPECTED)
    assert all(f'"{name}"' in text for name in there)


@pytest.mark.slow
def test_a_benchmark_prints_a_table_and_writes_json(tmp_path):
    out = run("ema_infonce", "--quick", "--out", tmp_path / "out.json")
    assert out.returncode == 0, out.stderr
    assert "| what " in out.stdout and "EMA update" in out.stdout
    content = json.loads((tmp_path / "out.json").read_text())
    assert set(content["machine"]) == {"cores", "architecture", "gpu", "load", "python", "torch", "threads"}
    assert all(row["cpu_ms"] > 0 for row in content["rows"])


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_each_benchmark_runs(name, tmp_path):
    out = run(name, "--quick", "--out", tmp_path / "out.json")
    assert out.returncode == 0, out.stderr[-2000:]
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    key, values = EXPECTED[name]
    assert values <= {row[key] for row in rows}
    if name == "startup":
        looked = {row["start"]: row["files_looked_at"] for row in rows if row["cases"] == 200}
        assert looked["own folder, manifest"] == 0 and looked["own folder, every file"] >= 400
    if name == "loader":
        assert all(row["ratio"] > 0 for row in rows)
    if name == "growth":
        assert all(row["cpu_s"] > 0 for row in rows)
    if name == "peers":
        both = [row for row in rows if row["what"] != "--list"]
        assert all(row["ours"] > 0 and row["nnunet"] > 0 and not row.get("note") for row in both), both
        assert "--peer-checkout" in out.stdout
    if name == "options":
        kept = {row["options"]: row["kept_MiB"] for row in rows}
        assert kept["checkpointing=true"] < 0.6 * kept["none"] and kept["accumulate=4"] < 0.3 * kept["none"]


@pytest.mark.slow
def test_run_all_collects_the_results(tmp_path):
    out = run("run_all", "--quick", "--only", "ema_infonce", "options", "--folder", tmp_path)
    assert out.returncode == 0, out.stderr
    assert [r["benchmark"] for r in json.loads((tmp_path / "results.json").read_text())] == [
        "EMA and InfoNCE",
        "options of the engine",
    ]


def test_the_table_of_peers_has_a_column_for_nnunet_and_says_why_it_has_none_for_another(tmp_path):
    out = run("peers", "--quick", "--only", "loader", "--out", tmp_path / "out.json")
    assert out.returncode == 0, out.stderr[-2000:]
    (row,) = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert row["ours"] > 0 and row["nnunet"] > 0 and "peer" not in row
    assert row["nnunet/ours"].startswith(f"{row['nnunet'] / row['ours']:.2f} (")
    assert "| loader, crops of 16^3 " in out.stdout and "no column of MIC-DKFZ's nnssl" in out.stdout


def test_a_row_of_peers_compares_what_has_an_answer(peers):
    costs = {"ours": iter([9.0, 2.0, 4.0]), "nnunet": iter([9.0, 6.0, 4.0]), "peer": iter([])}

    def side(name):
        try:
            return next(costs[name])
        except StopIteration:
            raise peers.Failed(f"{name}: it broke\n  in two lines") from None

    row = peers.row_of("work", "s", {name: (lambda n=name: side(n)) for name in costs}, 2)
    assert row["ours"] == 3.0 and row["nnunet"] == 5.0 and "peer" not in row
    assert row["nnunet/ours"] == "1.67 (1.00-3.00)" and row["note"] == "peer: it broke in two lines"


def test_a_peer_that_is_not_there_is_named(peers, tmp_path):
    assert "--peer-checkout" in peers.missing(None, None)
    assert str(tmp_path) in peers.missing(tmp_path, "python")


def test_a_slope_is_the_power_of_the_upper_half(growth):
    assert growth.slope([1, 2, 4, 8], [5.0, 5.0, 4.0**1.5, 8.0**1.5]) == pytest.approx(1.5)
    rows = growth.rows_of([("a", 1, 2.0), ("a", 10, 20.0), ("b", 1, 3.0), ("b", 4, 3.0)])
    assert [round(row["slope"], 6) for row in rows] == [1, 1, 0, 0]
    assert [row["times_first"] for row in rows] == [1, 10, 1, 1]


def test_growth_is_drawn(growth, tmp_path):
    growth.draw(growth.rows_of([("a", 1, 2.0), ("a", 10, 20.0), ("a", 100, 30.0)]), tmp_path / "growth.png")
    assert (tmp_path / "growth.png").stat().st_size > 5000


def test_the_gpu_benchmark_says_what_is_missing():
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    out = run("gpu")
    assert out.returncode == 2 and "-device cpu --tiny" in out.stderr


@pytest.mark.slow
def test_every_part_of_the_gpu_benchmark_runs_on_a_cpu(tmp_path):
    """So that a borrowed GPU loses no minute on a part that cannot run."""
    file = tmp_path / "gpu.json"
    out = run("gpu", "-device", "cpu", "--tiny", "--out", file)
    assert out.returncode == 0, out.stdout[-2000:] + out.stderr[-2000:]
    content = json.loads(file.read_text())
    parts = content["parts"]
    assert list(parts) == ["precision", "compile", "nccl", "steps", "waiting", "transfers", "layout", "plans", "recipe"]
    assert all(part["rows"] and not part["left_out"] for part in parts.values())
    assert parts["nccl"]["rows"][0]["gather_right"] is True
    assert all(row["step_over_bare"] > 0 for row in parts["steps"]["rows"])
    arms = {row["what"]: row for row in parts["recipe"]["rows"]}
    assert list(arms) == [f"{name}, 1 labelled" for name in ("scratch", "mean-teacher", "mae-mean-teacher")]
    assert all(row["draws"] == "1 of 1" and 0 <= row["dice"] <= 100 for row in arms.values())
    again = run("gpu", "-device", "cpu", "--tiny", "--out", file, "--only", "transfers")
    assert again.returncode == 0
    assert set(json.loads(file.read_text())["parts"]) == set(parts), "what the file holds of other parts is kept"
