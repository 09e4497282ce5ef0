"""What README and docs say exists: commands, options, files, links, and the Python of the snippets."""

from __future__ import annotations

import ast
import functools
import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *(ROOT / "docs" / n for n in ("getting-started.md", "concepts.md")),
]
PAGES += sorted((ROOT / "docs" / "tasks").glob("*.md"))
PAGES += [ROOT / "docs" / "commands.md", ROOT / "docs" / "methods" / "README.md"]
SCRIPTS = dict(
    re.findall(r'^(nnssl_\w+) = "([\w.:]+)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
)


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def command_lines(page: Path) -> list[list[str]]:
    lines = "".join(blocks(page, "bash")).splitlines()
    return [words for words in (shlex.split(line, comments=True) for line in lines) if words]


def load(entry: str):
    module, _, name = entry.partition(":")
    return getattr(importlib.import_module(module), name)


@pytest.mark.parametrize("script", sorted(SCRIPTS))
def test_help_works(script, capsys):
    with pytest.raises(SystemExit) as stop:
        load(SCRIPTS[script])(["--help"])
    assert stop.value.code == 0
    assert script in capsys.readouterr().out


def test_console_scripts_are_installed():
    for script in ("nnssl_pretrain", "nnssl_plan", "nnssl_trainers"):
        assert (Path(sys.executable).parent / script).is_file(), f"{script} is missing: pip install -e ."
    out = subprocess.run(
        [Path(sys.executable).parent / "nnssl_trainers"], capture_output=True, text=True, check=True
    ).stdout
    assert "nnUNetTrainerPretrained" in out


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name if p.name != "README.md" else f"{p.parent.name}-README")
def test_commands_and_options_exist(page, capsys, monkeypatch):
    """Each ``nnssl_...`` line is one that the command's parser takes: nothing is run, only parsed."""
    import argparse

    class Parsed(Exception):  # noqa: N818
        pass

    original = argparse.ArgumentParser.parse_args

    def parse(self, args=None, namespace=None):
        original(self, args, namespace)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
    known = {"make", "pip", ".ci/run", ".venv/bin/pre-commit", "export"}
    for words in command_lines(page):
        if words[0] in SCRIPTS:
            with pytest.raises(Parsed):
                load(SCRIPTS[words[0]])(words[1:])
            assert "is now called" not in capsys.readouterr().err, f"an old name: {' '.join(words)}"
        elif words[0] == "make":
            targets = [w for w in words[1:] if "=" not in w]
            assert all(re.search(rf"^{t}:", (ROOT / "Makefile").read_text(), re.MULTILINE) for t in targets)
        else:
            assert words[0].startswith("nnUNetv2_") or words[0] in known, words


def test_options_of_the_tables_exist(capsys):
    """Each option named in commands.md is in the help of the command whose section it stands in."""
    sections = re.split(r"^## ", (ROOT / "docs" / "commands.md").read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    for section in sections:
        script = section.split()[0]
        with pytest.raises(SystemExit):
            load(SCRIPTS[script])(["--help"])
        shown = capsys.readouterr().out
        for row in re.findall(r"^\| (.*?) \|", section, re.MULTILINE):
            for option in re.findall(r"`(--?[\w-]+)", row):
                assert re.search(rf"(?<![\w-]){re.escape(option)}(?![\w-])", shown), f"{script} has no {option}"


def test_trainers_of_the_docs_exist():
    from nnssl.trainers import TRAINERS

    for page in PAGES:
        for name in re.findall(r"nnUNetTrainer\w+", page.read_text(encoding="utf-8")):
            assert name in TRAINERS, f"{page.name}: {name}"


def test_links_lead_somewhere():
    for page in [*PAGES, *ROOT.glob("docs/**/*.md")]:
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_python_snippets_import_what_exists():
    for page in PAGES:
        for code in blocks(page, "python"):
            for node in ast.walk(ast.parse(code)):
                if isinstance(node, ast.Import):
                    [importlib.import_module(alias.name) for alias in node.names]
                if isinstance(node, ast.ImportFrom):
                    for alias in node.names:
                        try:
                            importlib.import_module(f"{node.module}.{alias.name}")
                        except ModuleNotFoundError:
                            assert hasattr(importlib.import_module(node.module), alias.name)


def test_python_snippet_of_the_readme_runs(tiny_preprocessed, tiny_raw_dataset, monkeypatch, capsys):
    """As it stands, but on a CPU, with two steps, and on tiny datasets 500 and 501."""
    import nnssl.pretrain

    tiny_preprocessed(501, "Target", 3)
    tiny_raw_dataset(500, "Unlabelled", 3, labelled=False)
    short = functools.partial(nnssl.pretrain.run, device="cpu", epochs=1, iterations=2, processes=1)
    monkeypatch.setattr(nnssl.pretrain, "run", short, raising=False)
    (code,) = blocks(ROOT / "README.md", "python")
    exec(compile(code, "README.md", "exec"), {})
    assert "encoder" in capsys.readouterr().out


def test_licence_is_whole():
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in text
    assert "END OF TERMS AND CONDITIONS" in text
