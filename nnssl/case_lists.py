"""Lists of cases that a person wrote: one reader for every option that takes one."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from nnssl.errors import NnsslError, did_you_mean
from nnssl.files import read_text, same_text
from nnssl.words import counted

LISTED = 10  # names that an error spells out


def read_case_list(path: Path, option: str) -> list[str]:
    """Case names of a text file (one a line, lines that start with ``#`` are comments) or of a JSON list, each once.

    ``option`` is what named the file; it begins the messages.

    Raises:
        NnsslError: the file cannot be read or holds no name.
    """
    try:
        text = read_text(path)
        names = json.loads(text) if text.lstrip().startswith(("[", "{")) else text.splitlines()
    except (OSError, ValueError) as error:
        raise NnsslError(f"{option} {path} cannot be read: {error}") from error
    if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
        raise NnsslError(f"{option} {path}: expected one case name per line, or a JSON list of names.")
    names = [n.strip() for n in names if n.strip() and not n.lstrip().startswith("#")]
    if not names:
        raise NnsslError(f"{option} {path} names no case.")
    return list(dict.fromkeys(names))


def read_known_cases(path: Path, option: str, known: Collection[str]) -> list[str]:
    """The same, as ``known`` spells them: letters with accents may be written in either of their forms.

    Raises:
        NnsslError: also where a name is no case of ``known``.
    """
    forms = {same_text(case): case for case in known}
    named = read_case_list(path, option)
    unknown = [case for case in named if case not in known and same_text(case) not in forms]
    if unknown:
        raise NnsslError(
            f"{option} {path} names '{unknown[0]}', which is no preprocessed case.{did_you_mean(unknown[0], known)}"
        )
    return [case if case in known else forms[same_text(case)] for case in named]


def find_cases(names: Sequence[str], known: Mapping[str, set[str]], path: Path, option: str) -> dict[str, set[str]]:
    """The named cases by source. A name is ``<case>``, of every source that has it, or ``<source>/<case>``.

    Args:
        names: from :func:`read_case_list`.
        known: source -> its cases.
        path: of the list, for messages.
        option: what named it.

    Raises:
        NnsslError: names that no source has.
    """
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
        listed = f"{', '.join(shown)}{more}"
        raise NnsslError(
            f"{option} {path}: {counted(len(unknown), 'name')} that no case of {', '.join(known)} has: {listed}"
            f"{'' if listed.endswith('?') else '.'} Case names have neither channel number nor file ending."
        )
    return found
