"""The data set of crops: (step, sample) -> one crop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset, get_worker_info

from nnssl.errors import NnsslError
from nnssl.pretrain.augment.rng import HELD_OUT_STEP, StepRNG
from nnssl.pretrain.augment.spatial import reach
from nnssl.pretrain.data.case import CaseFormat, CaseReader, HeldCase, OpenCase, damaged
from nnssl.pretrain.data.case_set import CaseRef
from nnssl.pretrain.data.intensity import body_mask
from nnssl.pretrain.data.reorientation import AxisTransform, Orientation
from nnssl.pretrain.data.resample import foreground_box, resample_box
from nnssl.pretrain.data.sampling import TRAIN, draw_cases, draw_start, generator
from nnssl.pretrain.types import CropRequest, Crops

__all__ = ["CropDataset", "Sample", "collate"]

TRIES = 20
"""Places that are tried before a crop of air is accepted."""

LEAST_BODY = 0.1
"""Least share of body voxels in a crop."""

LEAST_STD = 1e-6


@dataclass(frozen=True)
class Sample:
    """One crop; see :class:`nnssl.pretrain.methods.Crops` for the arrays, which have no batch axis here.

    Attributes:
        body_share: share of body voxels in the inner crop, or in the window where crops are cut out of it all.
        std: standard deviation of the same.
        affine: ``(dim, dim + 1)``, the transform that the window was read for, of which it is the middle; or None.
        trimmed: whether ``data`` is the window's first part and not its middle.
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
    """The cases of a data set in three arrays: forked workers share their memory, and a case costs some 40 bytes.

    Args:
        refs: the cases.
    """

    def __init__(self, refs: Sequence[CaseRef]) -> None:
        names = [r.name.encode("utf-8", "surrogateescape") for r in refs]
        places = {(r.folder, r.source): None for r in refs}
        self.places = list(places)
        index = {place: i for i, place in enumerate(self.places)}
        self._place = np.asarray([index[r.folder, r.source] for r in refs], dtype=np.int32)
        self._end = np.cumsum([len(n) for n in names], dtype=np.int64)
        self._text = np.frombuffer(b"".join(names), dtype=np.uint8)

    def __len__(self) -> int:
        return len(self._place)

    def __getitem__(self, i: int) -> CaseRef:
        begin = int(self._end[i - 1]) if i else 0
        name = self._text[begin : int(self._end[i])].tobytes().decode("utf-8", "surrogateescape")
        folder, source = self.places[int(self._place[i])]
        return CaseRef(name, folder, source)


class CropDataset(Dataset[Sample]):
    """Crops by ``(step, sample)``: a pure function of these and the seed. It holds no images, and pickles.

    Args:
        refs: cases to draw from.
        form: what the plan says of them.
        request: crop and read size, with two axes for 2d plans, whose crops are single slices.
        seed: of the run.
        batch_size: samples per step over all ranks.
        stream: ``sampling.TRAIN`` or ``sampling.HELD_OUT``.
        weights: how often each case is drawn, relative to the others; evenly where None.
        counters: ``(n, 2)`` int64 tensor in shared memory that counts rejected places and accepted crops of air, one row per
            worker.
        bodies: see :class:`~nnssl.pretrain.data.case.CaseReader`.
        orientation: what cases are reoriented to; they stay as they are where None.

    Raises:
        NnsslError: no cases, or weights that do not fit them.
    """

    def __init__(
        self,
        refs: Sequence[CaseRef],
        form: CaseFormat,
        request: CropRequest,
        *,
        seed: int,
        batch_size: int,
        stream: int = TRAIN,
        weights: Sequence[float] | np.ndarray | None = None,
        counters: torch.Tensor | None = None,
        bodies: Mapping[str, Path] | None = None,
        orientation: Orientation | None = None,
    ) -> None:
        if not refs:
            raise NnsslError("There are no cases to draw crops from.")
        if len(request.read_size) != len(request.size) or any(w < s for w, s in zip(request.read_size, request.size)):
            raise ValueError(
                f"read_size {request.read_size} must be at least as large as size {request.size} on each axis"
            )
        self.table = CaseTable(refs)
        self.flat = len(request.size) == 2
        self.size = (1, *request.size) if self.flat else tuple(request.size)
        self.read_size = (1, *request.read_size) if self.flat else tuple(request.read_size)
        self.inner = self.size if request.sampling == "jitter" else self.read_size
        self.resampled, self.orientation = request.sampling == "whole", orientation
        self.crops_per_case = max(1, request.crops_per_case)
        self.seed, self.batch_size, self.stream = seed, batch_size, stream
        self.weights = _probabilities(weights, len(refs))
        self.counters = counters
        self.move, self.trim = request.move, request.trim
        if (self.move is not None or self.trim) and request.sampling != "jitter":
            raise ValueError(f"windows with sampling={request.sampling} are read whole")
        self._reader = CaseReader(form, bodies=bodies)
        self._step: tuple[int, np.ndarray] | None = None
        self._moves: tuple[int, np.ndarray, np.ndarray] | None = None
        self._held: tuple[tuple[int, int], OpenCase] | None = None

    def case_of(self, step: int, sample: int) -> CaseRef:
        """The case that a sample shows."""
        if self._step is None or self._step[0] != step:
            count = -(-self.batch_size // self.crops_per_case)
            cases = draw_cases(self.seed, step, self.stream, len(self.table), count, self.weights)
            self._step = (step, cases)
        return self.table[int(self._step[1][sample // self.crops_per_case])]

    def _open(self, step: int, sample: int) -> OpenCase:
        """The case of a sample; where several crops of it are wanted it is read once, unless their windows are less than that."""
        if self.crops_per_case == 1 or self.resampled:
            return self._reader.open(self.case_of(step, sample))
        key = step, sample // self.crops_per_case
        if self._held is None or self._held[0] != key:
            case = self._reader.open(self.case_of(step, sample))
            windows = self.crops_per_case * np.prod(np.minimum(self.read_size, case.array.shape[1:]))
            self._held = key, HeldCase.of(case) if np.prod(case.array.shape[1:]) <= windows else case
        return self._held[1]

    def release(self) -> None:
        """Forget what is held for further crops of a case."""
        self._held = None

    def _move(self, step: int, sample: int) -> tuple[np.ndarray | None, tuple[int, ...]]:
        """The transform that the views of a sample begin with, and the window that it looks at."""
        if self.move is None:
            return None, self.read_size
        if self._moves is None or self._moves[0] != step:
            there = step if self.stream == TRAIN else HELD_OUT_STEP + step
            affine = self.move.draw(StepRNG(self.seed, there, self.batch_size))
            windows = reach(affine, self.move.size, self.read_size[-len(self.move.size) :])
            self._moves = step, affine.rows.numpy(), windows.numpy()
        window = tuple(self._moves[2][sample].tolist())
        return self._moves[1][sample], (1, *window) if self.flat else window

    def __getitem__(self, item: tuple[int, int]) -> Sample:
        """Draw a crop.

        Up to :data:`TRIES` places are drawn until one shows body in a tenth of the inner crop and any contrast; else the one
        with most body is taken. Voxels that are not finite are never passed on.

        Raises:
            NnsslError: the case's files are missing or damaged, or each place has NaN or infinite voxels.
        """
        step, sample = item
        case = self._open(step, sample)
        affine, window = self._move(step, sample)
        rng = generator(self.seed, step, self.stream, sample)
        best: Sample | None = None
        for redrawn in range(1 if self.resampled and not self.flat else TRIES):
            found = self._crop(case, rng, affine, window)
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
        self, case: OpenCase, rng: np.random.Generator, affine: np.ndarray | None, window: Sequence[int]
    ) -> Sample | None:
        """One place, and the middle ``window`` of what is there; None where voxels are not finite."""
        geometry = case.info.geometry
        transform = AxisTransform() if self.orientation is None else self.orientation.transform(geometry)
        extent: Sequence[int] | np.ndarray
        if self.resampled:
            data, at, extent = self._whole(case, transform, rng)
            body = body_mask(data, case.info.threshold, case.masked)
            first = [0] * 3
            start, shape = np.zeros(3, dtype=np.int64), tuple(self.read_size)
        else:
            shape = tuple(transform.shape(geometry.shape))
            begin = draw_start(rng, shape, self.read_size, self.inner)
            start = begin + [(n - w) // 2 for n, w in zip(self.read_size, window)]
            at, extent = transform.box(start, window, geometry.shape)
            if self.trim:
                start, window = self._trimmed(start, window, shape)
            # where the inner crop begins in what is read; of a trimmed window it may lack a plane of padding
            first = [int(b) + (w - s) // 2 - int(f) for b, w, s, f in zip(begin, self.read_size, self.inner, start)]
            data, body = case.read(*transform.box(start, window, geometry.shape))
        if not np.isfinite(data.sum()) and not np.isfinite(data).all():  # a float32 sum may overflow
            return None
        data, body = transform(data), transform(body)
        inner = (slice(None), *[slice(max(f, 0), f + s) for f, s in zip(first, self.inner)])
        share = np.count_nonzero(body[inner]) / int(np.prod(self.inner))
        along = geometry.axis_position(at, extent)
        return Sample(
            data=data[:, 0] if self.flat else data,
            body=body[:, 0] if self.flat else body,
            position=geometry.position(along),
            axis_position=transform.position(along),
            intensity=case.info.intensity,
            start=start,
            shape=np.asarray(shape, dtype=np.int64),
            case=case.ref.name,
            source=case.ref.source,
            body_share=share,
            std=_std(data[inner]),
            affine=affine,
            trimmed=self.trim,
        )

    def _trimmed(
        self, start: np.ndarray, window: Sequence[int], shape: Sequence[int]
    ) -> tuple[np.ndarray, tuple[int, ...]]:
        """The part of a window that lies in the image, on axes on which that has room for the crop."""
        low, high = np.maximum(start, 0), np.minimum(start + window, shape)
        roomy = high - low >= self.size
        size = np.where(roomy, high - low, window)
        return np.where(roomy, low, start), tuple(size.tolist())

    def _whole(
        self, case: OpenCase, transform: AxisTransform, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The foreground resampled to the window, its first voxel and extent; for 2d plans one of its slices."""
        try:
            box = np.asarray(foreground_box(case.array, case.info.threshold, case.masked), dtype=np.int64)
            if self.flat:
                axis = transform.axes[0]
                low = int(rng.integers(*box[axis]))
                box[axis] = low, low + 1
            data = resample_box(case.array, box.tolist(), transform.array_order(self.read_size))
        except (RuntimeError, OSError, ValueError) as error:
            raise damaged(case.ref, error) from error
        return data, box[:, 0], box[:, 1] - box[:, 0]

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
    """Stack samples to a batch. Windows of several sizes are laid into the largest: in its middle, trimmed ones at its start."""
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
