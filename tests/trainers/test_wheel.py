"""The built wheel in a fresh environment that shares this one's packages: contents, discovery by stock nnU-Net, silence."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("setuptools")
pytest.importorskip("pip")

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = "Scripts" if os.name == "nt" else "bin"


def run(*command, cwd, **variables):
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "nnUNet_extTrainer")}
    done = subprocess.run(
        [str(c) for c in command], cwd=cwd, env={**environment, **variables}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of what is packaged: builds leave files behind."""
    folder = tmp_path_factory.mktemp("checkout") / "repo"
    folder.mkdir()
    for name in ("nnssl", "pretrain", "trainers", "experiments"):
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        if (ROOT / name).is_file():
            shutil.copy(ROOT / name, folder / name)
    return folder


PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
NO_NET = ["--no-build-isolation", "--no-deps", "--no-index"]


@pytest.fixture(scope="module")
def wheel(checkout, tmp_path_factory):
    target = tmp_path_factory.mktemp("wheel")
    run(*PIP, "wheel", *NO_NET, "-w", target, checkout, cwd=target)
    (path,) = target.glob("*.whl")
    return path


class Environment:
    def __init__(self, folder, source, *, share, editable=False):
        run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
        self.folder = folder
        self.python = folder / SCRIPTS / "python"
        self.site = Path(
            run(self.python, "-c", "import sysconfig as s; print(s.get_path('purelib'))", cwd=folder).stdout.strip()
        )
        if share:
            # as lines, these folders come last on sys.path and their own .pth files (an editable nnssl) are not read
            parents = [p for p in sys.path if Path(p).name in ("site-packages", "dist-packages")]
            (self.site / "zz_parent.pth").write_text("\n".join(parents) + "\n")
        self.pip("install", *NO_NET, *(["-e"] if editable else []), source)

    def pip(self, *arguments):
        run(
            sys.executable,
            "-m",
            "pip",
            "--python",
            self.python,
            "--disable-pip-version-check",
            "-q",
            *arguments,
            cwd=self.folder,
        )

    def __call__(self, *arguments, cwd=None, **variables):
        done = run(self.python, *arguments, cwd=cwd or self.folder, **variables)
        return done.stdout.strip()


@pytest.fixture(scope="module")
def bare(wheel, tmp_path_factory):
    """Nothing but the wheel: no nnunetv2, no torch."""
    return Environment(tmp_path_factory.mktemp("bare") / "venv", wheel, share=False)


@pytest.fixture(scope="module")
def shared(wheel, tmp_path_factory):
    return Environment(tmp_path_factory.mktemp("shared") / "venv", wheel, share=True)


def shim(environment):
    return str(environment.site / "nnssl" / "trainers" / "extension")


SHOW = "import os; print(os.environ.get('nnUNet_extTrainer'))"


def test_wheel_holds_every_module_and_no_other_top_level_name(wheel):
    names = {n for n in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in n}
    expected = {"_nnssl_discovery.py", "nnssl_discovery.pth", "nnssl/py.typed", "nnssl/experiments/report.html.j2"}
    for folder, target in [("nnssl", "nnssl"), *((n, f"nnssl/{n}") for n in ("pretrain", "trainers", "experiments"))]:
        expected |= {f"{target}/{p.relative_to(ROOT / folder).as_posix()}" for p in (ROOT / folder).rglob("*.py")}
    assert names == expected


def test_silent_cheap_and_idempotent_without_nnunet(bare):
    done = run(bare.python, "-W", "error", "-c", SHOW, cwd=bare.folder)
    assert (done.stdout.strip(), done.stderr) == (shim(bare), "")
    new = bare(
        "-c", "import sys; print([m for m in sys.modules if 'nnssl' in m or m in ('torch', 'nnunetv2', 'json')])"
    )
    assert new == "['_nnssl_discovery']"
    child = f"import subprocess, sys; sys.exit(subprocess.call([sys.executable, '-c', {SHOW!r}]))"
    assert bare("-c", child) == shim(bare)


def test_the_users_variable_stays_and_comes_first(bare):
    both = os.pathsep.join(["/of/the/user", shim(bare)])
    assert bare("-c", SHOW, nnUNet_extTrainer="/of/the/user") == both
    assert bare("-c", SHOW, nnUNet_extTrainer=both) == both
    assert bare("-c", SHOW, nnUNet_extTrainer="") == shim(bare)


@pytest.mark.slow
def test_uninstalling_leaves_nothing(wheel, tmp_path):
    environment = Environment(tmp_path / "venv", wheel, share=False)
    environment.pip("uninstall", "-y", "nnssl")
    done = run(environment.python, "-c", SHOW, cwd=tmp_path)
    assert (done.stdout.strip(), done.stderr) == ("None", "")
    assert not list(environment.site.rglob("*nnssl*"))


@pytest.mark.slow
def test_an_editable_install_is_discovered_too(checkout, tmp_path):
    environment = Environment(tmp_path / "venv", checkout, share=True, editable=True)
    assert environment("-c", SHOW, cwd=tmp_path) == str(checkout / "trainers" / "extension")
    where = environment("-c", "import nnssl.trainers, nnssl.pretrain; print(nnssl.trainers.__file__)", cwd=tmp_path)
    assert where == str(checkout / "nnssl" / "trainers" / "__init__.py")


@pytest.mark.slow
def test_pythonpath_decides_which_checkout_is_imported(checkout, tmp_path):
    """A copy that is being changed is what is tested, also where another checkout is installed."""
    environment = Environment(tmp_path / "venv", checkout, share=True, editable=True)
    copy = tmp_path / "copy"
    shutil.copytree(checkout, copy, symlinks=True)
    names = ("pretrain", "trainers", "experiments", "weights")
    code = f"import importlib as i; print([i.import_module('nnssl.' + n).__file__ for n in {names[:2]}])"
    light = [str(checkout / "nnssl" / n / "__init__.py") for n in names[:2]]
    assert environment("-c", code, cwd=tmp_path) == str(light)
    code = f"import importlib.util as u; print([u.find_spec('nnssl.' + n).origin for n in {names}])"
    wanted = [str(copy / "nnssl" / n / "__init__.py") for n in names]
    assert environment("-c", code, cwd=tmp_path, PYTHONPATH=str(copy)) == str(wanted)


def test_the_checkout_as_working_directory_does_not_break_the_wheel(bare, checkout):
    code = "import nnssl.trainers, nnssl.pretrain; print(nnssl.trainers.__file__)"
    assert bare("-c", code, cwd=checkout) == str(checkout / "nnssl" / "trainers" / "__init__.py")
    done = run(bare.python.parent / "nnssl_trainers", cwd=checkout)
    assert "nnUNetTrainerPretrained" in done.stdout and "nnunetv2 is not installed" in done.stdout


@pytest.mark.slow
def test_sdist_builds_the_same_wheel(checkout, wheel, tmp_path):
    pytest.importorskip("build")
    run(sys.executable, "-m", "build", "--sdist", "--no-isolation", "-o", tmp_path, checkout, cwd=tmp_path)
    (sdist,) = tmp_path.glob("*.tar.gz")
    run(*PIP, "wheel", *NO_NET, "-w", tmp_path / "w", sdist, cwd=tmp_path)
    (again,) = (tmp_path / "w").glob("*.whl")
    assert set(zipfile.ZipFile(again).namelist()) == set(zipfile.ZipFile(wheel).namelist())


LOOK_UP = """
import multiprocessing, pickle, sys
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name as find

def child(name):
    return find(name).__module__

if __name__ == "__main__":
    found = [find(name) for name in ("nnUNetTrainerPretrained", "nnUNetTrainerPretrainedScratch")]
    assert found[0] is find("nnUNetTrainerPretrained")
    assert pickle.loads(pickle.dumps(found)) == found
    assert find("nnUNetTrainerOfTheUser").__module__ == "users_trainer"
    import nnssl
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        print("FOUND", pool.apply(child, ("nnUNetTrainerPretrained",)), nnssl.__file__)
"""


@pytest.mark.slow
def test_stock_nnunet_finds_the_trainers(shared, tmp_path):
    """From another directory, beside a folder of the user's, and in spawned processes."""
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "users_trainer.py").write_text(
        "from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer\n"
        "class nnUNetTrainerOfTheUser(nnUNetTrainer): pass\n"
    )
    script = tmp_path / "look_up.py"
    script.write_text(LOOK_UP)
    out = shared(script, cwd=tmp_path, nnUNet_extTrainer=str(mine))
    assert f"FOUND nnssl.trainers.pretrained {shared.site / 'nnssl' / '__init__.py'}" in out
    assert out.index(f"Searching in: {mine}") < out.index(f"Searching in: {shim(shared)}")


@pytest.mark.slow
def test_stock_command_finds_the_trainer_from_the_checkout(shared, checkout, tmp_path):
    """``python -m`` puts the checkout before the wheel; training ends at the missing plans, which come after the trainer."""
    folders = {f"nnUNet_{k}": str(tmp_path / k) for k in ("raw", "preprocessed", "results")}
    module = ["-m", "nnunetv2.run.run_training", "Dataset901_Tiny", "3d_fullres", "0"]
    command = [str(shared.python), *module, "-tr", "nnUNetTrainerPretrained", "-device", "cpu"]
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "nnUNet_extTrainer")} | folders
    done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)
    assert f"Using trainer 'nnUNetTrainerPretrained' from: {shim(shared)}" in done.stdout
    assert "FileNotFoundError" in done.stderr and "nnUNetPlans.json" in done.stderr
