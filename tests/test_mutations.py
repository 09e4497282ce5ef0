"""``make mutants``: the changes that it makes, and that it tells what no test notices."""

import subprocess
import sys
from pathlib import Path

TOOLS = Path(__file__).parent / "tools"
SOURCE = '''
"""A docstring with 1 < 2."""
import torch
LIMIT = 1e-4

def f(x: int = 3, *, keep: bool = True):
    """What it does."""
    if x < 0:
        raise ValueError(f"{x} < 0")
    y = x.abs().amax(1) + torch.where(x > 2, x, 0.5)
    return y.detach() if keep else -y


class A:
    def g(self, x):
        self.n += 1
        return "a" if x and self.n else "b"
'''


def test_changes_of_a_source():
    sys.path.insert(0, str(TOOLS))
    try:
        from mutations import functions, mutations
    finally:
        sys.path.remove(str(TOOLS))
    found = mutations(SOURCE)
    labels = {m.label for m in found}
    assert {
        ": 1e-4 -> 0.01",
        "f: 3 -> 4",
        "f: True -> False",
        "f: x < 0 -> (x <= 0)",
        "f: 0.5 -> 0.75",
        "f: x.abs() -> x",
        "f: x.abs().amax(1) -> x.abs().amin(1)",
        "f: torch.where(x > 2, x, 0.5) -> torch.where(x > 2, 0.5, x)",
        "f: y.detach() -> y",
        "f: keep -> (not keep)",
        "f: -y -> y",
        "A.g: self.n += 1 -> pass",
        "A.g: x and self.n -> (x or self.n)",
    } <= labels
    assert not any("docstring" in m.before or "ValueError" in m.before for m in found)
    for m in found:
        compile(m.source, "mutated", "exec")
        assert m.source != SOURCE and len(m.source.splitlines()) == len(SOURCE.splitlines())
    assert functions(SOURCE) == {"f": (7, 11), "A.g": (16, 17)}


def test_what_would_be_changed_is_listed():
    command = [sys.executable, str(TOOLS / "mutants.py"), "nnssl/losses/equivariance.py", "--list", "--match", "*abs*"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert any(line.endswith("equivariance_loss: (y - target).abs() -> (y - target)") for line in listed)
    assert all(line.startswith("nnssl/losses/equivariance.py:") for line in listed)
