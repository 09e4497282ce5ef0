"""What the site has beside the pages of docs/: README and its neighbours, the options of all commands and objectives, the API.

mkdocs calls ``on_files`` and ``on_page_markdown``. Options are asked of the commands' own parsers and of the objectives' configs,
so that they cannot differ from what is installed.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
OUTSIDE = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
"""Pages that lie beside docs/ -> their place in the site."""

API = {
    "pretrain": ("Pretraining", ["nnssl.pretrain"]),
    "methods": ("Objectives, for writing one", ["nnssl.pretrain.methods", "nnssl.config", "nnssl.intensity"]),
    "weights": ("Checkpoints and transfer", ["nnssl.checkpoint", "nnssl.transfer", "nnssl.convert"]),
    "plans": ("Plans", ["nnssl.plans"]),
    "networks": ("Networks", ["nnssl.networks"]),
    "pieces": ("Losses, heads, masking", ["nnssl.losses", "nnssl.heads", "nnssl.masking"]),
    "teacher": (
        "Mean teacher",
        [f"nnssl.teacher.{m}" for m in ("averaging", "pseudo_labels", "components", "stages", "changes")],
    ),
    "transferability": ("Transferability and probes", ["nnssl.transferability", "nnssl.probe"]),
    "trainers": ("Trainers", ["nnssl.trainers", "nnssl.trainers.pretrained"]),
    "loggers": ("Loggers", ["nnssl.loggers"]),
}
"""Page -> title and modules."""

LINK = re.compile(r"\]\(([^)\s#]+)(#[^)\s]*)?\)")


class _Found(Exception):  # noqa: N818
    """Carries a parser out of the command that has made it."""


def parsers() -> dict[str, argparse.ArgumentParser]:
    """The parser of each console command, by name, in the order of pyproject.toml."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    entries = re.findall(r'^(nnssl_\w+) = "([\w.]+):(\w+)"$', text, re.MULTILINE)
    original, found = argparse.ArgumentParser.parse_args, {}

    def parse(self: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> Any:
        raise _Found(self)

    argparse.ArgumentParser.parse_args = parse  # type: ignore[method-assign]
    try:
        for command, module, function in entries:
            try:
                getattr(importlib.import_module(module), function)([])
            except _Found as told:
                found[command] = told.args[0]
    finally:
        argparse.ArgumentParser.parse_args = original  # type: ignore[method-assign]
    return found


def _escaped(text: str) -> str:
    return " ".join(text.split()).replace("%%", "%").replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")


def _option_rows(parser: argparse.ArgumentParser) -> Iterator[str]:
    for action in parser._actions:
        if isinstance(action, argparse._HelpAction) or action.help == argparse.SUPPRESS:
            continue
        names = ", ".join(f"`{n}`" for n in action.option_strings) or f"`{action.metavar or action.dest}`"
        value = "" if action.nargs == 0 or not action.option_strings else str(action.metavar or action.dest.upper())
        if action.choices:
            value = ", ".join(map(str, action.choices))
        told = parser._get_formatter()._expand_help(action) if action.help else ""
        yield f"| {names} | {_escaped(value)} | {_escaped(told)} |"


def options_page() -> str:
    """All options of all commands."""
    parts = ["# Options of the commands", "", "Made from the commands' own parsers: what `--help` says, on one page."]
    head = ["", "| option | value | meaning |", "|---|---|---|"]
    for command, parser in parsers().items():
        parts += ["", f"## {command}", "", _escaped(parser.description or ""), *head]
        parts += _option_rows(parser)
    return "\n".join(parts) + "\n"


def objectives_page() -> str:
    """All ``-o`` options: of the loop, of the labelled stages, of each objective, with presets."""
    from nnssl.config import describe_options
    from nnssl.plans.figures import FineTuningConfig
    from nnssl.pretrain.engine.config import EngineConfig
    from nnssl.pretrain.methods import list_methods
    from nnssl.pretrain.omni import OmniConfig

    parts = [
        "# Options of the objectives (`-o`)",
        "",
        "Made from the configs: what `nnssl_pretrain --list -m NAME` says; at the end those of `nnssl_plan`.",
    ]
    tables = [
        ("The loop, for every objective", EngineConfig, ""),
        ("Labelled stages (`--labelled`)", OmniConfig, "omni."),
    ]
    methods = list_methods()
    tables += [(name, cls.Config, "") for name, cls in methods.items()]
    tables.append(("Schedules of fine-tuning (`nnssl_plan -o`)", FineTuningConfig, ""))
    for title, config, prefix in tables:
        parts += ["", f"## {title}", ""]
        if title in methods:
            cls = methods[title]
            parts += [f"{_escaped(cls.title)}.", ""]
            if cls.presets:
                parts += [f"Presets (`-o preset=NAME`): {', '.join(f'`{p}`' for p in cls.presets)}.", ""]
        parts += ["| option | default | range | meaning |", "|---|---|---|---|"]
        for name, default, allowed, meaning in describe_options(config):
            parts.append(f"| `{prefix}{name}` | {_escaped(default)} | {_escaped(allowed)} | {_escaped(meaning)} |")
    return "\n".join(parts) + "\n"


def arguments(title: str, module: str, name: str) -> list[str]:
    """The fields of a dataclass whose texts are in their metadata, as a table."""
    from nnssl.options import meanings

    cls = getattr(importlib.import_module(module), name)
    about = meanings(cls)
    parts = ["", f"## {title}", "", "| argument | default | meaning |", "|---|---|---|"]
    for f in dataclasses.fields(cls):
        default = "" if f.default is dataclasses.MISSING else f"`{f.default!r}`"
        parts.append(f"| `{f.name}` | {default} | {_escaped(about[f.name])} |")
    return parts


TABLES = {
    "pretrain": [
        ("Arguments of `nnssl.pretrain.run`", "nnssl.pretrain.options", "RunOptions"),
        ("Arguments of `nnssl.pretrain.preprocess`", "nnssl.pretrain.prepare.request", "PrepareOptions"),
    ],
    "weights": [("Arguments of `nnssl.convert.convert`", "nnssl.weights.formats", "ConvertOptions")],
    "plans": [("Arguments of `nnssl.plans.Changes`", "nnssl.plans", "Changes")],
    "transferability": [
        ("Arguments of `nnssl.transferability.compare`", "nnssl.transferability.compare", "CompareOptions"),
        ("Arguments of `nnssl.probe.probe`", "nnssl.probe.options", "ProbeOptions"),
    ],
}
"""Page of the API -> title, module and dataclass of the tables at its end."""


def api_pages() -> dict[str, str]:
    """Pages of the public faces; what is in ``__all__`` is public."""
    pages = {}
    for page, (title, modules) in API.items():
        parts = [f"# {title}"]
        for module in modules:
            parts += ["", f"## `{module}`", "", f"::: {module}", "    options:", "      heading_level: 3"]
        parts += [line for table in TABLES.get(page, ()) for line in arguments(*table)]
        pages[f"reference/{page}.md"] = "\n".join(parts) + "\n"
    return pages


def tutorial_page() -> str:
    """The tutorial's script as a page: its text as text, its code as code."""
    parts: list[str] = []
    cells = re.split(
        r"^# %%(.*)$", (ROOT / "examples/tutorial/tutorial.py").read_text(encoding="utf-8"), flags=re.MULTILINE
    )
    for kind, body in zip(cells[1::2], cells[2::2]):
        if "[markdown]" in kind:
            parts.append(re.sub(r"^# ?", "", body.strip(), flags=re.MULTILINE))
        elif body.strip():
            parts.append(f"```python\n{body.strip()}\n```")
    return "\n\n".join(parts) + "\n"


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that are made."""
    from mkdocs.structure.files import File

    sys.path.insert(0, str(ROOT))
    made = {place: (ROOT / name).read_text(encoding="utf-8") for name, place in OUTSIDE.items()}
    made |= {"reference/options.md": options_page(), "reference/objectives.md": objectives_page()}
    made |= {"tutorial.md": tutorial_page(), **api_pages()}
    for place, text in made.items():
        files.append(File.generated(config, place, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Links as they are in the repository -> links of the site; what is not in the site is left as text."""
    place = page.file.src_uri
    origin = next((name for name, there in OUTSIDE.items() if there == place), f"docs/{place}")

    def replaced(match: re.Match[str]) -> str:
        target, anchor = match[1], match[2] or ""
        if re.match(r"\w+:", target):
            return match[0]
        path = os.path.normpath(os.path.join(os.path.dirname(origin), target)).replace(os.sep, "/")
        there = OUTSIDE.get(path) or (path.removeprefix("docs/") if path.startswith("docs/") else None)
        if there is None or files.get_file_from_path(there) is None:
            return "]()" if (ROOT / path).exists() else match[0]
        return f"]({os.path.relpath(there, os.path.dirname(place) or '.').replace(os.sep, '/')}{anchor})"

    return re.sub(r"\[([^\[\]]+)\]\(\)", r"\1", LINK.sub(replaced, markdown))
