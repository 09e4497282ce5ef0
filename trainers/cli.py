"""``nnssl_trainers``: the trainers, whether nnU-Net finds them, and the line to type where it does not."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

from nnssl.command import run_command
from nnssl.grammar import CommandParser
from nnssl.streams import show
from nnssl.trainers import TRAINERS
from nnssl.trainers.discovery import VARIABLE, is_active, shim_folder

FIRST_VERSION = (2, 8)


def export_line() -> str:
    """The shell line that appends our folder to ``nnUNet_extTrainer``, after whatever it holds."""
    separator = os.pathsep
    return f'export {VARIABLE}="${{{VARIABLE}:+${VARIABLE}{separator}}}"{shlex.quote(shim_folder())}'


def _state() -> str:
    try:
        installed = version("nnunetv2")
    except PackageNotFoundError:
        return "Not active: nnunetv2 is not installed in this environment. Type: pip install 'nnunetv2>=2.8,<3'"
    numbers = re.match(r"(\d+)\.(\d+)", installed)
    if numbers and tuple(map(int, numbers.groups())) < FIRST_VERSION:
        return f"Not active: nnunetv2 {installed} cannot search other folders. Type: pip install -U 'nnunetv2>=2.8,<3'"
    if not is_active(shim_folder()):
        return f"Not active: {VARIABLE} does not name the folder in this shell. Type the line above."
    return "Active: nnUNetv2_train and nnUNetv2_predict find the trainers in this environment; nothing is to be typed."


def describe() -> str:
    """Everything that the command says: the line, the trainers with a line each, and whether nnU-Net finds them."""
    width = max(map(len, TRAINERS))
    lines = [export_line(), "", "Trainers for nnUNetv2_train ... -tr NAME:"]
    lines += [f"  {name:<{width}}  {text}" for name, (_, text) in TRAINERS.items()]
    return "\n".join([*lines, "", _state()])


def parser() -> CommandParser:
    """The command's arguments."""
    p = CommandParser(
        "nnssl_trainers",
        "[--export]",
        "List the trainers for nnUNetv2_train, say whether nnU-Net finds them, and print the line to type where it does not.",
        'eval "$(nnssl_trainers --export)"',
    )
    p.group("how").add_argument("--export", action="store_true", help="print only the line to export")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """The console command; returns the exit status."""
    args = parser().parse_args(argv)
    return run_command(lambda: show(export_line() if args.export else describe()), args)
