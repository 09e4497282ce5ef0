"""One part of the preprocessing, for many machines that share the work: ``--part 3/8``."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass

from nnssl.errors import NnsslError


@dataclass(frozen=True)
class Part:
    """Part ``index``, from 1, of ``of``: the cases whose name's hash says so.

    A case's part depends on its name alone: no machine needs to know what the others do, the parts of one number are disjoint and
    together everything, and a case more or less moves no other. Parts are equally large up to chance (a standard deviation of
    about the root of a part's size).
    """

    index: int
    of: int

    def __post_init__(self) -> None:
        if not 1 <= self.index <= self.of:
            raise NnsslError(f"--part {self.index}/{self.of}: the first number must be from 1 to the second.")

    @classmethod
    def parse(cls, text: str) -> Part:
        """``"3/8"``, the third of eight parts; raises :class:`NnsslError` for another form, or numbers that do not fit."""
        match = re.fullmatch(r"\s*(\d+)\s*/\s*(\d+)\s*", text)
        if match is None:
            raise NnsslError(
                f"--part {text}: two whole numbers are wanted, for example 3/8 (the third of eight parts)."
            )
        return cls(int(match[1]), int(match[2]))

    def holds(self, name: str) -> bool:
        """Whether a case, by its identifier, is of this part."""
        digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()
        return int.from_bytes(digest[:8], "big") % self.of == self.index - 1

    def take(self, names: Iterable[str]) -> set[str]:
        """Those of the names that are of this part."""
        return {name for name in names if self.holds(name)}

    @property
    def label(self) -> str:
        """For file names: ``"3of8"``."""
        return f"{self.index}of{self.of}"
