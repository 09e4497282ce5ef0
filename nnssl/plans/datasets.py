"""Dataset ids and names, looked up as nnU-Net does: in the raw, the preprocessed and the results folder."""

from __future__ import annotations

import re
from difflib import SequenceMatcher

from nnssl.errors import NnsslError
from nnssl.paths import FOLDERS, set_folders

_NAME = re.compile(r"Dataset(\d{3,})_(.+)")


def dataset_id(name: str) -> int:
    """The number of a dataset name: 4 for ``"Dataset004_Hippocampus"``.

    Raises:
        NnsslError: for a name of another form.
    """
    match = _NAME.fullmatch(name)
    if match is None:
        raise NnsslError(f"'{name}' is not a dataset name of nnU-Net's form Dataset<three digits>_<Name>.")
    return int(match.group(1))


def list_datasets() -> dict[str, list[str]]:
    """All datasets: name -> the folder variables that hold it, sorted by name."""
    found: dict[str, list[str]] = {}
    for variable, folder in set_folders().items():
        if folder.is_dir():
            for entry in folder.iterdir():
                if _NAME.fullmatch(entry.name) and entry.is_dir():
                    found.setdefault(entry.name, []).append(variable)
    return dict(sorted(found.items()))


def _nearest_names(asked: str, known: list[str], n: int = 5) -> list[str]:
    if asked.isdecimal():
        return sorted(known, key=lambda name: (abs(dataset_id(name) - int(asked)), name))[:n]
    return sorted(known, key=lambda name: (-SequenceMatcher(None, asked.lower(), name.lower()).ratio(), name))[:n]


def resolve_dataset(name_or_id: int | str) -> str:
    """The full name of a dataset given by number (``4``, ``"4"``, ``"004"``) or by name.

    Returns:
        For example ``"Dataset004_Hippocampus"``.

    Raises:
        NnsslError: where no such dataset exists (lists the nearest), where a number has two names, or where none of
            nnU-Net's folders is set.
    """
    folders = set_folders()
    if not folders:
        raise NnsslError(f"None of {', '.join(FOLDERS)} is set. Export nnU-Net's three folders first.")
    known = list(list_datasets())
    asked = str(name_or_id)
    if asked.isdecimal():
        matches = [name for name in known if dataset_id(name) == int(asked)]
    else:
        matches = [name for name in known if name == asked]
    if len(matches) == 1:
        return matches[0]
    where = ", ".join(f"{variable}={folder}" for variable, folder in folders.items())
    if matches:
        raise NnsslError(
            f"Dataset {asked} has several names: {', '.join(matches)}. Give the full name, or rename one ({where})."
        )
    near = _nearest_names(asked, known)
    hint = f"Nearest: {', '.join(near)}." if near else "There is no dataset there at all."
    raise NnsslError(f"Dataset '{asked}' was not found. {hint} Looked in {where}.")
