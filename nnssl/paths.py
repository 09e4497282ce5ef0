"""nnU-Net's three folders, and paths written relative to them so that a project moves between machines."""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath

from nnssl.errors import NnsslError

FOLDERS = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")


def _folder(variable: str) -> Path:
    value = os.environ.get(variable)
    if not value:
        raise NnsslError(
            f"The environment variable {variable} is not set: nnU-Net keeps its files there. "
            f"Type: export {variable}=/path/to/{variable}"
        )
    return Path(value)


def raw_folder() -> Path:
    """``nnUNet_raw``. Raises :class:`NnsslError` where the variable is not set."""
    return _folder("nnUNet_raw")


def preprocessed_folder() -> Path:
    """``nnUNet_preprocessed``. Raises :class:`NnsslError` where the variable is not set."""
    return _folder("nnUNet_preprocessed")


def results_folder() -> Path:
    """``nnUNet_results``. Raises :class:`NnsslError` where the variable is not set."""
    return _folder("nnUNet_results")


def set_folders() -> dict[str, Path]:
    """Those of the three folders whose variable is set, by variable name; they need not exist."""
    return {name: Path(os.environ[name]) for name in FOLDERS if os.environ.get(name)}


def encode_path(path: str | os.PathLike[str]) -> str:
    """Write a path relative to the innermost of nnU-Net's folders that holds it, ``"nnUNet_results:Dataset501_X/..."``.

    With forward slashes; the absolute path where none of them holds it.
    """
    given = Path(os.path.abspath(path))
    best: tuple[int, str] | None = None
    for name, folder in set_folders().items():
        for root, candidate in ((Path(os.path.abspath(folder)), given), (folder.resolve(), given.resolve())):
            if candidate.is_relative_to(root):
                found = (len(root.parts), f"{name}:{candidate.relative_to(root).as_posix()}")
                best = max(best, found) if best else found
                break
    return best[1] if best else str(given)


def decode_path(text: str) -> Path:
    """The path that :func:`encode_path` wrote, on this machine.

    Raises:
        NnsslError: where the folder's variable is not set, or the relative part leaves the folder (``..``).
    """
    name, colon, rest = text.partition(":")
    if not colon or name not in FOLDERS:
        return Path(text)
    relative = PurePosixPath(rest)
    if relative.is_absolute() or ".." in relative.parts:
        raise NnsslError(f"The stored path '{text}' points outside {name}; it is not followed.")
    return _folder(name).joinpath(*relative.parts)
