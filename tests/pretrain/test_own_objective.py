"""An objective outside of this repository: a file by its path, and an installed package, up to the fine-tuning trainer."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nnssl import checkpoint
from nnssl.errors import NnsslError
from nnssl.pretrain import run
from nnssl.pretrain.methods import registry
from nnssl.results import find_pretrainings

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "own_objective"
SMALL = {"features": (4, 8, 8), "patch": (16, 16, 16)}


@pytest.fixture(autouse=True)
def forget():
    """The registry as it was."""
    registry.discover()
    before = dict(registry._METHODS)
    yield
    registry._METHODS.clear()
    registry._METHODS.update(before)
    registry._from_file.cache_clear()


def test_the_documented_objective_is_short():
    text = (EXAMPLE / "simclr.py").read_text()
    assert len(text.splitlines()) < 70
    assert "examples/own_objective" in (ROOT / "CONTRIBUTING.md").read_text()


def test_a_file_is_trained_resumed_and_found_by_the_trainers(tiny_preprocessed, nnunet_env):
    tiny_preprocessed(901, "Tiny", 5, plan_options=SMALL)
    file = shutil.copy(EXAMPLE / "simclr.py", nnunet_env.raw.parent / "simclr.py")
    options = {"batch_size": 4, "workers": 0, "picture_every": 0, "held_out_batches": 1}
    common = {"method": str(file), "device": "cpu", "processes": 1, "robustness_every": 0, "crop": (8, 8, 8)}
    straight = run(901, epochs=2, iterations=2, options=options, **common)
    assert straight.finished and straight.folder.name.startswith("nnsslSimclr")
    again = run(901, continue_run=True, **{k: v for k, v in common.items() if k != "crop"})
    assert again.checkpoint == straight.checkpoint
    record = json.loads((straight.folder / "config.json").read_text())
    assert record["method"] == "simclr" and record["objective"]["file"] == str(file)
    assert len(record["objective"]["sha256"]) == 64
    from nnssl.plans import load_plan

    (found,) = find_pretrainings(load_plan(901))
    assert found.folder == straight.folder
    weights = checkpoint.load(straight.checkpoint)
    assert weights.method == "simclr" and all(torch.isfinite(w).all() for w in weights.weights.values())


def test_what_is_wrong_with_a_file_is_told(tmp_path):
    with pytest.raises(NnsslError, match=r"no such Python file"):
        registry.get_method(str(tmp_path / "none.py"))
    (tmp_path / "broken.py").write_text("import nothing_of_this_name\n")
    with pytest.raises(NnsslError, match=r"broken.py cannot be imported: ModuleNotFoundError"):
        registry.get_method(str(tmp_path / "broken.py"))
    (tmp_path / "empty.py").write_text("x = 1\n")
    with pytest.raises(NnsslError, match=r"one class with @register.* is wanted, 0 are in it"):
        registry.get_method(str(tmp_path / "empty.py"))
    text = re.sub('register\\("simclr"', 'register("macl"', (EXAMPLE / "simclr.py").read_text())
    (tmp_path / "taken.py").write_text(text)
    with pytest.raises(NnsslError, match=r"two methods are named 'macl'"):
        registry.get_method(str(tmp_path / "taken.py"))


@pytest.mark.slow
def test_an_installed_package_is_listed(tmp_path):
    """And one that cannot be imported takes no other method along."""
    source, site = tmp_path / "source", tmp_path / "site"
    shutil.copytree(EXAMPLE, source)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q", "install", "--no-deps", "--no-index"]
    subprocess.run([*pip, "--no-build-isolation", "--target", site, source], check=True)
    broken = site / "broken-1.0.dist-info"
    broken.mkdir()
    (broken / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
    (broken / "entry_points.txt").write_text("[nnssl.methods]\nother = not_there_at_all\n")
    command = [sys.executable, "-W", "ignore", "-m", "nnssl.pretrain.cli", "--list"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": f"{ROOT}:{site}"})
    assert done.returncode == 0, done.stderr
    assert re.search(r"simclr\s+SimCLR", done.stdout) and "macl" in done.stdout
    assert "Method 'other' of package broken is left out: ModuleNotFoundError" in done.stdout + done.stderr
