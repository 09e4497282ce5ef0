"""What type checkers say of the public calls: ``tests/typing_public.py`` passes, and misspelt calls do not.

``make lint`` runs mypy over the package and that file; pyright is asked where it is installed.
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
WRONG = {
    "run(500, metod='macl')": "metod",
    "run(500, method=3)": "method",
    "run(500, target=5.0)": "target",
    "run(500).chekpoint": "chekpoint",
    "preprocess([500], prat='1/2')": "prat",
    "checkpoint.load('w.pth', trusted='yes')": "trusted",
    "transfer.apply(network)": "checkpoint",
    "get_method('macl').nothing": "nothing",
}


@pytest.fixture(scope="module")
def wrong(tmp_path_factory):
    """A file with one wrong call a line."""
    file = tmp_path_factory.mktemp("types") / "wrong.py"
    head = [
        "from torch import nn",
        "from nnssl import checkpoint, transfer",
        "from nnssl.pretrain import preprocess, run",
        "from nnssl.pretrain.methods import get_method",
        "network = nn.Identity()",
    ]
    file.write_text("\n".join([*head, *WRONG]) + "\n")
    return file, len(head)


def flagged(output, lines):
    return [any(f"{line}:" in text and "error" in text for text in output.splitlines()) for line in lines]


@pytest.mark.slow
def test_mypy_flags_each_wrong_call(wrong):
    pytest.importorskip("mypy")
    file, head = wrong
    command = [sys.executable, "-m", "mypy", "--config-file", ROOT / "pyproject.toml", file]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout
    lines = [f"wrong.py:{head + 1 + i}" for i in range(len(WRONG))]
    assert dict(zip(WRONG, flagged(out, lines))) == dict.fromkeys(WRONG, True), out


@pytest.mark.slow
def test_mypy_passes_on_the_public_calls():
    pytest.importorskip("mypy")
    command = [sys.executable, "-m", "mypy", "tests/typing_public.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
def test_mypy_passes_on_the_example_of_the_readme(tmp_path):
    pytest.importorskip("mypy")
    (code,) = re.findall(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    (tmp_path / "example.py").write_text(code)
    command = [sys.executable, "-m", "mypy", "--config-file", ROOT / "pyproject.toml", tmp_path / "example.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
def test_pyright_sees_the_same(wrong):
    if shutil.which("pyright") is None:
        pytest.skip("pyright is not installed")
    file, head = wrong
    options = ["--pythonpath", sys.executable, "--project", ROOT]
    clean = subprocess.run(
        ["pyright", *options, ROOT / "tests/typing_public.py"], cwd=ROOT, capture_output=True, text=True
    )
    assert clean.returncode == 0, clean.stdout
    out = subprocess.run(["pyright", *options, file], cwd=ROOT, capture_output=True, text=True).stdout
    lines = [f"wrong.py:{head + 1 + i}" for i in range(len(WRONG))]
    assert dict(zip(WRONG, flagged(out, lines))) == dict.fromkeys(WRONG, True), out
