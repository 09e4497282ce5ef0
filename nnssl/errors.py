"""The one error type that users are meant to read, and a collector for several problems at once."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

__all__ = ["NnsslError", "PeerLostError", "UsageError", "nearest", "raise_problems"]


class NnsslError(RuntimeError):
    """Something that the user can mend: the message names the file, case or option and says what to do.

    The commands print it without a traceback and exit with status 1; library code raises it and never exits.
    """


class UsageError(NnsslError):
    """Options that do not go together or are missing: known from the command line alone. The commands exit with status 2."""


class PeerLostError(NnsslError):
    """Another process of a distributed run has ended, and this one cannot go on alone."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ``" Did you mean 'x'?"`` for the known name closest to ``name``, or an empty string."""
    match = get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" Did you mean '{match[0]}'?" if match else ""


def raise_problems(problems: list[str], what: str) -> None:
    """Raise one :class:`NnsslError` that lists all ``problems``, or return where there are none."""
    if not problems:
        return
    if len(problems) == 1:
        raise NnsslError(f"{what}: {problems[0]}")
    lines = "\n".join(f"  - {p}" for p in problems)
    raise NnsslError(f"{what}: found {len(problems)} problems:\n{lines}")
