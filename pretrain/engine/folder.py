"""The output folder of one run: who may write into it, what it holds, and whether a run may go on in it."""

from __future__ import annotations

import errno
import logging
import os
import socket
from contextlib import suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from nnssl.errors import NnsslError
from nnssl.files import read_json, remove_temporary, try_lock, write_json
from nnssl.pretrain.engine.record import check_record

if TYPE_CHECKING:
    from nnssl.pretrain.data import CaseSet

log = logging.getLogger("nnssl")

LOCK = ".lock"
NAMED = 10
UNKNOWN = "not known"
OLD_NAMES = {"reorient": "align"}
"""Options that the folders of earlier versions hold under another name."""


def differences(saved: dict[str, Any], wanted: dict[str, Any], prefix: str = "") -> list[str]:
    """One line for each key of ``wanted`` whose value is another in ``saved``, or which an earlier version did not know."""
    out = []
    for key, value in wanted.items():
        name = key if key in saved else OLD_NAMES.get(key, key)
        old = saved.get(name)
        if isinstance(value, dict) and isinstance(old, dict):
            out += differences(old, value, f"{prefix}{key}.")
        elif old != value:
            then = old if name in saved else UNKNOWN
            out.append(f"{prefix}{key}: {then} in the folder, {value} now")
    return out


class RunFolder:
    """A run's folder, made where it is missing and locked against other processes while it is open.

    The lock is the operating system's (released by a kill), the file beside it only tells who holds it. ``lock=False`` only
    looks (a dry run, or ranks beside the first).
    """

    def __init__(self, path: Path, lock: bool = True) -> None:
        self.path = path
        self.latest = path / "checkpoint_latest.pth"  # weights and the state of training
        self.previous = path / "checkpoint_previous.pth"  # the latest one's predecessor, taken where that is damaged
        self.final = path / "checkpoint_final.pth"  # what fine-tuning reads
        self.config_file = path / "config.json"  # everything resolved
        self.images_file = path / "images.json"  # the cases that the run was started with
        self._wanted = lock
        self._lock: IO[str] | None = None

    def __enter__(self) -> RunFolder:
        if not self._wanted:
            return self
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.path / LOCK, "a+", encoding="utf-8")  # noqa: SIM115
        except OSError as error:
            advice = "nnUNet_results must be writable."
            if error.errno in (errno.EEXIST, errno.EISDIR):
                advice = "Something else is in its place: move that away, or give this run a --name."
            raise NnsslError(f"cannot write into {self.path}: {error.strerror or error}. {advice}") from error
        locked = try_lock(self._lock)
        if locked is False:
            self._lock.seek(0)
            holder = self._lock.read().strip() or "unknown"
            self._lock.close()
            self._lock = None
            raise NnsslError(
                f"{self.path} is in use by another process ({holder}). Wait for it, or give this run a name of its own "
                "with --name."
            )
        try:
            self._lock.truncate(0)
            self._lock.write(f"process {os.getpid()} on {socket.gethostname()}")
            self._lock.flush()
        except OSError as error:
            raise NnsslError(f"cannot write into {self.path}: {error.strerror or error}.") from error
        if locked:  # whoever wrote them is dead
            remove_temporary(self.path)
        return self

    def __exit__(self, *error: object) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def saved_config(self, *, whole: bool = False) -> dict[str, Any] | None:
        """What ``config.json`` holds, or None where there is no run yet; ``whole``: all that a continued run is made from."""
        if not self.config_file.is_file():
            return None
        try:
            content = read_json(self.config_file)
            check_record(content, str(self.config_file), whole_run=whole)
        except NnsslError as error:
            raise NnsslError(f"{error} Move the folder away, or give this run a --name.") from error
        return content

    def has_checkpoint(self) -> bool:
        """Whether there is one, whole or not."""
        return any(file.exists() for file in (self.latest, self.previous, self.final))

    def keep_previous(self) -> None:
        """Let ``checkpoint_previous.pth`` be what ``checkpoint_latest.pth`` is now, before another is written."""
        if not self.latest.is_file() or (self.previous.is_file() and self.previous.samefile(self.latest)):
            return
        beside = self.path / f".{self.previous.name}.link.tmp"
        with suppress(OSError):
            beside.unlink(missing_ok=True)
            try:
                os.link(self.latest, beside)
                os.replace(beside, self.previous)
            except OSError:  # a file system without hard links: for a moment only the previous one is there
                os.replace(self.latest, self.previous)

    def write_images(self, case_set: CaseSet) -> None:
        """Remember which images the run is made of, and what tells another content of each."""
        write_json(self.images_file, {case.key: case_set.contents.get(case.key, "") for case in case_set.cases})

    def check_images(self, case_set: CaseSet, *, continue_run: bool) -> None:
        """Refuse other images than those that the run here was started with; ``continue_run``: the user gave ``--c``."""
        if not (self.images_file.is_file() and self.config_file.is_file() and self.has_checkpoint()):
            return  # nothing was started or saved, or by a version that did not write it
        try:
            old, now, known = read_json(self.images_file), {case.key for case in case_set.cases}, case_set.contents
        except NnsslError as error:
            raise NnsslError(
                f"{error} Remove it, and the images are not compared with those of the start; or give this run a --name."
            ) from error
        changed = [n for n in sorted(now & set(old)) if old[n] and old[n] != known.get(n, old[n])]
        lines = [
            *(f"{n} has another content" for n in changed),
            *(f"{n} came" for n in sorted(now - set(old))),
            *(f"{n} is gone" for n in sorted(set(old) - now)),
        ]
        if not lines:
            return
        shown = "".join(f"\n  - {line}" for line in lines[:NAMED])
        more = f"\n  and {len(lines) - NAMED} more" if len(lines) > NAMED else ""
        advice = "Put them back as they were" if continue_run else "Put them back as they were and give --c"
        raise NnsslError(
            f"The run in {self.path} was started with other images than there are now:{shown}{more}\n{advice} (--exclude FILE "
            "leaves out those that came), or start a new run with a --name of its own."
        )

    def check_resume(self, identity: dict[str, Any], *, continue_run: bool) -> bool:
        """Decide whether a run with this identity may work here; True where a checkpoint is to be resumed.

        With ``continue_run`` (the user gave ``--c``) it may have more epochs than it had.

        Raises:
            NnsslError: for a folder with checkpoints of another run, of a finished one, or of an unfinished one without ``--c``.
        """
        saved = self.saved_config()
        if saved is None:
            if self.has_checkpoint():
                raise NnsslError(
                    f"{self.path} holds a checkpoint but no config.json, so it is not known what it is. "
                    "Give this run a --name."
                )
            return False
        if not continue_run and not self.has_checkpoint():
            return False  # nothing was saved: whoever leaves an image out, or lowers the batch, starts here again
        old = dict(saved.get("identity", {}))
        if continue_run and _lengthens(old, identity):
            old["epochs"] = identity["epochs"]
        changed = differences(old, identity)
        if changed:
            what = "continue it with" if continue_run else "start"
            lines = "\n".join(f"  - {c}" for c in changed)
            advice = "Leave those options out with --c." if continue_run else "Give this run a --name of its own."
            if continue_run and any(f": {UNKNOWN} in" in c for c in changed):
                advice = (
                    "What is not known there is new: an earlier version began it, and this one would go on otherwise. Start "
                    f"a run with a --name, from the weights of this one with --init {self.latest}."
                )
            raise NnsslError(
                f"{self.path} holds a run with another configuration, so it cannot {what} this one:\n{lines}\n{advice}"
            )
        if self.final.exists():
            if continue_run:
                return True
            raise NnsslError(
                f"{self.path} holds this very run, finished. Nothing is to be done; --name starts another."
            )
        if not self.latest.exists() and not self.previous.exists():
            return False
        if not continue_run:
            raise NnsslError(
                f"{self.path} holds this very run, unfinished. Continue it with --c, or start another with --name."
            )
        return True


def _lengthens(saved: dict[str, Any], wanted: dict[str, Any]) -> bool:
    """Whether a continued run is to be longer than it was; refuses a shorter one, and stages that are shares of the length."""
    old, new = saved.get("epochs"), wanted.get("epochs")
    if not isinstance(old, int) or not isinstance(new, int) or old == new:
        return False
    if new < old:
        raise NnsslError(
            f"--epochs {new}: this run has {old}. With --c a run is only ever lengthened, to more epochs in all than it had."
        )
    if saved.get("omni"):
        raise NnsslError(
            f"--epochs {new}: a run with --labelled cannot be lengthened, since its stages are shares of its {old} epochs. Start "
            "a longer one with --name, from this one's weights with --init."
        )
    return True
