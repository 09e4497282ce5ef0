"""``make tables``: writes the tables of docs/commands.md from the commands' own parsers.

Between ``<!-- table: NAME -->`` and ``<!-- end -->`` stands what is made: ``matrix``, the options that several commands have, by
command, or the options of the command NAME. A test compares the page with the parsers.
"""

from __future__ import annotations

import argparse
import importlib
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "commands.md"


def scripts() -> dict[str, str]:
    """Command -> ``module:function``, from pyproject.toml."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    return dict(re.findall(r'^(nnssl_\w+) = "([\w.:]+)"$', text, re.MULTILINE))


def parsers() -> dict:
    """Command -> its parser: beside ``main`` lies ``parser``, beside ``info_main`` ``info_parser``."""
    found = {}
    for command, entry in scripts().items():
        module, _, function = entry.partition(":")
        found[command] = getattr(importlib.import_module(module), re.sub("main$", "parser", function))()
    return found


def spelling(action: argparse.Action) -> str:
    """``-d``, ``--cases``; of several the two-dash one last."""
    return ", ".join(f"`{name}`" for name in action.option_strings)


def matrix() -> str:
    """The options that several commands have, by command."""
    commands = parsers()
    rows: dict[str, set[str]] = {}
    for command, parser in commands.items():
        for action in parser.options():
            rows.setdefault(spelling(action), set()).add(command)
    several = [name for name, where in rows.items() if len(where) > 1]
    several.sort(key=lambda name: (-len(rows[name]), name.lower()))
    head = "| option | " + " | ".join(c.removeprefix("nnssl_") for c in commands) + " |"
    lines = [head, "|---|" + ":-:|" * len(commands)]
    for name in several:
        lines.append(f"| {name} | " + " | ".join("x" if c in rows[name] else "" for c in commands) + " |")
    return "\n".join(lines)


def table(parser) -> str:
    """The options of one command with the words of its help; those that all commands have are left out."""
    lines = ["| option | meaning |", "|---|---|"]
    for title, actions in parser.titled_options():
        if title == "general":
            continue
        for action in actions:
            names = "`" + ", ".join(action.option_strings) + "`" if action.option_strings else f"`{action.metavar}`"
            value = _value(parser, action)
            name = f"{names[:-1]} {value}`" if value and action.option_strings else names
            words = (action.help or "").replace("%%", "%").replace("|", "\\|")
            lines.append(f"| {name.replace('|', chr(92) + '|')} | {words} |")
    return "\n".join(lines)


def _value(parser, action) -> str:
    if action.nargs == 0:
        return ""
    word = action.metavar or (" or ".join(map(str, action.choices)) if action.choices else action.dest.upper())
    return f"{word} ..." if action.nargs == "+" else word


def made() -> dict[str, str]:
    """Name of each table -> its text."""
    return {"matrix": matrix(), **{command: table(parser) for command, parser in parsers().items()}}


def filled(page: str) -> str:
    """The page with every table made anew.

    Raises:
        KeyError: a marker names no table.
    """
    tables = made()
    return re.sub(
        r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)",
        lambda m: f"{m.group(1)}\n{tables[m.group(2)]}\n\n{m.group(3)}",
        page,
        flags=re.DOTALL,
    )


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
