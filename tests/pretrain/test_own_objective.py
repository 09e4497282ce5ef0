"""An objective outside of this repository: a file by its path, and an installed package, up to the fine-tuning trainer."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nnssl import checkpoint
from nnssl.errors import NnsslError
from nnssl.networks import canonical_state_dict
from nnssl.plans import load_plan
from nnssl.pretrain import run
from nnssl.pretrain.cli import main
from nnssl.pretrain.methods import registry
from nnssl.results import find_pretrainings

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "own_objective"
SMALL = {"features": (4, 8, 8), "patch": (16, 16, 16)}
OPTIONS = {"batch_size": 4, "workers": 0, "picture_every": 0, "held_out_batches": 1}
pytestmark = pytest.mark.usefixtures("no_drawing")
COMMON = {"device": "cpu", "epochs": 2, "iterations": 2, "robustness_every": 0, "crop": (8, 8, 8), "options": OPTIONS}


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
    straight = run(901, method=str(file), **COMMON)
    assert straight.finished and straight.folder.name.startswith("nnsslSimclr")
    again = run(901, method=str(file), device="cpu", continue_run=True)
    assert again.checkpoint == straight.checkpoint
    record = json.loads((straight.folder / "config.json").read_text())
    assert record["method"] == "simclr" and record["objective"]["file"] == str(file)
    assert len(record["objective"]["sha256"]) == 64
    (found,) = find_pretrainings(load_plan(901))
    assert found.folder == straight.folder
    weights = checkpoint.load(straight.checkpoint)
    assert weights.method == "simclr" and all(torch.isfinite(w).all() for w in weights.weights.values())


def end(engine):
    raise KeyboardInterrupt


def forget_methods():
    """What a process that has just started knows of objectives."""
    for name in [n for n, cls in registry._METHODS.items() if not cls.__module__.startswith("nnssl.")]:
        del registry._METHODS[name]
    registry._from_file.cache_clear()
    registry.discover.cache_clear()
    for name in [n for n in sys.modules if n in ("simclr", "nnssl_method_simclr")]:
        del sys.modules[name]


@pytest.fixture(params=["file", "package"])
def own(request, tmp_path, monkeypatch):
    """What ``-m`` names: a file beside the working directory's others, or the entry point of an installed package."""
    home = tmp_path / "home"
    home.mkdir()
    shutil.copy(EXAMPLE / "simclr.py", home)
    forget_methods()
    if request.param == "file":
        monkeypatch.chdir(home)
        yield "./simclr.py"
    else:
        about = home / "own_objective-1.0.dist-info"
        about.mkdir()
        (about / "METADATA").write_text("Metadata-Version: 2.1\nName: own_objective\nVersion: 1.0\n")
        (about / "entry_points.txt").write_text("[nnssl.methods]\nsimclr = simclr\n")
        monkeypatch.syspath_prepend(home)
        yield "simclr"
    forget_methods()


def test_an_unfinished_run_goes_on_from_another_folder(
    own, tiny_preprocessed, after_two, tmp_path, monkeypatch, caplog
):
    """By the command that the run has written down, and to the weights of a run that was never ended."""
    tiny_preprocessed(901, "Tiny", 5, plan_options=SMALL)
    straight = run(901, method=own, name="straight", **COMMON)
    with pytest.raises(KeyboardInterrupt):
        run(901, method=own, name="broken", hooks=[after_two(end)], **COMMON)
    folder = straight.folder.with_name(straight.folder.name.replace("straight", "broken"))
    assert checkpoint.load(folder / "checkpoint_latest.pth").training["step"] == 2
    command = json.loads((folder / "config.json").read_text())["command"]
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    forget_methods()
    assert "has changed" not in caplog.text
    with open(tmp_path / "home" / "simclr.py", "a") as file:
        file.write("# another remark\n")
    assert main([*shlex.split(command)[1:], "--c"]) == 0
    assert "simclr.py has changed since this run was started" in caplog.text
    a, b = (checkpoint.load(f / "checkpoint_final.pth").weights for f in (straight.folder, folder))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_a_trainer_starts_from_its_checkpoint_and_needs_the_objective_no_more(
    own, tiny_preprocessed, tmp_path, monkeypatch
):
    from nnssl.trainers import nnUNetTrainerPretrained

    dataset = tiny_preprocessed(901, "Tiny", 5, plan_options=SMALL)
    done = run(901, method=own, **COMMON)
    (tmp_path / "home" / "simclr.py").unlink()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    forget_methods()
    contents = (json.loads((dataset / f"{name}.json").read_text()) for name in ("nnUNetPlans", "dataset"))
    plans, info = contents
    trainer = nnUNetTrainerPretrained({**plans, "continue_training": False}, "3d_fullres", 0, info, torch.device("cpu"))
    trainer.get_dataloaders = lambda: (None, None)
    trainer.on_train_start()
    stored, network = checkpoint.load(done.checkpoint).weights, canonical_state_dict(trainer.network)
    encoder = [n for n in network if n.startswith("encoder.")]
    assert encoder and all(torch.equal(network[n], stored[n]) for n in encoder)
    drawn = [n for n in network if n.startswith("decoder.") and ".conv.weight" in n and ".encoder." not in n]
    assert drawn and not any(torch.equal(network[n], stored[n]) for n in drawn)
    report = json.loads((Path(trainer.output_folder) / "transfer_report.json").read_text())
    assert report["method"] == "simclr" and report["report"]["parts"]["encoder"]["random"] == 0


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
