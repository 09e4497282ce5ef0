"""Rank correlations of a probe and of robustness with fine-tuned Dice, from the three files."""

import importlib
import json
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def order(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("probe_order")


def run(order, monkeypatch, folder, results):
    (folder / "results.csv").write_text(results)
    rows = [("random weights", 40, 0), ("a", 50, 0), ("b", 60, 0), ("b", 20, 3), ("c", 70, 0)]
    content = {
        "rows": [{"name": n, "dice": d, "decoder_stages": k} for n, d, k in rows],
        "checkpoints": [{"name": n, "path": str(folder / f"{n}.pth")} for n in "abc"],
    }
    (folder / "probe.json").write_text(json.dumps(content))
    lines = ["run,method,checkpoint,loss", "random initialisation,,0,0.1", "random initialisation,,1,0.3"]
    lines += [f"r,mae,{folder / n}.pth,{loss}" for n, loss in (("a", 0.3), ("b", 0.4), ("c", 0.5))]
    (folder / "robustness.csv").write_text("\n".join(lines))
    options = [
        "--probe",
        folder / "probe.json",
        "--robustness",
        folder / "robustness.csv",
        "--out",
        folder / "out.json",
    ]
    monkeypatch.setattr("sys.argv", ["probe_order.py", *map(str, (folder / "results.csv", *options))])
    return order.main()


def test_rank_correlations(order, monkeypatch, tmp_path):
    """The probe orders as fine-tuning does but for one neighbouring pair (rho 0.8); robustness the other way round (-0.8)."""
    dice = f"checkpoint,dice,seed\nscratch,60,0\na,72,0\na,68,1\n{tmp_path / 'b.pth'},80,0\nc,75,0\n"
    assert run(order, monkeypatch, tmp_path, dice) == 0
    rows = {r["what"]: r for r in json.loads((tmp_path / "out.json").read_text())["rows"]}
    assert rows["probe, encoder"]["Spearman"] == pytest.approx(0.8) and rows["probe, encoder"]["checkpoints"] == 4
    assert rows["robustness"]["Spearman"] == pytest.approx(-0.8)
    assert rows["probe, with decoder"]["checkpoints"] == 1


def test_a_checkpoint_that_was_not_probed_is_named(order, monkeypatch, tmp_path, capsys):
    assert run(order, monkeypatch, tmp_path, "checkpoint,dice\nz,60\n") == 1
    assert "'z'" in capsys.readouterr().err
