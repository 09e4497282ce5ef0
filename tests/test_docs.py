"""The documentation site, the tutorial and the container: built without a warning, and of one mind with the code."""

import argparse
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"


@pytest.fixture(scope="module")
def hooks():
    return load(DOCS / "site" / "hooks.py")


def load(file):
    spec = importlib.util.spec_from_file_location(f"docs_site_{file.stem}", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_options_of_every_command_are_on_the_page(hooks):
    parsers, page = hooks.parsers(), hooks.options_page()
    named = re.findall(r"^(nnssl_\w+) = ", (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    assert list(parsers) == named and len(named) >= 9
    sections = dict(re.findall(r"^## (nnssl_\w+)\n(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL))
    for command, parser in parsers.items():
        shown = [a for a in parser._actions if a.help != argparse.SUPPRESS]  # the others are old names
        for action in shown:
            for option in action.option_strings:
                assert option in ("-h", "--help") or f"`{option}`" in sections[command], f"{command} {option}"
    assert "%(default)" not in page and "%%" not in page
    rows = [line for line in page.splitlines() if line.startswith("|")]
    assert all(len(re.findall(r"(?<!\\)\|", row)) == 4 for row in rows), "a cell holds a bar of its own"


def test_options_of_every_objective_are_on_the_page(hooks):
    from dataclasses import fields

    from nnssl.pretrain.engine.config import EngineConfig
    from nnssl.pretrain.methods import list_methods
    from nnssl.pretrain.omni import OmniConfig

    page = hooks.objectives_page()
    sections = dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL))
    configs = {name: cls.Config for name, cls in list_methods().items()}
    for name, config in configs.items():
        assert all(f"| `{f.name}` |" in sections[name] for f in fields(config)), name
    loop, labelled = (next(v for k, v in sections.items() if k.startswith(s)) for s in ("The loop", "Labelled"))
    assert all(f"| `{f.name}` |" in loop for f in fields(EngineConfig))
    assert all(f"| `omni.{f.name}` |" in labelled for f in fields(OmniConfig))


def test_every_public_module_has_a_page(hooks):
    modules = [m for _, group in hooks.API.values() for m in group]
    assert {"nnssl.pretrain", "nnssl.checkpoint", "nnssl.transfer", "nnssl.trainers"} <= set(modules)
    for module in modules:
        found = importlib.import_module(module)
        assert getattr(found, "__all__", None), f"{module} has no public names"


def test_links_are_turned_into_those_of_the_site(hooks):
    class Files:
        known = ("index.md", "getting-started.md", "methods/README.md", "contributing.md")

        def get_file_from_path(self, path):
            return path if path in self.known else None

    def turned(text, place):
        page = type("Page", (), {"file": type("File", (), {"src_uri": place})})
        return hooks.on_page_markdown(text, page, None, Files())

    assert turned("[a](docs/getting-started.md#install)", "index.md") == "[a](getting-started.md#install)"
    assert turned("[a](../../CONTRIBUTING.md)", "methods/README.md") == "[a](../contributing.md)"
    assert (
        turned("[a](getting-started.md) [b](https://x.y)", "concepts.md") == "[a](getting-started.md) [b](https://x.y)"
    )
    assert turned("see [the scripts](../examples/slurm/README.md).", "scale.md") == "see the scripts."
    assert turned("[a](missing.md)", "scale.md") == "[a](missing.md)", "mkdocs shall complain of it"


def test_roles_of_docstrings_become_code():
    pytest.importorskip("griffe")
    plain = load(DOCS / "site" / "roles.py").plain
    assert (
        plain("see :func:`~nnssl.plans.derive` and :class:`Method`, :data:`a.B`") == "see `derive` and `Method`, `a.B`"
    )


def test_the_tutorial_is_a_page_and_python(hooks):
    page = hooks.tutorial_page()
    assert page.startswith("# Tutorial") and page.count("```python") >= 5 and "# %%" not in page
    code = "\n".join(re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL))
    compile(code, "tutorial", "exec")


def test_the_container_types_what_the_readme_says():
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    assert text.index("ARG BASE=") < text.index("FROM ${BASE}")
    pages = [ROOT / "README.md", DOCS / "getting-started.md"]
    written = "\n".join(p.read_text(encoding="utf-8") for p in pages)
    installs = re.findall(r"^RUN (pip install \S+)$", text, re.MULTILINE)
    assert installs and all(line in written for line in installs), installs
    readme = [
        " ".join(line.split("#")[0].split()) for line in (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    ]
    shown = re.findall(r"^(nn(?:ssl_|UNetv2_)[^#\n]*)", (DOCS / "docker.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(shown) == 4 and all(" ".join(line.split()) in readme for line in shown)


@pytest.mark.slow
def test_the_site_is_built_without_a_warning(tmp_path):
    pytest.importorskip("material")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", tmp_path]
    env = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env)
    assert done.returncode == 0 and not done.stderr.strip(), done.stderr
    found = (tmp_path / "search" / "search_index.json").read_text(encoding="utf-8")
    assert "nnssl_add_images" in found and "mask_ratio" in found and "write_variant" in found
    html = (tmp_path / "reference" / "pretrain.html").read_text(encoding="utf-8")
    assert "robustness_every" in html and ":func:" not in html
    assert not re.findall(r'<(?:script|link)[^>]+(?:src|href)="https?://', html), "the site fetches nothing"
    for page in tmp_path.rglob("*.html"):
        shown = re.sub(r"<(pre|script|code)\b.*?</\1>", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        assert not re.findall(r"^\|.*\|$", shown, re.MULTILINE), f"{page}: a table that is not drawn as one"


@pytest.mark.slow
def test_the_tutorial_runs(tmp_path):
    command = [
        sys.executable,
        "examples/tutorial/tutorial.py",
        "--folder",
        tmp_path,
        "--epochs",
        "1",
        "--iterations",
        "2",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "before_and_after.png").stat().st_size > 10_000 and "encoder" in done.stdout
