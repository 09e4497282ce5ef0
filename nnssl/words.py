"""Numbers as a person says them, and tables of them on a terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence


def counted(number: int, one: str, several: str = "") -> str:
    """``1 case``, ``2 cases``; ``several`` where it is not ``one`` with an s."""
    return f"{number:,} {one if number == 1 else several or one + 's'}"


def size_text(values: Sequence[float]) -> str:
    """``(16, 32, 16)`` -> ``"16x32x16"``."""
    return "x".join(f"{v:g}" for v in values)


def first_few(texts: Sequence[str], most: int, between: str = ", ") -> str:
    """``"a, b, c ..."`` of many texts."""
    return between.join(texts[:most]) + (" ..." if len(texts) > most else "")


def aligned(rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Rows of cells as lines of columns of one width: the first ``left`` columns to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    cells = ([c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths))] for row in rows)
    return "\n".join("  ".join(row).rstrip() for row in cells)


def per_cent(share: float, digits: int = 0) -> str:
    """``0.344`` -> ``"34 %"``: the one form that is printed. Options are typed without the space (``25%``)."""
    return f"{100 * share:.{digits}f} %"


def spoken(seconds: float) -> str:
    """A duration rounded up to what matters: ``8 s``, ``12 min``, ``1 h 30 min``, ``3 days 4 h``."""
    seconds = max(0.0, seconds)
    if seconds < 99.5:
        return f"{math.ceil(seconds)} s"
    minutes = math.ceil(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    hours, rest = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {rest:02d} min"
    hours = math.ceil(minutes / 60)
    return f"{hours // 24} days {hours % 24} h"
