"""The page says what the code does."""

import inspect
import re
from dataclasses import fields
from pathlib import Path

from nnssl.pretrain.methods import get_method
from nnssl.pretrain.methods.voco.grid import choose_grid

PAGE = (Path(__file__).parents[2] / "docs" / "methods" / "voco.md").read_text(encoding="utf-8")


def test_presets_and_options_exist():
    cls = get_method("voco")
    names = {f.name for f in fields(cls.Config)}
    sentence = PAGE.split("Presets (`-o preset=...`): ")[1].split(". ")[0]
    assert set(re.findall(r"`(\w+)`", sentence)) == set(cls.presets)
    assert set(re.findall(r"preset=(\w+)", PAGE)) <= set(cls.presets)
    flags = [row.split("|")[6] for row in PAGE.splitlines() if row.startswith("|") and row.count("|") == 7]
    named = {flag for cell in flags for flag in re.findall(r"`(\w+)`", cell)}
    assert len(named) >= 15 and named <= names
    assert set(re.findall(r"-o (\w+)=", PAGE)) <= names | {"preset"}


def test_numbers_of_the_table_are_logged():
    source = inspect.getsource(inspect.getmodule(get_method("voco")))
    table = PAGE.split("| number | means |")[1].split("\n\n")[0]
    for name in re.findall(r"^\| (.*?) \|", table, re.MULTILINE):
        assert all(f'"{n}"' in source for n in re.findall(r"`(\w+)`", name)), name


def test_grids_of_the_table():
    asked = [
        ((128, 128, 128), (250, 400, 400), (32, 32, 32), (1, 1, 1)),
        ((28, 256, 256), (30, 512, 512), (4, 64, 64), (5, 1, 1)),
        ((28, 256, 256), (30, 256, 256), (4, 64, 64), (5, 1, 1)),
        ((20, 256, 224), (20, 256, 216), (4, 32, 32), (6, 1, 1)),
        ((128, 128, 128), (140, 170, 140), (32, 32, 32), (1, 1, 1)),
        ((40, 56, 40), (35, 50, 35), (8, 8, 8), (1, 1, 1)),
    ]
    rows = re.findall(r"\| (\d+x\d+x\d+) \| (\d+x\d+x\d+) \|$", PAGE, re.MULTILINE)
    found = [choose_grid(*a) for a in asked]
    assert rows == [("x".join(map(str, f.size)), "x".join(map(str, f.grid))) for f in found]
