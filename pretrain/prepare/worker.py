"""One raw case through nnU-Net's own preprocessor, without labels."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2

from nnssl.plans import Plan
from nnssl.preprocessed import IMAGE, LABELS, PROPERTIES, complete, open_array
from nnssl.pretrain.data.intensity import intensity_range, store_range
from nnssl.pretrain.prepare.index import Entry
from nnssl.pretrain.prepare.integrity import Unusable, check_files, check_voxels, quiet
from nnssl.pretrain.prepare.raw import RawCase
from nnssl.words import counted

CHUNK, BLOCK = 64, 16  # voxels per axis of the compressed chunks and blocks of a preprocessed case


@dataclass(frozen=True)
class Task:
    """A case to do."""

    case: RawCase
    # hash of the raw voxels that the preprocessed case was made from: where they are still the same, nothing is written;
    # "any" trusts it whatever the hash
    trust: str = ""
    stale: bool = False  # the preprocessed case is there and outdated


@dataclass(frozen=True)
class Result:
    """What became of a task: an entry for the index, or why no case can be done at the moment."""

    entry: Entry
    fatal: str = ""  # "disk", "memory", "write" or empty
    detail: str = ""  # the exception's text where fatal
    nbytes: int = 0  # size of the case, uncompressed


class _Known(Exception):
    """The preprocessed case is there already."""


@dataclass
class State:
    """How far a case has come."""

    trust: str
    shape: tuple[int, ...] = ()
    spacing: tuple[float, ...] = ()
    sha256: str = ""
    nbytes: int = 0
    saving: bool = False


def voxel_hash(data: np.ndarray) -> str:
    """sha256 (hex) of an image's shape and voxels, as nnU-Net's reader gives them: ``(C, Z, Y, X)`` float32."""
    digest = hashlib.sha256(str(tuple(data.shape)).encode())
    digest.update(np.ascontiguousarray(data, dtype=np.float32).data.cast("B"))
    return digest.hexdigest()


def storage(shape: Sequence[int]) -> dict[str, tuple[int, ...]]:
    """Chunks and blocks of a case's file, for nnU-Net's ``save_case``, from its voxels per axis.

    Crops lie anywhere, and each block that one touches is unpacked whole: of nnU-Net's blocks, which are as large as its patch
    allows, a crop of 64^3 unpacks up to 96^3 voxels where blocks are 32^3, and 80^3 where they are 16^3.
    """
    chunks, blocks = (tuple(min(size, s) for s in shape) for size in (CHUNK, BLOCK))
    return {"chunks": (1, *chunks), "blocks": (1, *blocks)}


def move_synced(draft: str | os.PathLike[str], final: Path) -> None:
    """Put a file into place once it is on the disk."""
    with open(draft, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(draft, final)


def reason(error: BaseException, printed: str) -> str:
    """One line for a person; nnU-Net's readers print what is wrong and raise an empty error."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[-1] if lines else next((p.strip() for p in printed.splitlines() if p.strip()), "")
    return f"{type(error).__name__}: {text}"[:300] if text else type(error).__name__


@dataclass(frozen=True)
class HashWorker:
    """Hashes the voxels of one case: its name, and the hash, which is empty where they cannot be read. Pickles."""

    plan: Plan

    def __call__(self, case: RawCase) -> tuple[str, str]:
        """Hash one case; never raises but for Ctrl-C."""
        try:
            with quiet():
                check_files(case.files)
                data, _ = self.plan.manager.image_reader_writer_class().read_images(list(case.files))
                return case.name, voxel_hash(data)
        except Exception:  # readers raise anything on broken files
            return case.name, ""


@dataclass(frozen=True)
class Worker:
    """Does cases one by one, into ``folder``, first into ``temporary`` on the same file system. Pickles."""

    plan: Plan
    folder: Path
    temporary: Path

    def __call__(self, task: Task) -> Result:
        """Do one case; never raises but for Ctrl-C."""
        case, state = task.case, State(task.trust)
        entry = Entry(case.name, case.stamps)
        with quiet() as printed:
            try:
                self.make(task, state)
                return Result(replace(entry, shape=state.shape, spacing=state.spacing, sha256=state.sha256))
            except Unusable as error:
                return Result(replace(entry, bad=str(error), bad_file=error.file or case.files[0]))
            except MemoryError:
                return Result(entry, "memory", "out of memory", state.nbytes)
            except Exception as error:  # readers raise anything on broken files; each case has to be named
                why = reason(error, printed.getvalue())
                if state.saving:
                    full = shutil.disk_usage(self.folder).free < 2 * state.nbytes
                    return Result(entry, "disk" if full else "write", why, state.nbytes)
                return Result(replace(entry, bad=why, bad_file=case.files[0]))
            finally:
                self.clean(case.name)

    def make(self, task: Task, state: State) -> None:
        """Make the files of a case, or raise."""
        raise NotImplementedError

    def clean(self, name: str) -> None:
        """Remove what is left of a case in the temporary folder."""
        for ending in (PROPERTIES, LABELS, IMAGE):
            with contextlib.suppress(OSError):
                os.unlink(self.temporary / f"{name}{ending}")


@dataclass(frozen=True)
class CaseWorker(Worker):
    """Preprocesses cases."""

    def make(self, task: Task, state: State) -> None:
        """Preprocess a case, unless that is done."""
        case, final = task.case, self.folder / f"{task.case.name}{IMAGE}"
        check_files(case.files)
        newest = max(stamp[2] for stamp in case.stamps)
        if not (task.trust or task.stale) and final.exists() and final.stat().st_mtime_ns > newest:
            state.trust = "any"  # another process has made it meanwhile
        with contextlib.suppress(_Known):
            self._run(case, state)
        state.shape = tuple(int(i) for i in open_array(final, mapped=False).shape[1:])

    def _inspect(self, name: str, data: np.ndarray, properties: dict[str, Any], state: State) -> None:
        """Look at the raw voxels, ``(C, Z, Y, X)``."""
        state.spacing = tuple(float(s) for s in properties["spacing"])
        if data.shape[0] != self.plan.n_channels:
            raise Unusable(f"it has {counted(data.shape[0], 'channel')}, the plans have {self.plan.n_channels}")
        if min(data.shape[1:]) == 1 and self.plan.dim == 3:
            raise Unusable(f"a single slice, of which {self.plan.configuration} can learn nothing; -c 2d takes slices")
        try:
            check_voxels(data)
        except ValueError as error:
            raise Unusable(str(error)) from None
        state.sha256 = voxel_hash(data)
        if state.trust in ("any", state.sha256) and complete(self.folder, name):
            raise _Known

    def _run(self, case: RawCase, state: State) -> None:
        preprocessor: Any = self.plan.config.preprocessor_class
        inspect = self._inspect

        class Unlabelled(preprocessor):
            """The plans' own preprocessor, which looks at the raw voxels first."""

            def run_case_npy(self, data: np.ndarray, seg: Any, properties: dict, *args: Any) -> tuple:
                inspect(case.name, data, properties, state)
                data, seg, properties = super().run_case_npy(data, seg, properties, *args)
                if not np.isfinite(data).all():
                    raise Unusable("voxels are NaN or infinite after preprocessing")
                properties.setdefault("class_locations", {})  # nnU-Net's loader asks for it
                state.nbytes, state.saving = data.nbytes, True
                return data, seg, properties

            def run_case_save(self, truncated: str, images: list[str], seg_file: Any, *rest: Any) -> None:
                if len(rest[1].patch_size) != 3:  # single slices are read: nnU-Net's blocks are made for that
                    super().run_case_save(truncated, images, seg_file, *rest)
                    return
                data, seg, properties = self.run_case(images, seg_file, *rest)
                data, seg = data.astype(np.float32, copy=False), seg.astype(np.int16, copy=False)
                nnUNetDatasetBlosc2.save_case(data, seg, properties, truncated, **storage(data.shape[1:]))

        plan, truncated = self.plan, str(self.temporary / case.name)
        self.clean(case.name)  # a process that was killed may have left a part, which blosc2 does not overwrite
        Unlabelled(verbose=False).run_case_save(
            truncated, list(case.files), None, plan.manager, plan.config, plan.dataset_json
        )
        written = open_array(f"{truncated}{IMAGE}", mapped=False)
        written[:]  # raises where the disk took less than all of it
        store_range(Path(f"{truncated}.pkl"), intensity_range(written, masked=all(plan.config.use_mask_for_norm)))
        for ending in (PROPERTIES, LABELS, IMAGE):  # the image last: it marks the case as done
            move_synced(truncated + ending, self.folder / f"{case.name}{ending}")
        state.saving = False
