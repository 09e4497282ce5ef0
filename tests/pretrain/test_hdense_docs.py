"""The page says what the code does, and its published numbers add up."""

import re
from dataclasses import fields
from pathlib import Path

import pytest

from nnssl.pretrain.methods import get_method

PAGE = (Path(__file__).parents[2] / "docs" / "methods" / "hdense.md").read_text(encoding="utf-8")


def test_presets_and_options_exist():
    cls = get_method("hdense")
    names = {f.name for f in fields(cls.Config)}
    table = PAGE.split("| `-o preset=` |")[1].split("\n\n")[0]
    listed = set(re.findall(r"^\| `(\w+)`", table, re.MULTILINE))
    assert listed | set(re.findall(r"preset=(\w+)", PAGE)) == {*cls.presets, *get_method("vox2vec").presets}
    assert {name for preset in cls.presets.values() for name in preset} <= names
    flags = [row.split("|")[5] for row in PAGE.splitlines() if row.startswith("|") and row.count("|") == 6]
    named = {flag for cell in flags for flag in re.findall(r"`(\w+)`", cell)}
    assert len(named) >= 7 and named <= names


def test_published_rows_add_up():
    """Overall is the mean over labels, where the two kidneys and the two adrenal glands count as two each."""
    rows = [r.strip("| ").split(" | ") for r in PAGE.splitlines() if r.count("|") == 13]
    rows = [[float(x) for x in r[1:]] for r in rows if re.match(r"\d", r[1] if len(r) == 12 else "")]
    assert len(rows) == 5
    for *organs, overall in rows:
        labels = [*organs, organs[1], organs[-1]]
        assert sum(labels) / len(labels) == pytest.approx(overall, abs=0.1)
