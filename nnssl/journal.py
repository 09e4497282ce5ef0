"""Journals: files of JSON lines that are only appended to. A kill loses no more than the line that was being written."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


def append_line(path: str | os.PathLike[str], row: Mapping[str, Any]) -> None:
    """Add a line in one write, so that several processes of a machine may append to the same file.

    A line that a killed process left unfinished is ended first.

    Raises:
        OSError: no space, no permission.
    """
    line = json.dumps(dict(row)).encode() + b"\n"
    with open(path, "ab+", buffering=0) as file:
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                line = b"\n" + line
        file.write(line)


def read_lines(path: str | os.PathLike[str], make: Callable[[dict[str, Any]], T]) -> Iterator[T]:
    """What ``make`` makes of the lines of a journal, in order; nothing where there is no such file.

    Lines that are damaged, or of which it raises ``ValueError``, ``TypeError`` or ``KeyError``, are passed over.
    """
    if not Path(path).is_file():
        return
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                yield make(json.loads(line))
            except (ValueError, TypeError, KeyError):
                continue
