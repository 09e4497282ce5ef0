"""One raw case through nnU-Net's own preprocessor, without labels."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import shutil
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager

from nnssl.preprocessed import IMAGE, LABELS, PROPERTIES, complete, open_array
from nnssl.pretrain.data.intensity import intensity_range, store_range
from nnssl.pretrain.prepare.index import Entry
from nnssl.pretrain.prepare.integrity import check_header, check_same_size, check_voxels, check_whole
from nnssl.pretrain.prepare.raw import RawCase
from nnssl.words import counted

CHUNK, BLOCK = 64, 16
"""Voxels per axis of the compressed chunks and blocks of a preprocessed case."""


@dataclass(frozen=True)
class Task:
    """A case to do.

    Attributes:
        case: its raw files.
        trust: hash of the raw voxels that the preprocessed case was made from; where they are still the same, nothing is
            written. ``"any"`` trusts the preprocessed case whatever the hash.
        stale: the preprocessed case is there and outdated.
        hash_only: only the hash of the voxels is wanted.
    """

    case: RawCase
    trust: str = ""
    stale: bool = False
    hash_only: bool = False


@dataclass(frozen=True)
class Result:
    """What became of a task: an entry for the index, or, in ``fatal``, why no case can be done at the moment.

    Attributes:
        entry: of a good or a bad case.
        fatal: ``"disk"``, ``"memory"``, ``"write"`` or empty.
        detail: the exception's text where fatal.
        nbytes: size of the preprocessed case, uncompressed.
    """

    entry: Entry
    fatal: str = ""
    detail: str = ""
    nbytes: int = 0


class _Bad(Exception):
    """This image cannot be used."""


class _Known(Exception):
    """The preprocessed case is there already."""


@dataclass
class _State:
    """How far a case has come."""

    final: Path
    trust: str
    hash_only: bool
    sha256: str = ""
    spacing: tuple[float, ...] = ()
    nbytes: int = 0
    saving: bool = False

    def shape(self) -> tuple[int, ...]:
        """Spatial shape of the preprocessed case."""
        return tuple(int(i) for i in open_array(self.final, mapped=False).shape[1:])


def voxel_hash(data: np.ndarray) -> str:
    """sha256 (hex) of an image's shape and voxels, as nnU-Net's reader gives them: ``(C, Z, Y, X)`` float32."""
    digest = hashlib.sha256(str(tuple(data.shape)).encode())
    digest.update(np.ascontiguousarray(data, dtype=np.float32).data.cast("B"))
    return digest.hexdigest()


def storage(shape: Sequence[int]) -> dict[str, tuple[int, ...]]:
    """Chunks and blocks of a case's file, for nnU-Net's ``save_case``.

    Crops lie anywhere, and each block that one touches is unpacked whole: of nnU-Net's blocks, which are as large as its patch
    allows, a crop of 64^3 unpacks up to 96^3 voxels where blocks are 32^3, and 80^3 where they are 16^3.

    Args:
        shape: voxels per axis.
    """
    chunks, blocks = (tuple(min(size, s) for s in shape) for size in (CHUNK, BLOCK))
    return {"chunks": (1, *chunks), "blocks": (1, *blocks)}


def _reason(error: BaseException, printed: str) -> str:
    """One line for a person; nnU-Net's readers print what is wrong and raise an empty error."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[-1] if lines else next((p.strip() for p in printed.splitlines() if p.strip()), "")
    return f"{type(error).__name__}: {text}"[:300] if text else type(error).__name__


@dataclass
class CaseWorker:
    """Preprocesses cases one by one. Pickles, so that it can be sent to processes once.

    Args:
        plans: the target's plans.
        configuration: name of the configuration.
        dataset_json: the target's.
        folder: where preprocessed cases go.
        temporary: folder on the same file system where they are written first.
    """

    plans: dict[str, Any]
    configuration: str
    dataset_json: dict[str, Any]
    n_channels: int
    folder: Path
    temporary: Path

    @cached_property
    def _manager(self) -> PlansManager:
        return PlansManager(self.plans)

    @cached_property
    def _config(self) -> ConfigurationManager:
        return self._manager.get_configuration(self.configuration)

    def __call__(self, task: Task) -> Result:
        """Do one case; never raises but for Ctrl-C."""
        final = self.folder / f"{task.case.name}{IMAGE}"
        state = _State(final, task.trust, task.hash_only)
        printed = io.StringIO()
        loud = sitk.ProcessObject.GetGlobalWarningDisplay()
        sitk.ProcessObject.SetGlobalWarningDisplay(False)
        try:
            with contextlib.redirect_stdout(printed), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                for file in task.case.files:
                    self._whole(file)
                self._same_size(task.case.files)
                if (
                    not (task.trust or task.stale or task.hash_only)
                    and final.exists()
                    and self._newer(final, task.case)
                ):
                    state.trust = "any"  # another process has made it meanwhile
                with contextlib.suppress(_Known):
                    self._run(task.case, state)
            shape = () if task.hash_only else state.shape()
            return Result(Entry(task.case.name, task.case.stamps, shape, state.spacing, state.sha256))
        except _Bad as error:
            file, reason = error.args
            return Result(Entry(task.case.name, task.case.stamps, bad=reason, bad_file=file or task.case.files[0]))
        except MemoryError:
            return self._fatal(task, state, "memory", "out of memory")
        except Exception as error:  # readers raise anything on broken files; each case has to be named
            reason = _reason(error, printed.getvalue())
            if state.saving:
                full = shutil.disk_usage(self.folder).free < 2 * state.nbytes
                return self._fatal(task, state, "disk" if full else "write", reason)
            return Result(Entry(task.case.name, task.case.stamps, bad=reason, bad_file=task.case.files[0]))
        finally:
            sitk.ProcessObject.SetGlobalWarningDisplay(loud)
            self._clean(task.case.name)

    def _fatal(self, task: Task, state: _State, kind: str, detail: str) -> Result:
        return Result(Entry(task.case.name, task.case.stamps), kind, detail, state.nbytes)

    @staticmethod
    def _newer(final: Path, case: RawCase) -> bool:
        return final.stat().st_mtime_ns > max(stamp[2] for stamp in case.stamps)

    @staticmethod
    def _whole(file: str) -> None:
        try:
            check_header(file)
            check_whole(file)
        except (ValueError, OSError) as error:
            raise _Bad(file, str(error)) from None

    @staticmethod
    def _same_size(files: tuple[str, ...]) -> None:
        try:
            check_same_size(files)
        except ValueError as error:
            raise _Bad(files[-1], str(error)) from None

    def _inspect(self, data: np.ndarray, properties: dict[str, Any], state: _State) -> None:
        """Look at the raw voxels, ``(C, Z, Y, X)``."""
        state.spacing = tuple(float(s) for s in properties["spacing"])
        if not state.hash_only:
            if data.shape[0] != self.n_channels:
                raise _Bad("", f"it has {counted(data.shape[0], 'channel')}, the plans have {self.n_channels}")
            if min(data.shape[1:]) == 1 and len(self._config.patch_size) == 3:
                raise _Bad("", f"a single slice, of which {self.configuration} can learn nothing; -c 2d takes slices")
            try:
                check_voxels(data)
            except ValueError as error:
                raise _Bad("", str(error)) from None
        state.sha256 = voxel_hash(data)
        if state.hash_only or (state.trust in ("any", state.sha256) and complete(state.final.parent, state.final.stem)):
            raise _Known

    def _run(self, case: RawCase, state: _State) -> None:
        if state.hash_only:
            data, properties = self._manager.image_reader_writer_class().read_images(list(case.files))
            self._inspect(data, properties, state)
        inspect = self._inspect

        class Unlabelled(self._config.preprocessor_class):  # type: ignore[misc,name-defined]
            """The plans' own preprocessor, which looks at the raw voxels first."""

            def run_case_npy(self, data: np.ndarray, seg: Any, properties: dict, *args: Any) -> tuple:
                inspect(data, properties, state)
                data, seg, properties = super().run_case_npy(data, seg, properties, *args)
                if not np.isfinite(data).all():
                    raise _Bad("", "voxels are NaN or infinite after preprocessing")
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

        truncated = str(self.temporary / case.name)
        self._clean(case.name)  # a process that was killed may have left a part, which blosc2 does not overwrite
        preprocessor = Unlabelled(verbose=False)
        preprocessor.run_case_save(truncated, list(case.files), None, self._manager, self._config, self.dataset_json)
        written = open_array(f"{truncated}{IMAGE}", mapped=False)
        written[:]  # raises where the disk took less than all of it
        store_range(Path(f"{truncated}.pkl"), intensity_range(written, masked=all(self._config.use_mask_for_norm)))
        for ending in (PROPERTIES, LABELS, IMAGE):  # the image last: it marks the case as done
            with open(truncated + ending, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(truncated + ending, self.folder / f"{case.name}{ending}")
        state.saving = False

    def _clean(self, name: str) -> None:
        for ending in (PROPERTIES, LABELS, IMAGE):
            with contextlib.suppress(OSError):
                os.unlink(self.temporary / f"{name}{ending}")
