"""Files that are whole or not there: written beside their place, synced, then renamed."""

from __future__ import annotations

import csv
import errno
import hashlib
import io
import json
import logging
import os
import sys
import tempfile
import time
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, BinaryIO

from nnssl.errors import NnsslError

log = logging.getLogger("nnssl")

STALE_SECONDS = 3600.0


def _sync_folder(folder: Path) -> None:
    # makes the rename itself survive a power cut; not every file system lets a folder be opened, and Windows does not
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _mode(path: Path) -> int:
    """Permissions for a new file: those of the file it replaces, else what the umask gives."""
    with suppress(OSError):
        return path.stat().st_mode & 0o777
    umask = os.umask(0o022)
    os.umask(umask)
    return 0o666 & ~umask


def _remove_stale(path: Path) -> None:
    """Remove what a killed writer of the same file left behind an hour or more ago."""
    for stale in path.parent.glob(f".{path.name}.*.tmp"):
        with suppress(OSError):
            if time.time() - stale.stat().st_mtime > STALE_SECONDS:
                stale.unlink()


def remove_temporary(folder: Path) -> None:
    """Remove what killed writers left in a folder that nobody else writes into (whoever calls holds its lock)."""
    for stale in folder.glob(".*.tmp"):
        with suppress(OSError):
            stale.unlink()


def move_into_place(temporary: str, path: Path, *, overwrite: bool) -> None:
    """Rename a file of the same file system; raises ``FileExistsError`` where it exists and ``overwrite`` is False."""
    if overwrite:
        os.replace(temporary, path)
        return
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        if path.exists():
            raise FileExistsError(f"{path} exists already") from None
        os.replace(temporary, path)
        return
    os.unlink(temporary)


def write_atomic(path: str | os.PathLike[str], write: Callable[[BinaryIO], object], *, overwrite: bool = True) -> None:
    """Write a file so that at any moment either the old or the new content is there, whole.

    A temporary file in the same folder, which must exist, is given to ``write``, synced to the disk and renamed. After an
    exception it is removed and the old file is untouched. A kill may leave a hidden ``.<name>.<random>.tmp``, which a later write
    removes.

    Raises:
        FileExistsError: the file exists, also one that appears meanwhile, and ``overwrite`` is False.
        OSError: no space, no permission.
    """
    path = Path(path)
    if not overwrite and path.exists():
        raise FileExistsError(f"{path} exists already")
    _remove_stale(path)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, _mode(path))
        move_into_place(temporary, path, overwrite=overwrite)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise
    _sync_folder(path.parent)


def write_text(path: str | os.PathLike[str], text: str, *, errors: str = "strict") -> None:
    """Write UTF-8 text atomically; ``errors`` as of ``str.encode``."""
    write_atomic(path, lambda file: file.write(text.encode("utf-8", errors)))


def write_json(path: str | os.PathLike[str], content: Any, *, overwrite: bool = True) -> None:
    """Write JSON atomically, indented, in the order given; see :func:`write_atomic`."""
    text = json.dumps(content, indent=4, allow_nan=True) + "\n"
    write_atomic(path, lambda file: file.write(text.encode("utf-8")), overwrite=overwrite)


def write_csv(
    path: str | os.PathLike[str], rows: Iterable[Sequence[object]], *, errors: str = "surrogateescape"
) -> None:
    """Write a table atomically, the names of its columns first.

    ``errors`` says what becomes of names that are no UTF-8: by default they are written as they are, so that the table names the
    file; ``"backslashreplace"`` keeps the table text that any program reads.
    """
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    write_text(path, text.getvalue(), errors=errors)


def try_lock(file: IO[Any]) -> bool | None:
    """Whether an exclusive lock of an open file is ours, for as long as it is open; None where the file system has none."""
    if sys.platform == "win32":
        import msvcrt

        try:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True
    import fcntl

    try:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP):
            return False
        text = "The file system of %s has no locks (%s): take care not to start two runs for one folder."
        log.warning(text, file.name, error.strerror)
        return None
    return True


def read_text(path: str | os.PathLike[str]) -> str:
    """The text of a file that a person wrote: UTF-8, or UTF-16 as Windows' editors save it; line ends become ``\\n``.

    Raises:
        ValueError: another encoding.
        OSError: it cannot be read.
    """
    content = Path(path).read_bytes()
    if content[:2] in (b"\xff\xfe", b"\xfe\xff"):
        encoding = "utf-16"
    elif b"\0" in content[:2]:
        encoding = "utf-16-be" if content[:1] == b"\0" else "utf-16-le"
    else:
        encoding = "utf-8-sig"
    try:
        text = content.decode(encoding)
    except UnicodeError:
        raise ValueError("it is neither UTF-8 nor UTF-16; save it as UTF-8") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def is_text(name: str) -> bool:
    """Whether a name or path is UTF-8: ITK ends the process where it is not."""
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def same_text(text: str) -> str:
    """A name in one form (NFC): macOS takes letters with accents apart, lists are written with them in one piece."""
    return unicodedata.normalize("NFC", text)


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a JSON object. Raises :class:`NnsslError` naming the file where it is missing, broken or no object."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise NnsslError(f"{path} does not exist.") from None
    except RecursionError:
        raise NnsslError(f"{path} cannot be read: it is nested too deeply.") from None
    except (OSError, ValueError) as error:
        raise NnsslError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise NnsslError(f"{path} cannot be read: it holds no JSON object.")
    return content


def hash_of(text: str) -> str:
    """sha256 (hex) of a name or a text, also of one that is no UTF-8."""
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


def sha256_of(path: str | os.PathLike[str], start: int = 0) -> str:
    """sha256 (hex) of a file's content from a byte on, read in pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        file.seek(start)
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()
