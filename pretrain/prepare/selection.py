"""``--cases`` and ``--exclude``: which of the images a run uses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from nnssl.case_lists import read_case_list
from nnssl.errors import NnsslError, did_you_mean
from nnssl.files import same_text
from nnssl.words import counted

LISTED = 10  # names that an error spells out


def _find(names: Sequence[str], known: Mapping[str, set[str]], path: Path, option: str) -> dict[str, set[str]]:
    """The named cases by source. A name is ``<case>``, of every source that has it, or ``<source>/<case>``."""
    meant: dict[str, list[tuple[str, str]]] = {}
    for source, cases in known.items():
        for case in cases:
            for form in (same_text(case), f"{source}/{same_text(case)}"):
                meant.setdefault(form, []).append((source, case))
    found: dict[str, set[str]] = {source: set() for source in known}
    for name in names:
        for source, case in meant.get(same_text(name), ()):
            found[source].add(case)
    unknown = [name for name in names if same_text(name) not in meant]
    if unknown:
        everything = set().union(*known.values())
        few = len(everything) <= 5000
        shown = [f"{n}{did_you_mean(n, everything) if few and i < 3 else ''}" for i, n in enumerate(unknown[:LISTED])]
        more = f" and {len(unknown) - LISTED} more" if len(unknown) > LISTED else ""
        raise NnsslError(
            f"{option} {path}: {counted(len(unknown), 'name')} that no case of {', '.join(known)} has: {', '.join(shown)}{more}. "
            "Case names have neither channel number nor file ending."
        )
    return found


def select(known: Mapping[str, set[str]], cases: Path | None, exclude: Path | None) -> dict[str, set[str]]:
    """Case names by source that a run uses, of all that there are: only those of ``--cases``, not those of ``--exclude``."""
    chosen = {source: set(names) for source, names in known.items()}
    if cases is not None:
        chosen = _find(read_case_list(cases, "--cases"), known, cases, "--cases")
    if exclude is not None:
        for source, names in _find(read_case_list(exclude, "--exclude"), known, exclude, "--exclude").items():
            chosen[source] -= names
    return chosen
