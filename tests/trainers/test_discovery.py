"""Discovery without an installation: the variable, the shim through nnU-Net's own search, the list, the command."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from nnssl import trainers
from nnssl.trainers import cli, discovery

ROOT = Path(__file__).resolve().parents[2]


def find(name, folder=None):
    """nnU-Net's search of one folder of ``nnUNet_extTrainer`` (its search of its own tree takes seconds)."""
    from nnunetv2.utilities.find_class_by_name import recursive_find_python_class

    folder = folder or discovery.shim_folder()
    return recursive_find_python_class(folder, name, None, base_folder=folder, cleanup_imports_from_base_folder=True)


def test_activate_keeps_the_users_folders_and_is_idempotent(monkeypatch, tmp_path):
    folder = discovery.shim_folder()
    monkeypatch.delenv("nnUNet_extTrainer", raising=False)
    assert not discovery.is_active(folder)
    discovery.activate()
    assert os.environ["nnUNet_extTrainer"] == folder
    monkeypatch.setenv("nnUNet_extTrainer", str(tmp_path))
    for _ in range(2):
        discovery.activate()
        assert os.environ["nnUNet_extTrainer"] == os.pathsep.join([str(tmp_path), folder])
    assert discovery.is_active(folder)


def test_activate_leaves_the_variable_alone_where_the_folder_is_gone(monkeypatch, tmp_path):
    monkeypatch.delenv("nnUNet_extTrainer", raising=False)
    discovery.activate(str(tmp_path / "moved"))
    assert "nnUNet_extTrainer" not in os.environ
    monkeypatch.setenv("nnUNet_extTrainer", "")
    discovery.activate(str(tmp_path))
    assert os.environ["nnUNet_extTrainer"] == str(tmp_path)


def test_the_shim_folder_holds_one_module_that_is_not_called_nnssl():
    assert [p.name for p in Path(discovery.shim_folder()).glob("*.py")] == ["nnssl_trainers_shim.py"]


@pytest.mark.parametrize("name", sorted(trainers.TRAINERS))
def test_nnunet_finds_the_installed_class_at_each_look_up(name):
    found = find(name)
    assert found is getattr(trainers, name) is find(name)
    assert found.__module__.startswith("nnssl.trainers")
    assert pickle.loads(pickle.dumps(found)) is found
    assert "nnssl_trainers_shim" not in sys.modules


def test_names_can_be_part_of_nnunets_folder_names():
    assert not [name for name in trainers.TRAINERS if "__" in name]
    assert set(trainers.__all__) == {"TRAINERS", *trainers.TRAINERS}
    assert set(trainers.TRAINERS) <= set(dir(trainers))
    with pytest.raises(AttributeError, match="nnUNetTrainerMissing"):
        trainers.nnUNetTrainerMissing  # noqa: B018


def test_an_unimportable_package_warns_and_does_not_end_the_search(monkeypatch, tmp_path):
    (tmp_path / "zz_mine.py").write_text("class Mine: pass\n")
    shim = Path(discovery.shim_folder(), "nnssl_trainers_shim.py")
    (tmp_path / shim.name).write_text(shim.read_text())
    monkeypatch.setitem(sys.modules, "nnssl.trainers", None)
    monkeypatch.delattr(sys.modules["nnssl"], "trainers")
    with pytest.warns(UserWarning, match="cannot be imported.*nnssl_trainers"):
        assert find("Mine", str(tmp_path)).__name__ == "Mine"


def run(code, **options):
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "nnUNet_extTrainer")}
    command = [sys.executable, *options.pop("flags", ()), "-c", code]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True, **options)


def test_importing_the_packages_is_light():
    heavy = "[m for m in ('torch', 'numpy', 'nnunetv2') if m in sys.modules]"
    out = run(f"import sys, nnssl, nnssl.trainers, nnssl.trainers.discovery; print({heavy})", cwd=ROOT)
    assert out.stdout == "[]\n"


def test_a_checkout_imports_from_its_own_folder_without_being_installed():
    code = "import nnssl.trainers as t, nnssl.pretrain as p; print(t.__file__); print(p.__file__)"
    out = run(code, cwd=ROOT, flags=["-S"])
    assert out.stdout.split() == [str(ROOT / "nnssl" / name / "__init__.py") for name in ("trainers", "pretrain")]


def test_command_lists_trainers_and_tells_whether_they_are_found(capsys, monkeypatch):
    monkeypatch.setenv("nnUNet_extTrainer", discovery.shim_folder())
    assert cli.main([]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[0] == cli.export_line() and "\nActive: " in out
    for name, (_, text) in trainers.TRAINERS.items():
        assert name in out and text in out
    monkeypatch.delenv("nnUNet_extTrainer")
    cli.main([])
    assert "\nNot active: nnUNet_extTrainer does not name" in capsys.readouterr().out


@pytest.mark.parametrize(("installed", "text"), [("2.7.0", "2.7.0 cannot search"), ("2.9rc1", "\nActive: ")])
def test_command_checks_nnunets_version(capsys, monkeypatch, installed, text):
    monkeypatch.setenv("nnUNet_extTrainer", discovery.shim_folder())
    monkeypatch.setattr(cli, "version", lambda _: installed)
    cli.main([])
    assert text in capsys.readouterr().out


def test_command_without_nnunet(capsys, monkeypatch):
    monkeypatch.setattr(cli, "version", lambda name: (_ for _ in ()).throw(cli.PackageNotFoundError(name)))
    cli.main([])
    assert "nnunetv2 is not installed" in capsys.readouterr().out


@pytest.mark.skipif(os.name == "nt", reason="a POSIX shell line")
@pytest.mark.parametrize("before", ["", "/of/the/user"])
def test_export_line_does_what_activate_does(capsys, before):
    assert cli.main(["--export"]) == 0
    line = capsys.readouterr().out.strip()
    out = subprocess.run(
        ["sh", "-c", f'{line}; printf %s "$nnUNet_extTrainer"'],
        env={"nnUNet_extTrainer": before} if before else {},
        capture_output=True,
        text=True,
        check=True,
    )
    assert out.stdout == ":".join(filter(None, [before, discovery.shim_folder()]))
