"""The one error type that users are meant to read, and a collector for several problems at once."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class NnsslError(RuntimeError):
    """Something that the user can mend: the message names the file, case or option and says what to do.

    The commands print it without a traceback and exit with status 1; library code raises it and never exits.
    """


class UsageError(NnsslError):
    """Options that do not go together or are missing: known from the command line alone. The commands exit with status 2."""


class PeerLostError(NnsslError):
    """Another process of a distributed run has ended, and this one cannot go on alone."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ``" Did you mean 'x'?"`` for the known name closest to ``name``, or an empty string."""
    match = get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" Did you mean '{match[0]}'?" if match else ""


nearest = did_you_mean
"""The name that it had."""


class ProblemsError(NnsslError):
    """Several problems at once; ``problems`` has one sentence for each, without what they belong to."""

    def __init__(self, message: str, problems: list[str]) -> None:
        super().__init__(message)
        self.problems = problems


def raise_problems(problems: list[str], what: str, *, more: int = 0, advice: str = "") -> None:
    """Raise one :class:`ProblemsError` that lists all ``problems``, or return where there are none.

    Args:
        problems: one sentence for each.
        what: what they belong to, at the front.
        more: so many others that are not listed.
        advice: what to do about all of them, at the end; not counted.
    """
    if not problems:
        return
    end = f"\n{advice}" if advice else ""
    if len(problems) == 1 and not more:
        raise ProblemsError(f"{what}: {problems[0]}{end}", problems)
    lines = "".join(f"\n  - {p}" for p in problems) + (f"\n  and {more} more" if more > 0 else "")
    raise ProblemsError(f"{what}: found {len(problems) + max(0, more)} problems:{lines}{end}", problems)
