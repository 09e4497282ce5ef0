"""Each page of docs/methods is what the code is: every option with its default, every preset, the clipping."""

import re
from dataclasses import MISSING, fields
from pathlib import Path

import pytest

from nnssl.pretrain.methods import get_method, list_methods

METHODS = sorted(list_methods())
PAGES = Path(__file__).parents[2] / "docs" / "methods"
HOME = {"vox2vec": "hdense"}
"""Methods that have no page of their own."""


def page(name):
    return (PAGES / f"{HOME.get(name, name)}.md").read_text(encoding="utf-8")


def section(text, title):
    return text.split(f"\n## {title}\n")[1].split("\n## ")[0]


def listed(name):
    """Option -> default as the table of options says it."""
    out = {}
    for row in section(page(name), "Options").splitlines():
        cells = [c.strip() for c in row.strip("|").split("|")]
        options = re.findall(r"`(\w+)`", cells[0])
        if not row.startswith("| `") or not options:
            continue
        defaults = [re.sub(r" *\(.*?\)", "", d) for d in cells[1].split(", ")]
        assert len(options) == len(defaults), row
        assert not set(options) & set(out), row
        out |= dict(zip(options, defaults))
    for option, default in out.items():  # "5; vox2vec 0": of this method, and of one that shares its page
        own, _, other = default.partition("; ")
        out[option] = other.removeprefix(f"{name} ") if other.startswith(f"{name} ") else own
    return out


def equal(told, value):
    words = {None: ("auto",), True: ("true", "on"), False: ("false", "off")}
    if value is None or isinstance(value, bool):
        return told in words[value]
    if isinstance(value, str):
        return told == value
    if isinstance(value, tuple):
        return told == ",".join(map(str, value))
    return float(told) == value


@pytest.mark.parametrize("name", METHODS)
def test_options_and_their_defaults(name):
    cls = get_method(name)
    config = {f.name: f.default for f in fields(cls.Config)}
    assert MISSING not in config.values()
    told = (listed("mae") if name == "glmae" else {}) | listed(name)  # glmae's page leaves masking to mae's
    told = {o: d for o, d in told.items() if name != "glmae" or o in config}
    assert set(told) <= set(config)
    wrong = {o: (d, config[o]) for o, d in told.items() if not equal(d, config[o])}
    assert not wrong, f"docs/methods/{HOME.get(name, name)}.md says otherwise than the config: {wrong}"
    assert set(config) == set(told), set(config) - set(told)


@pytest.mark.parametrize("name", METHODS)
def test_presets_are_named_and_have_options(name):
    cls, text = get_method(name), page(name)
    names = {f.name for f in fields(cls.Config)}
    for preset, values in cls.presets.items():
        assert set(values) <= names, preset
        assert re.search(rf"`{preset}`|preset={preset}\b", text), preset
    known = {p for n in METHODS if HOME.get(n, n) == HOME.get(name, name) for p in get_method(n).presets}
    assert set(re.findall(r"preset=(\w+)", text)) <= known


@pytest.mark.parametrize("name", METHODS)
def test_clipping_is_named(name):
    told = {float(n) for n in re.findall(r"clipped at (\d+(?:\.\d+)?)", page(name))}
    assert get_method(name).grad_clip in told


@pytest.mark.parametrize("name", METHODS)
def test_deviations_have_a_table(name):
    titles = re.findall(r"^## ((?:Where it differs|Differs from).*)$", page(name), re.MULTILINE)
    assert len(titles) == 1
    assert section(page(name), titles[0]).count("\n|") >= 7
