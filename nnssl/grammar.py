"""The grammar of all commands: what an option is called, what it means, and how its help reads.

An option of several commands is stated once, in :data:`SHARED`, in nnU-Net's own spelling where nnU-Net has it. A renamed one
goes on working and names the new one. Imports nothing heavy, so that ``--help`` and ``--version`` are there at once.
"""

from __future__ import annotations

import argparse
import platform
import re
import sys
import textwrap
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple, NoReturn

from nnssl.errors import did_you_mean
from nnssl.streams import show

DEVICES = ("cuda", "cpu", "mps")
USAGE = 2
"""Exit status of a command line that is not understood."""


class Flag(NamedTuple):
    """An option of a command: its spelling, and keywords of :meth:`argparse.ArgumentParser.add_argument`."""

    name: str
    keywords: dict[str, Any]


def flag(name: str, **keywords: Any) -> Flag:
    """A :class:`Flag`."""
    return Flag(name, keywords)


def pair(example: str, form: str = "name=value") -> Callable[[str], tuple[str, str]]:
    """What reads ``name=value``; ``form`` and ``example`` are shown where that is not what was typed."""

    def read(text: str) -> tuple[str, str]:
        key, equals, value = text.partition("=")
        if not (key and equals and value):
            raise argparse.ArgumentTypeError(f"'{text}' is not of the form {form}, such as {example}")
        return key, value

    return read


def whole_numbers(text: str) -> tuple[int, ...]:
    """``8,16,32`` (also ``8x16x32`` and ``[8, 16, 32]``) as numbers."""
    try:
        return tuple(int(part) for part in re.sub(r"[\[\]()\s]", "", text).replace("x", ",").split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is not a list of whole numbers such as 8,16,32") from None


SHARED: dict[str, Flag] = {
    "dataset": flag("-d", metavar="DATASET", help="number or name of the dataset"),
    "target": flag("-t", metavar="TARGET", help="dataset that will be fine-tuned: number or name"),
    "configuration": flag(
        "-c", metavar="CONFIGURATION", default="3d_fullres", help="nnU-Net's configuration (default: 3d_fullres)"
    ),
    "plans": flag("-p", metavar="PLANS", default="nnUNetPlans", help="plans (default: nnUNetPlans)"),
    "fold": flag("-f", metavar="FOLD", default="all", help="fold (default: all)"),
    "device": flag("-device", metavar="DEVICE", default="cuda", choices=DEVICES, help="cuda (default), cpu or mps"),
    "processes": flag("-np", metavar="N", type=int, help="processes (default: nnU-Net's)"),
    "options": flag(
        "-o", metavar="KEY=VALUE", nargs="+", action="extend", help="options that have a table of their own"
    ),
    "output": flag("--output", metavar="FOLDER", help="folder that results are written to"),
    "name": flag("--name", metavar="NAME", help="name of what is made"),
    "seed": flag("--seed", metavar="N", type=int, default=0, help="of all that is random (default: 0)"),
    "dry_run": flag("--dry-run", action="store_true", help="only print what would be done, and how long it takes"),
    "cases": flag("--cases", metavar="FILE", help="text file of the cases to use, one a line"),
    "labels": flag("--labels", metavar="N|P%|FILE", help="labelled cases: a number, a share, or a file"),
    "epochs": flag("--epochs", metavar="N", type=int, help="epochs"),
    "iterations": flag("--iterations", metavar="N", type=int, help="steps of an epoch"),
    "adapt": flag(
        "--adapt",
        metavar="KIND=HOW",
        nargs="+",
        action="extend",
        type=pair("channels=repeat"),
        help="allow weights of another network: channels=repeat|first|skip, kernels=average|centre, depth=match",
    ),
    "coverage": flag(
        "--coverage",
        metavar="SHARE",
        type=float,
        help="with --adapt: least share of the encoder's parameters that must be filled (default: 0.5)",
    ),
    "key": flag("--key", metavar="ENTRY", help="entry of the file that holds the weights, such as teacher"),
    "prefix": flag("--prefix", metavar="TEXT", help="prefix of nnU-Net's names in a file of others"),
    "trust": flag(
        "--trust",
        action="store_true",
        help="let the file run code while it is read (pickle); only for files whose origin you know",
    ),
    "random_inits": flag(
        "--random-inits", metavar="K", type=int, default=3, help="random networks to compare with (default: 3)"
    ),
}
"""Options that several commands have: the same name, the same meaning."""


def version_text(prog: str) -> str:
    """``nnssl_plan: nnssl 0.1.0, nnunetv2 2.8.1, torch 2.8.0, Python 3.12.3``."""
    from nnssl import __version__

    parts = [f"nnssl {__version__}"]
    for package in ("nnunetv2", "torch"):
        try:
            parts.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            parts.append(f"{package} is missing")
    return f"{prog}: {', '.join([*parts, f'Python {platform.python_version()}'])}"


class _Version(argparse.Action):
    """Looks the versions up only when they are asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        show(version_text(parser.prog))
        parser.exit()


class _Renamed(argparse.Action):
    """An old spelling: does what the new one does, and tells it."""

    def __init__(self, *args: Any, new: str, **keywords: Any) -> None:
        super().__init__(*args, **keywords)
        self.new = new

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        sys.stderr.write(f"Note: {option_string} is now called {self.new}; both work.\n")
        setattr(namespace, self.dest, values)


class _Help(argparse.HelpFormatter):
    """Breaks lines at blanks only: ``head-only`` and ``--dry-run`` stay whole, so that they can be copied."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=26)

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return textwrap.fill(
            " ".join(text.split()), width, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False
        )


class CommandParser(argparse.ArgumentParser):
    """A parser as all commands have it: no abbreviations, ``--version``, ``-v``, ``-q``, and errors of one line.

    ``usage`` is the line after ``usage:``, without the name; ``example`` a command line, shown at the end of the help.
    """

    def __init__(self, prog: str, usage: str, description: str, example: str = "") -> None:
        super().__init__(
            prog=prog,
            usage=f"{prog} {usage}".replace("%", "%%"),
            description=description,
            epilog=f"Example: {example}" if example else None,
            allow_abbrev=False,
            add_help=False,
            formatter_class=_Help,
        )
        self._positionals.title = "arguments"
        general = self.add_argument_group("general")
        general.add_argument("-h", "--help", action="help", help="show this text and end")
        general.add_argument("--version", action=_Version, nargs=0, help="show versions and end")
        loud = general.add_mutually_exclusive_group()
        loud.add_argument(
            "-v",
            "--verbose",
            action="store_true",
            help="print more: details, warnings of other packages, and where an error comes from",
        )
        loud.add_argument("-q", "--quiet", action="store_true", help="print only results, warnings and errors")
        self._groups = [general]
        self._typed: list[str] = []

    def group(self, title: str) -> argparse._ArgumentGroup:
        """A group of options under a title of its own, before the general ones."""
        group = self.add_argument_group(title)
        self._action_groups.remove(group)
        self._action_groups.insert(self._action_groups.index(self._groups[0]), group)
        return group

    def share(self, group: Any, *names: str, **changes: Any) -> None:
        """Add options of :data:`SHARED` to a group; ``changes`` (``help=...``, ``required=True``) are for one name."""
        for name in names:
            known = SHARED[name]
            group.add_argument(known.name, dest=name, **_plain(known.keywords | changes))

    def renamed(self, old: str, new: str) -> None:
        """Let an old spelling of the option ``new`` go on working."""
        action = self._option_string_actions[new]
        self.add_argument(
            old,
            dest=action.dest,
            action=_Renamed,
            new=new,
            type=action.type or str,
            choices=action.choices,
            default=argparse.SUPPRESS,
            help=argparse.SUPPRESS,
        )

    def options(self) -> list[argparse.Action]:
        """The documented options."""
        return [a for a in self._actions if a.option_strings and a.help is not argparse.SUPPRESS]

    def titled_options(self) -> list[tuple[str, list[argparse.Action]]]:
        """The documented options and arguments by the titles of the help."""
        found = [
            (g.title or "", [a for a in g._group_actions if a.help is not argparse.SUPPRESS])
            for g in self._action_groups
        ]
        return [(title, actions) for title, actions in found if actions]

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse; what was typed is kept for :meth:`error`."""
        self._typed = list(sys.argv[1:] if args is None else args)
        return super().parse_known_args(args, namespace)

    def _get_option_tuples(self, option_string: str) -> list[Any]:
        """argparse takes ``-d`` for ``-device`` even without abbreviations: only what was typed in full counts."""
        return [found for found in super()._get_option_tuples(option_string) if option_string.startswith(found[1])]

    def print_help(self, file: Any = None) -> None:
        """As argparse, also where the reader goes before the end (``| head``)."""
        if file is None:
            show(self.format_help())
        else:
            super().print_help(file)

    def error(self, message: str) -> NoReturn:
        """Refuse a command line in one line, without the usage of forty options."""
        if message.startswith("the following arguments are required"):  # a slip of the keyboard is named first
            slips = [w for w in self._typed if w.startswith("--") and len(w) > 2]
            slips = [w for w in slips if w.split("=")[0] not in self._option_string_actions]
            message = f"unrecognized arguments: {' '.join(slips)}" if slips else message
        unknown = re.match(r"unrecognized arguments: (.*)", message)
        if unknown:
            words = unknown.group(1).split()
            known = [name for action in self.options() for name in action.option_strings]
            advice = [
                f"{w} is no option of {self.prog}.{did_you_mean(w.split('=')[0], known)}"
                for w in words
                if w.startswith("-")
            ]
            message = " ".join(advice) or f"{', '.join(words)}: not understood here."
        choice = re.match(r"argument (\S+): invalid choice: '?(.*?)'? \(choose from (.*)\)", message)
        if choice:
            legal = [word.strip(" '") for word in choice.group(3).split(",")]
            message = f"{choice.group(1)} {choice.group(2)}: it can be {', '.join(legal)}."
        if not message.endswith((".", "?")):
            message += "."
        self.exit(USAGE, f"Error: {message} All options: {self.prog} --help\n")


def _plain(keywords: dict[str, Any]) -> dict[str, Any]:
    """Keywords with per cent signs as argparse wants them; in metavars they stay."""
    return {**keywords, "help": re.sub(r"%(?!\()", "%%", keywords["help"])}
