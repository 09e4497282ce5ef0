"""Labelled patches from disk: parts of image and segmentation, around labelled voxels as often as nnU-Net has them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nnssl.errors import NnsslError
from nnssl.plans import Plan
from nnssl.preprocessed import IMAGE, LABELS, open_array, read_box
from nnssl.pretrain.data.sampling import HELD_OUT, draw_cases, draw_start, generator
from nnssl.pretrain.omni.cases import LabelledCase, class_locations

UNLABELLED, LABELLED, COMPARED = 2, 3, 4
"""Streams of random numbers beside those of :mod:`nnssl.pretrain.data.sampling`."""


@dataclass(frozen=True)
class Sizes:
    """How many patches of which size a step has.

    Attributes:
        size, read_size: voxels per axis that the network sees, and that are read around the same centre.
        labelled, unlabelled: patches a step over all ranks.
        foreground: share of labelled patches around a labelled voxel.
    """

    size: tuple[int, ...]
    read_size: tuple[int, ...]
    labelled: int
    unlabelled: int
    foreground: float


def read_label(folder: Path, case: str) -> np.ndarray:
    """A preprocessed case's label map, ``(*size)``."""
    try:
        return np.asarray(_open(folder / f"{case}{LABELS}")[0])
    except (RuntimeError, OSError, ValueError) as error:
        raise NnsslError(f"Labelled case {case} in {folder} is damaged ({error}). Preprocess it again.") from error


def _open(file: Path) -> Any:
    try:
        return open_array(file)
    except (OSError, ValueError) as error:
        what = "does not exist" if isinstance(error, FileNotFoundError) else f"cannot be read ({error})"
        raise NnsslError(f"--labelled: {file} {what}. Preprocess the dataset again.") from error


@dataclass(frozen=True)
class LabelledPatch:
    """One patch: image ``(C, *window)`` float32 and labels ``(1, *window)`` int16, -1 outside of the image."""

    data: np.ndarray
    label: np.ndarray
    case: LabelledCase


@dataclass
class Patches:
    """Patches of one step on one rank.

    Attributes:
        data: ``(B, C, *window)`` float32.
        label: ``(B, 1, *window)`` int16, or None where there are no labels.
        annotated: heads that are annotated in each sample, None in a sample: all.
        case: names of the cases.
        first, total: number of the first one among all of the step, and how many these are over all ranks.
        augment: whether they are to be augmented.
    """

    data: Tensor
    label: Tensor | None
    annotated: list[tuple[int, ...] | None]
    case: list[str]
    first: int
    total: int
    augment: bool = True

    def _map(self, how: Callable[[Tensor], Tensor]) -> Patches:
        return replace(self, data=how(self.data), label=None if self.label is None else how(self.label))

    def to(self, device: torch.device, non_blocking: bool = True) -> Patches:
        """Move to ``device``, without waiting where memory is pinned."""
        return self._map(lambda x: x.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Patches:
        """Called by torch's DataLoader."""
        return self._map(lambda x: x.pin_memory())

    def __len__(self) -> int:
        return int(self.data.shape[0])


def stack(samples: Sequence[LabelledPatch], first: int, total: int, augment: bool = True) -> Patches:
    """A batch of patches."""
    return Patches(
        torch.from_numpy(np.stack([s.data for s in samples])),
        torch.from_numpy(np.stack([s.label for s in samples])),
        [s.case.annotated for s in samples],
        [s.case.name for s in samples],
        first,
        total,
        augment,
    )


class LabelledDataset:
    """Labelled patches by ``(step, sample)``: a pure function of these and the seed. It holds no images, and pickles.

    As in nnU-Net the last ``sizes.foreground`` of a step are around a labelled voxel. Held-out cases are walked through in a
    fixed order instead of drawn, and no margin is read.
    """

    def __init__(
        self,
        cases: Sequence[LabelledCase],
        folder: Path,
        plan: Plan,
        sizes: Sizes,
        *,
        seed: int,
        held_out: bool = False,
    ) -> None:
        if not cases:
            raise NnsslError("There are no labelled cases to draw patches from.")
        manager = plan.manager.get_label_manager(plan.dataset_json)
        self.cases, self.folder, self.seed, self.held_out = list(cases), folder, seed, held_out
        self.stream = COMPARED if held_out else LABELLED
        self.batch, self.foreground, self.n_channels = sizes.labelled, sizes.foreground, plan.n_channels
        self.flat = plan.dim == 2
        first = (1,) if self.flat else ()
        self.size = (*first, *sizes.size)
        self.read_size = self.size if held_out else (*first, *sizes.read_size)
        self.anywhere = (-1, *manager.all_labels)
        """nnU-Net's key for all voxels that are annotated, where there is an ignore label."""
        self.has_ignore = bool(manager.has_ignore_label)
        classes = manager.foreground_regions if manager.has_regions else manager.foreground_labels
        self.heads = {i: _plain(key) for i, key in enumerate(classes, 0 if manager.has_regions else 1)}
        """nnU-Net's key for each segmentation head but the background's."""

    def __getitem__(self, item: tuple[int, int]) -> LabelledPatch:
        """Draw a patch; a damaged case, or one with NaN or infinite voxels there, is refused."""
        step, sample = item
        drawn = draw_cases(self.seed, step, HELD_OUT if self.held_out else self.stream, len(self.cases), self.batch)
        case = self.cases[int(drawn[sample])]
        image, label = _open(self.folder / f"{case.name}{IMAGE}"), _open(self.folder / f"{case.name}{LABELS}")
        if (
            len(image.shape) != 4
            or image.shape[0] != self.n_channels
            or tuple(image.shape[1:]) != tuple(label.shape[1:])
        ):
            raise NnsslError(
                f"Labelled case {case.name}: image {tuple(image.shape)} and segmentation {tuple(label.shape)} do not fit each "
                f"other or the plan ({self.n_channels} channels). Preprocess the dataset again."
            )
        rng = generator(self.seed, step, self.stream, sample)
        wanted = sample >= round(self.batch * (1 - self.foreground))
        start = self._start(case, image.shape[1:], rng, wanted)
        try:
            data = read_box(image, start, self.read_size)
            seg = read_box(label, start, self.read_size, np.int16, outside=-1)[:1]
        except (OSError, ValueError) as error:
            raise NnsslError(
                f"Labelled case {case.name} in {self.folder} is damaged ({error}). Preprocess it again."
            ) from error
        if not np.isfinite(data.sum(dtype=np.float64)):
            raise NnsslError(
                f"Labelled case {case.name} has NaN or infinite voxels. Leave it out with --labelled-cases."
            )
        return LabelledPatch(data[:, 0], seg[:, 0], case) if self.flat else LabelledPatch(data, seg, case)

    def _start(self, case: LabelledCase, shape: Sequence[int], rng: np.random.Generator, wanted: bool) -> np.ndarray:
        """First voxel of the window; negative outside of the image."""
        voxel = self._voxel(case, rng, wanted) if wanted or self.has_ignore else None
        if voxel is None:
            return draw_start(rng, shape, self.read_size, self.size)
        start = []
        for n, v, s, w in zip(shape, voxel, self.size, self.read_size):
            first = min(max(0, int(v) - s // 2), n - s) if n > s else (n - s) // 2
            start.append(first - (w - s) // 2)
        return np.asarray(start, dtype=np.int64)

    def _voxel(self, case: LabelledCase, rng: np.random.Generator, wanted: bool) -> np.ndarray | None:
        """A voxel of one of the annotated classes, or, not ``wanted``, any that is annotated at all; None: there is none."""
        known = {k: v for k, v in class_locations(self.folder, case.name).items() if len(v)}
        keys = []
        if wanted:
            heads = {self.heads[i] for i in (self.heads if case.annotated is None else case.annotated)}
            keys = [k for k in known if _plain(k) in heads]
        if not keys and self.has_ignore:
            keys = [k for k in known if _plain(k) == self.anywhere]
        if not keys:
            return None
        voxels = known[keys[int(rng.integers(len(keys)))]]
        return np.asarray(voxels[int(rng.integers(len(voxels)))][1:])


def _plain(key: Any) -> Any:
    return tuple(int(i) for i in key) if isinstance(key, (tuple, list)) else int(key)
