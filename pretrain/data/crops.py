"""The data set of crops: (step, sample) -> one crop."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset, get_worker_info

from nnssl.errors import NnsslError
from nnssl.pretrain.augment.rng import HELD_OUT_STEP, StepRNG
from nnssl.pretrain.augment.spatial import reach
from nnssl.pretrain.data.case import CaseReader, HeldCase, OpenCase, damaged
from nnssl.pretrain.data.case_set import CaseRef
from nnssl.pretrain.data.intensity import body_mask
from nnssl.pretrain.data.reorientation import AxisTransform, Orientation
from nnssl.pretrain.data.resample import foreground_box, resample_box
from nnssl.pretrain.data.sampling import TRAIN, SampleStream, draw_cases, draw_start, generator
from nnssl.pretrain.types import CropRequest, Crops

__all__ = ["CropDataset", "Sample", "collate"]

TRIES = 20
"""Places that are tried before a crop of air is accepted."""
LEAST_BODY, LEAST_STD = 0.1, 1e-6
"""Least share of body voxels in a crop, and least standard deviation."""


@dataclass(frozen=True)
class Sample:
    """One crop; see :class:`nnssl.pretrain.methods.Crops` for the arrays, which have no batch axis here.

    Attributes:
        body_share: share of body voxels in the inner crop, or in all that is read where crops are cut out of that.
        std: standard deviation of the same.
        affine: ``(dim, dim + 1)``, the transform that ``data``, the middle of the region, was read for; or None.
        trimmed: whether ``data`` is the region's first part and not its middle.
    """

    data: np.ndarray
    body: np.ndarray
    position: np.ndarray
    axis_position: np.ndarray
    intensity: np.ndarray
    start: np.ndarray
    shape: np.ndarray
    case: str
    source: str
    body_share: float
    std: float
    affine: np.ndarray | None = None
    trimmed: bool = False

    @property
    def accepted(self) -> bool:
        """Whether it shows more than air."""
        return self.body_share >= LEAST_BODY and self.std >= LEAST_STD


class CaseTable:
    """The cases of a data set in two arrays, whose memory forked workers share; a case costs the bytes of the longest name."""

    def __init__(self, refs: Sequence[CaseRef]) -> None:
        self.places = list(dict.fromkeys((r.folder, r.source) for r in refs))
        index = {place: i for i, place in enumerate(self.places)}
        self._place = np.asarray([index[r.folder, r.source] for r in refs], dtype=np.int32)
        self._name = np.asarray([r.name.encode("utf-8", "surrogateescape") for r in refs])

    def __len__(self) -> int:
        return len(self._place)

    def __getitem__(self, i: int) -> CaseRef:
        folder, source = self.places[int(self._place[i])]
        return CaseRef(bytes(self._name[i]).decode("utf-8", "surrogateescape"), folder, source)


class _Region(NamedTuple):
    """What was read of a case.

    Attributes:
        data, body: in the case's axes.
        at, extent: the box in the case's array whose centre is the crop's.
        start: first voxel in the reoriented array of ``shape``.
        first: where the inner crop begins in ``data`` once it is reoriented.
    """

    data: np.ndarray
    body: np.ndarray
    at: np.ndarray
    extent: Sequence[int] | np.ndarray
    start: np.ndarray
    shape: Sequence[int]
    first: Sequence[int]


class CropDataset(Dataset[Sample]):
    """Crops by ``(step, sample)``: a pure function of these and the seed. It holds no images, and pickles.

    Args:
        refs: cases to draw from.
        reader: opens them.
        request: crop and read size, with two axes for 2d plans, whose crops are single slices.
        stream: the samples of each step.
        orientation: what cases are reoriented to; they stay as they are where None.

    Attributes:
        counters: ``(n, 2)`` int64 tensor in shared memory that counts rejected places and accepted crops of air, one row per
            worker; None: nothing is counted.

    Raises:
        NnsslError: no cases, or weights that do not fit them.
    """

    def __init__(
        self,
        refs: Sequence[CaseRef],
        reader: CaseReader,
        request: CropRequest,
        stream: SampleStream,
        orientation: Orientation | None = None,
    ) -> None:
        if not refs:
            raise NnsslError("There are no cases to draw crops from.")
        if len(request.read_size) != len(request.size) or any(w < s for w, s in zip(request.read_size, request.size)):
            raise ValueError(
                f"read_size {request.read_size} must be at least as large as size {request.size} on each axis"
            )
        if (request.move is not None or request.trim) and request.sampling != "jitter":
            raise ValueError(f"crops with sampling={request.sampling} are read whole")
        self.table, self.request, self.stream, self.orientation = CaseTable(refs), request, stream, orientation
        self.flat = len(request.size) == 2
        self.size = (1, *request.size) if self.flat else tuple(request.size)
        self.read_size = (1, *request.read_size) if self.flat else tuple(request.read_size)
        self.inner = self.size if request.sampling == "jitter" else self.read_size
        self.resampled = request.sampling == "whole"
        self.crops_per_case = max(1, request.crops_per_case)
        self.counters: torch.Tensor | None = None
        self._probabilities = _probabilities(stream.weights, len(refs))
        self._reader = reader
        self._step: tuple[int, np.ndarray] | None = None
        self._moves: tuple[int, np.ndarray, np.ndarray] | None = None
        self._held: tuple[tuple[int, int], OpenCase] | None = None

    def case_of(self, step: int, sample: int) -> CaseRef:
        """The case that a sample shows."""
        if self._step is None or self._step[0] != step:
            stream, count = self.stream, -(-self.stream.batch_size // self.crops_per_case)
            cases = draw_cases(stream.seed, step, stream.number, len(self.table), count, self._probabilities)
            self._step = (step, cases)
        return self.table[int(self._step[1][sample // self.crops_per_case])]

    def _open(self, step: int, sample: int) -> OpenCase:
        """The case of a sample; where several crops of it are wanted it is read once, unless less than that is read."""
        if self.crops_per_case == 1 or self.resampled:
            return self._reader.open(self.case_of(step, sample))
        key = step, sample // self.crops_per_case
        if self._held is None or self._held[0] != key:
            case = self._reader.open(self.case_of(step, sample))
            read = self.crops_per_case * np.prod(np.minimum(self.read_size, case.array.shape[1:]))
            self._held = key, HeldCase.of(case) if np.prod(case.array.shape[1:]) <= read else case
        return self._held[1]

    def release(self) -> None:
        """Forget what is held for further crops of a case."""
        self._held = None

    def _move(self, step: int, sample: int) -> tuple[np.ndarray | None, tuple[int, ...]]:
        """The transform that the views of a sample begin with, and how many voxels these look at."""
        move, stream = self.request.move, self.stream
        if move is None:
            return None, self.read_size
        if self._moves is None or self._moves[0] != step:
            there = step if stream.number == TRAIN else HELD_OUT_STEP + step
            affine = move.draw(StepRNG(stream.seed, there, stream.batch_size))
            sizes = reach(affine, move.size, self.read_size[-len(move.size) :])
            self._moves = step, affine.rows.numpy(), sizes.numpy()
        size = tuple(self._moves[2][sample].tolist())
        return self._moves[1][sample], (1, *size) if self.flat else size

    def __getitem__(self, item: tuple[int, int]) -> Sample:
        """Draw a crop: of up to :data:`TRIES` places the first that shows more than air, else the one with most body.

        Voxels that are not finite are never passed on.

        Raises:
            NnsslError: the case's files are missing or damaged, or each place has NaN or infinite voxels.
        """
        step, sample = item
        case = self._open(step, sample)
        affine, read_size = self._move(step, sample)
        rng = generator(self.stream.seed, step, self.stream.number, sample)
        best: Sample | None = None
        for redrawn in range(1 if self.resampled and not self.flat else TRIES):
            found = self._crop(case, rng, affine, read_size)
            if found is None:
                continue
            if found.accepted:
                self._count(redrawn, 0)
                return found
            if best is None or found.body_share > best.body_share:
                best = found
        if best is None:
            raise NnsslError(
                f"Case {case.ref.name} of {case.ref.source} has NaN or infinite voxels wherever a crop was tried "
                f"({case.ref.folder / case.ref.name}.b2nd). Leave it out with --exclude, or preprocess a repaired image."
            )
        self._count(TRIES - 1, 1)
        return best

    def _crop(
        self, case: OpenCase, rng: np.random.Generator, affine: np.ndarray | None, size: Sequence[int]
    ) -> Sample | None:
        """One place, and the middle ``size`` voxels of what is there; None where voxels are not finite."""
        geometry = case.info.geometry
        transform = AxisTransform() if self.orientation is None else self.orientation.transform(geometry)
        read = self._whole(case, transform, rng) if self.resampled else self._part(case, transform, rng, size)
        if not np.isfinite(read.data.sum()) and not np.isfinite(read.data).all():  # a float32 sum may overflow
            return None
        data, body = transform(read.data), transform(read.body)
        inner = (slice(None), *[slice(max(f, 0), f + s) for f, s in zip(read.first, self.inner)])
        along = geometry.axis_position(read.at, read.extent)
        return Sample(
            data=data[:, 0] if self.flat else data,
            body=body[:, 0] if self.flat else body,
            position=geometry.position(along),
            axis_position=transform.position(along),
            intensity=case.info.intensity,
            start=read.start,
            shape=np.asarray(read.shape, dtype=np.int64),
            case=case.ref.name,
            source=case.ref.source,
            body_share=np.count_nonzero(body[inner]) / int(np.prod(self.inner)),
            std=_std(data[inner]),
            affine=affine,
            trimmed=self.request.trim,
        )

    def _part(self, case: OpenCase, transform: AxisTransform, rng: np.random.Generator, size: Sequence[int]) -> _Region:
        """The middle ``size`` voxels of the read size around a crop; of these what lies in the image, where that is asked for."""
        whole = case.info.geometry.shape
        shape = transform.shape(whole)
        begin = draw_start(rng, shape, self.read_size, self.inner)
        start = begin + [(n - s) // 2 for n, s in zip(self.read_size, size)]
        at, extent = transform.box(start, size, whole)
        if self.request.trim:  # on axes on which the image has room for the crop
            low, high = np.maximum(start, 0), np.minimum(start + size, shape)
            roomy = high - low >= self.size
            start, size = np.where(roomy, low, start), np.where(roomy, high - low, size).tolist()
        # where that is trimmed the inner crop may lack a plane of padding
        first = [int(b) + (n - s) // 2 - int(f) for b, n, s, f in zip(begin, self.read_size, self.inner, start)]
        data, body = case.read(*transform.box(start, size, whole))
        return _Region(data, body, at, extent, start, shape, first)

    def _whole(self, case: OpenCase, transform: AxisTransform, rng: np.random.Generator) -> _Region:
        """The foreground resampled to the read size; for 2d plans one of its slices."""
        try:
            box = np.asarray(foreground_box(case.array, case.info.threshold, case.masked), dtype=np.int64)
            if self.flat:
                axis = transform.axes[0]
                low = int(rng.integers(*box[axis]))
                box[axis] = low, low + 1
            data = resample_box(case.array, box.tolist(), transform.array_order(self.read_size))
        except (RuntimeError, OSError, ValueError) as error:
            raise damaged(case.ref, error) from error
        body = body_mask(data, case.info.threshold, case.masked)
        start = np.zeros(3, dtype=np.int64)
        return _Region(data, body, box[:, 0], box[:, 1] - box[:, 0], start, self.read_size, (0, 0, 0))

    def _count(self, redrawn: int, air: int) -> None:
        if self.counters is not None and (redrawn or air):
            info = get_worker_info()
            row = self.counters[info.id if info is not None else 0]
            row += torch.tensor([redrawn, air])


def _probabilities(weights: Sequence[float] | np.ndarray | None, n: int) -> np.ndarray | None:
    if weights is None:
        return None
    values = np.asarray(weights, dtype=float)
    if values.shape != (n,) or not np.isfinite(values).all() or (values < 0).any() or values.sum() <= 0:
        raise NnsslError(f"Case weights must be {n} finite numbers of at least 0 that are not all 0.")
    return values / values.sum()


def _std(x: np.ndarray) -> float:
    """Standard deviation; twice as fast as NumPy's of a part of an array."""
    flat = np.ascontiguousarray(x).ravel()
    flat = flat - flat.mean()
    return float(np.sqrt(flat @ flat / flat.size))


def collate(samples: Sequence[Sample]) -> Crops:
    """Stack samples to a batch. Several sizes are laid into the largest: in its middle, trimmed ones at its start."""
    names = ("position", "axis_position", "intensity", "shape")
    sizes = np.asarray([s.data.shape[1:] for s in samples])
    size, dim = sizes.max(0), sizes.shape[1]
    lead = np.asarray([0 * (size - n) if s.trimmed else (size - n) // 2 for n, s in zip(sizes, samples)])
    make = np.empty if (sizes == size).all() else np.zeros
    data = make((len(samples), len(samples[0].data), *size), dtype=np.float32)
    body = make((len(samples), 1, *size), dtype=bool)
    for i, (sample, first, n) in enumerate(zip(samples, lead.tolist(), sizes.tolist())):
        at = (slice(None), *[slice(f, f + k) for f, k in zip(first, n)])
        data[i][at], body[i][at] = sample.data, sample.body
    lead = np.pad(lead, ((0, 0), (3 - dim, 0)))
    tensors = {n: torch.from_numpy(np.stack([getattr(s, n) for s in samples])) for n in names}
    moves = [s.affine for s in samples if s.affine is not None]
    if moves:
        tensors["affine"] = torch.from_numpy(np.stack(moves))
    if samples[0].trimmed:
        tensors["extent"] = torch.from_numpy(np.pad(sizes, ((0, 0), (3 - dim, 0)), constant_values=1).astype(np.int64))
    return Crops(
        data=torch.from_numpy(data),
        body=torch.from_numpy(body),
        start=torch.from_numpy(np.stack([s.start for s in samples]) - lead),
        **tensors,
        case=[s.case for s in samples],
        source=[s.source for s in samples],
    )
