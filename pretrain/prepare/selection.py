"""``--cases`` and ``--exclude``: which of the images a run uses."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from nnssl.case_lists import find_cases, read_case_list


def select(known: Mapping[str, set[str]], cases: Path | None, exclude: Path | None) -> dict[str, set[str]]:
    """Case names by source that a run uses, of all that there are: only those of ``--cases``, not those of ``--exclude``."""
    chosen = {source: set(names) for source, names in known.items()}
    if cases is not None:
        chosen = find_cases(read_case_list(cases, "--cases"), known, cases, "--cases")
    if exclude is not None:
        for source, names in find_cases(read_case_list(exclude, "--exclude"), known, exclude, "--exclude").items():
            chosen[source] -= names
    return chosen
