"""Body masks of preprocessed cases, made from their raw images once and kept in a folder of their own."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import blosc2
import numpy as np
from nnunetv2.preprocessing.normalization.map_channel_name_to_normalization import get_normalization_scheme

from nnssl.plans import Plan
from nnssl.preprocessed import IMAGE, PROPERTIES, list_cases, open_array
from nnssl.pretrain.data.case_set import CaseRef, CaseSet
from nnssl.pretrain.data.folders import beside, body_folder
from nnssl.pretrain.data.orientation import Geometry
from nnssl.pretrain.prepare.body import body_of_raw, resize_mask
from nnssl.pretrain.prepare.index import Entry, Index
from nnssl.pretrain.prepare.preprocess import do_all
from nnssl.pretrain.prepare.raw import RawCase, RawSource, find_raw
from nnssl.pretrain.prepare.worker import State, Task, Worker, move_synced
from nnssl.properties import read_properties
from nnssl.words import counted, first_few

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


@dataclass(frozen=True)
class BodyWorker(Worker):
    """Makes the masks of the preprocessed cases in ``cases``; an image that is not the one that was preprocessed gives none."""

    is_ct: tuple[bool, ...]
    cases: Path

    def make(self, task: Task, state: State) -> None:
        """Make one mask."""
        name = f"{task.case.name}{IMAGE}"
        try:
            mask = self._mask(task.case)
        except MemoryError:
            raise
        except Exception:
            (self.folder / name).unlink(missing_ok=True)  # of another image
            raise
        state.shape, state.nbytes, state.saving = mask.shape, mask.nbytes, True
        write_mask(self.temporary / name, mask)
        move_synced(self.temporary / name, self.folder / name)

    def _mask(self, case: RawCase) -> np.ndarray:
        order = self.plan.transpose_forward
        shape = open_array(self.cases / f"{case.name}{IMAGE}", mapped=False).shape[1:]
        properties = read_properties(self.cases / f"{case.name}{PROPERTIES}")
        place = Geometry.from_properties(properties, shape, order, self.folder.parent.name)
        data, _ = self.plan.manager.image_reader_writer_class().read_images(list(case.files))
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
    named = [get_normalization_scheme(raw.channel_names.get(c, "")).__name__ for c in range(raw.n_channels)]
    ours = plan.normalization_schemes
    return tuple("CTNormalization" in (name, *ours[c : c + 1]) for c, name in enumerate(named))


def _make(plan: Plan, source: str, refs: Sequence[CaseRef], n_processes: int) -> list[Entry]:
    """Make what is missing of one source; returns the cases that have no mask because their raw image gives none."""
    raw = find_raw(source, plan)
    if raw is None:
        return []
    folder = body_folder(plan, source)
    index, done, tasks = Index(beside(folder, "index.jsonl")), set(list_cases(folder)), []
    for ref in refs:
        case, entry = raw.cases.get(ref.name), index.entries.get(ref.name)
        if case is not None and not (entry and entry.files == case.stamps and (entry.bad or ref.name in done)):
            tasks.append(Task(case))
    if tasks:
        worker = BodyWorker(plan, folder, Path(), _is_ct(raw, plan), refs[0].folder)
        do_all(worker, tasks, index, n_processes, f"Body masks of {source}")
    return [e for ref in refs if (e := index.entries.get(ref.name)) is not None and e.bad]


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
        names, folder = {ref.name for ref in refs}, body_folder(plan, source)
        if thorough or not names <= set(list_cases(folder)):
            failed += _make(plan, source, refs, n_processes)
        masks += len(names.intersection(list_cases(folder)))
    rest = len(case_set.cases) - masks
    if failed:
        shown = first_few([f"{e.name}: {e.bad}" for e in failed], NAMED, "; ")
        log.warning("No body mask could be made from %s: %s", counted(len(failed), "raw image"), shown)
    if not rest:
        log.info("Masks of the body: made from the raw images of all %d cases.", masks)
    elif masks:
        text = "Masks of the body: from the raw images of %d cases, preprocessed intensities for the other %d."
        log.info(text, masks, rest)
    else:
        log.info("Masks of the body: from preprocessed intensities; the raw images (nnUNet_raw) are not there.")
    return masks
