"""``--list`` says the same whether objectives are read from their source or imported, and the former imports no torch."""

import subprocess
import sys

import pytest

from nnssl.config import describe_options
from nnssl.pretrain import cli, outline
from nnssl.pretrain.methods import list_methods
from nnssl.pretrain.omni import config as omni


@pytest.fixture(autouse=True)
def fresh():
    outline._module.cache_clear()
    outline._value.cache_clear()
    yield
    outline._module.cache_clear()
    outline._value.cache_clear()


def test_every_objective_reads_as_it_imports():
    read, imported = outline.outlines(), list_methods()
    assert list(read) == list(imported)
    for name, cls in imported.items():
        assert read[name] is not cls, f"{name} had to be imported"
        assert all(getattr(read[name], key) == getattr(cls, key) for key in ("name", *outline.SHOWN))
        assert describe_options(read[name].Config) == describe_options(cls.Config)


def test_options_of_the_labelled_stages():
    assert outline.source_value(omni.__name__, "PRESETS") == omni.PRESETS
    read = outline.source_value(omni.__name__, "OmniConfig")
    assert read is not omni.OmniConfig
    assert describe_options(read) == describe_options(omni.OmniConfig)


@pytest.mark.parametrize("method", [None, "macl", "robust"])
def test_nothing_heavy_is_imported(method):
    code = (
        "import sys; from nnssl.pretrain.cli import main; main(sys.argv[1:]); "
        "heavy = {'torch', 'numpy', 'nnunetv2', 'scipy'} & set(sys.modules); sys.exit(f'imported: {heavy}' if heavy else 0)"
    )
    told = ["--list", *(["-m", method] if method else [])]
    done = subprocess.run([sys.executable, "-c", code, *told], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (method or "voco") in done.stdout


def test_what_cannot_be_read_is_imported(monkeypatch, tmp_path):
    """An objective whose options only running its code tells."""
    methods = tmp_path / "pretrain" / "methods"
    methods.mkdir(parents=True)
    (methods / "odd.py").write_text(
        "@dataclass(frozen=True)\nclass Odd:\n    x: int = option(make(), 'computed')\n\n"
        "@register('odd', config=Odd)\nclass Method:\n    title = 'odd'\n"
    )
    monkeypatch.setattr(outline, "ROOT", tmp_path)
    assert outline.outlines() == list_methods()
    assert outline.source_value("nnssl.pretrain.geometry", "choose_crop").__name__ == "choose_crop"


def test_an_unknown_objective_is_refused_with_the_nearest(capsys):
    assert cli.main(["--list", "-m", "mcal"]) == 1
    assert "Did you mean 'macl'" in capsys.readouterr().err
