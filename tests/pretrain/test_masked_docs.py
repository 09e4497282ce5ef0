"""The pages of mae and glmae name the options, presets and blocks that there are."""

import re
from dataclasses import fields
from pathlib import Path

import pytest

from nnssl.masking import choose_block
from nnssl.pretrain.methods import get_method

PAGES = Path(__file__).parents[2] / "docs" / "methods"


def page(name):
    return (PAGES / f"{name}.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["mae", "glmae"])
def test_options_and_presets(name):
    cls, text = get_method(name), page(name)
    config = cls.Config()
    names = {f.name for f in fields(cls.Config)}
    section = text.split("## Options")[1].split("\n## ")[0]
    rows = [r.split("|") for r in section.splitlines() if r.startswith("| `")]
    listed = [(option, row[2]) for row in rows for option in re.findall(r"`(\w+)`", row[1])]
    assert len(listed) > 10 and {o for o, _ in listed} <= names
    everything = page("mae") + text
    assert {n for n in names if f"`{n}`" not in everything} == set()
    for row in rows:
        options, defaults = re.findall(r"`(\w+)`", row[1]), [d.strip() for d in row[2].split(", ")]
        if len(options) == len(defaults) and "optimiser" not in options:
            for option, default in zip(options, defaults):
                value = getattr(config, option)
                text_of = {None: "auto", True: "true", False: "false"}.get(value, str(value))
                assert default == text_of or float(default) == value, option
    for preset in cls.presets:
        assert f"`{preset}`" in text, preset


def test_blocks_in_the_table():
    strides = {
        "160x160x160": [(1, 1, 1), (2, 2, 2), (4, 4, 4), (8, 8, 8), (16, 16, 16), (32, 32, 32)],
        "48x192x192": [(1, 1, 1), (1, 2, 2), (2, 4, 4), (4, 8, 8), (8, 16, 16), (8, 32, 32)],
        "20x256x224": [(1, 1, 1), (1, 2, 2), (1, 4, 4), (2, 8, 8), (4, 16, 16), (4, 32, 32)],
        "40x56x40": [(1, 1, 1), (2, 2, 2), (4, 4, 4), (8, 8, 8)],
    }
    rows = re.findall(r"\| (\d+x\d+x\d+) \| (\d+x\d+x\d+) \| (\d+) \|", page("mae"))
    assert len(rows) == 4
    for patch, block, count in rows:
        size = [int(n) for n in patch.split("x")]
        chosen = choose_block(size, strides[patch])
        assert "x".join(map(str, chosen)) == block
        blocks = 1
        for n, b in zip(size, chosen):
            blocks *= n // b
        assert blocks == int(count)
