"""Body masks of preprocessed cases, made from their raw images once and kept in a folder of their own."""

from __future__ import annotations

import contextlib
import logging
import os
import random
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
from nnunetv2.preprocessing.normalization.map_channel_name_to_normalization import get_normalization_scheme
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnssl.errors import NnsslError
from nnssl.plans import Plan
from nnssl.preprocessed import IMAGE, PROPERTIES, open_array
from nnssl.pretrain.data.case_set import CaseRef, CaseSet
from nnssl.pretrain.data.folders import beside, body_folder
from nnssl.pretrain.data.orientation import Geometry
from nnssl.pretrain.prepare.body import body_of_raw, resize_mask
from nnssl.pretrain.prepare.index import Entry, Index
from nnssl.pretrain.prepare.preprocess import done_cases, in_memory, raise_fatal, temporary_folder
from nnssl.pretrain.prepare.raw import RawSource, list_raw
from nnssl.pretrain.prepare.worker import Result, Task
from nnssl.properties import read_properties
from nnssl.words import counted

log = logging.getLogger("nnssl")

BLOCK, CHUNK = 32, 128
"""Voxels per axis that are unpacked at once, and that are stored together. A mask takes about a hundredth of its image."""

NAMED = 3


def write_mask(path: Path, mask: np.ndarray) -> None:
    """Write a ``(Z, Y, X)`` bool mask as ``(1, Z, Y, X)`` uint8 of which parts can be read."""
    content = mask[None].astype(np.uint8)
    chunks = tuple(min(CHUNK, n) for n in content.shape)
    blocks = tuple(min(BLOCK, n) for n in chunks)
    blosc2.asarray(
        np.ascontiguousarray(content),
        urlpath=str(path),
        mode="w",
        chunks=chunks,
        blocks=blocks,
        cparams={"codec": blosc2.Codec.LZ4HC, "clevel": 5, "nthreads": 1},
    )


@dataclass
class BodyWorker:
    """Makes masks one by one. Pickles, so that it can be sent to processes once.

    Args:
        plans: the target's plans.
        is_ct: of each channel of the raw images.
        cases: folder of the preprocessed cases.
        folder: where masks go.
        temporary: folder on the same file system where they are written first.
    """

    plans: dict[str, Any]
    is_ct: tuple[bool, ...]
    cases: Path
    folder: Path
    temporary: Path

    def __call__(self, task: Task) -> Result:
        """Make one mask; an image that cannot be read, or is not the one that was preprocessed, gives an entry that says so."""
        name, stamps, saving = task.case.name, task.case.stamps, False
        draft = self.temporary / f"{name}.b2nd"
        try:
            mask = self._mask(task)
            saving = True
            write_mask(draft, mask)
            with open(draft, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(draft, self.folder / f"{name}.b2nd")
            return Result(Entry(name, stamps, mask.shape))
        except MemoryError:
            return Result(Entry(name, stamps), "memory", "out of memory")
        except Exception as error:  # readers raise anything on broken files
            if saving:
                full = shutil.disk_usage(self.folder).free < 1 << 20
                return Result(Entry(name, stamps), "disk" if full else "write", str(error), mask.nbytes)
            return Result(
                Entry(name, stamps, bad=f"{type(error).__name__}: {error}"[:300], bad_file=task.case.files[0])
            )
        finally:
            with contextlib.suppress(OSError):
                draft.unlink()

    def _mask(self, task: Task) -> np.ndarray:
        name, manager = task.case.name, PlansManager(self.plans)
        shape = open_array(self.cases / f"{name}{IMAGE}", mapped=False).shape[1:]
        properties = read_properties(self.cases / f"{name}{PROPERTIES}")
        order = manager.transpose_forward
        place = Geometry.from_properties(properties, shape, order, self.folder.parent.name)
        data, _ = manager.image_reader_writer_class().read_images(list(task.case.files))
        data = data.transpose(0, *[i + 1 for i in order])
        if data.shape[1:] != place.full:
            raise ValueError(
                f"the raw image has {data.shape[1:]} voxels, the one that was preprocessed had {place.full}"
            )
        body = body_of_raw(data, self.is_ct, place.axes[2])
        inner = body[tuple(slice(a, a + n) for a, n in zip(place.crop_start, place.cropped))]
        return resize_mask(inner, place.shape)


def _is_ct(raw: RawSource, plan: Plan) -> tuple[bool, ...]:
    """Of each channel of the raw images: by the source's channel name or the target's normalisation."""
    schemes = plan.normalization_schemes
    named = [get_normalization_scheme(raw.channel_names.get(c, "")).__name__ for c in range(raw.n_channels)]
    ours = [schemes[c] if c < len(schemes) else "" for c in range(raw.n_channels)]
    return tuple("CTNormalization" in pair for pair in zip(named, ours))


def _tasks(raw: RawSource, refs: Sequence[CaseRef], index: Index, done: Mapping[str, Any]) -> list[Task]:
    tasks = []
    for ref in refs:
        case = raw.cases.get(ref.name)
        if case is None:
            continue
        entry = index.entries.get(ref.name)
        if entry is None or entry.files != case.stamps or not (entry.bad or ref.name in done):
            tasks.append(Task(case))
    random.Random(os.getpid()).shuffle(tasks)  # several machines may work on it and seldom meet
    return tasks


def _make(plan: Plan, source: str, refs: Sequence[CaseRef], raw: RawSource, n_processes: int) -> list[Entry]:
    """Make what is missing of one source; returns the cases that have no mask because their raw image gives none."""
    folder = body_folder(plan, source)
    index = Index(beside(folder, "index.jsonl"))
    tasks = _tasks(raw, refs, index, done_cases(folder, image_only=True))
    if tasks:
        with temporary_folder(folder) as temporary:
            worker = BodyWorker(plan.plans, _is_ct(raw, plan), refs[0].folder, folder, temporary)
            results = in_memory(worker, tasks, n_processes, f"Body masks of {source}")
            with contextlib.closing(results):
                for count, result in enumerate(results):
                    if result.fatal:
                        raise_fatal(result, folder, len(tasks) - count)
                    if result.entry.bad:
                        (folder / f"{result.entry.name}.b2nd").unlink(missing_ok=True)  # of another image
                    index.append(result.entry)
    return [e for ref in refs if (e := index.entries.get(ref.name)) is not None and e.bad]


def _have(plan: Plan, source: str) -> set[str]:
    """Cases of a source that have a mask, from a listing that looks at no file."""
    folder = body_folder(plan, source)
    return {name[: -len(".b2nd")] for name in os.listdir(folder)} if folder.is_dir() else set()


def prepare_bodies(plan: Plan, case_set: CaseSet, *, n_processes: int, thorough: bool = False) -> int:
    """Make the masks of all cases whose raw images are there, unless they have been made; say in one line what is used.

    A mask is threshold, flood fill and largest pieces of the raw image (:mod:`nnssl.pretrain.prepare.body`), brought through the
    transpose, crop and resampling that nnU-Net did with the image. Where there is no raw image, readers fall back to the
    preprocessed intensities. An interrupted start is continued by the next.

    Args:
        plan: of the target.
        case_set: the cases.
        n_processes: 0 and 1 work in this process.
        thorough: also look at the raw images of a source that has all its masks, whether they have changed.

    Returns:
        Cases that have a mask.

    Raises:
        NnsslError: no space, no permission, no memory, or a killed process.
    """
    sources: dict[str, list[CaseRef]] = {}
    for ref in case_set.cases:
        sources.setdefault(ref.source, []).append(ref)
    masks, failed = 0, []
    for source, refs in sources.items():
        if thorough or not _have(plan, source) >= {ref.name for ref in refs}:
            try:
                raw = list_raw(source, plan)
            except NnsslError as error:
                log.debug("No raw images of %s: %s", source, error)
                raw = None
            if raw is not None:
                failed += _make(plan, source, refs, raw, n_processes)
        done = _have(plan, source)
        masks += sum(ref.name in done for ref in refs)
    rest = len(case_set.cases) - masks
    if failed:
        shown = "; ".join(f"{e.name}: {e.bad}" for e in failed[:NAMED])
        log.warning(
            "No body mask could be made from %s: %s%s",
            counted(len(failed), "raw image"),
            shown,
            " ..." if len(failed) > NAMED else "",
        )
    if not rest:
        log.info("Masks of the body: made from the raw images of all %d cases.", masks)
    elif masks:
        log.info(
            "Masks of the body: from the raw images of %d cases, preprocessed intensities for the other %d.",
            masks,
            rest,
        )
    else:
        log.info("Masks of the body: from preprocessed intensities; the raw images (nnUNet_raw) are not there.")
    return masks
