"""The fixed crops that robustness is measured on: one per case, read once from nnU-Net's preprocessed files, without labels."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nnssl.errors import NnsslError
from nnssl.files import hash_of
from nnssl.plans import Plan
from nnssl.preprocessed import IMAGE, open_array, read_box

MOST_VOXELS = 2**20
_CANDIDATES = 4


@dataclass(frozen=True)
class CropSet:
    """Held-out crops, in memory.

    Attributes:
        data: ``(N, C, *size)`` float32, normalised as nnU-Net does, 0 outside the image.
        intensity: ``(N, C, 2)`` low and high percentile (0.5, 99.5) of each case, estimated from a few crops of it.
        case: names, length N, one crop each.
    """

    data: Tensor
    intensity: Tensor
    case: list[str]

    def __len__(self) -> int:
        return len(self.data)


def crop_size(plan: Plan, median_shape: Sequence[int] | None = None) -> tuple[int, ...]:
    """The largest crop that the network takes and that lies within both the patch and the median case.

    At least one bottleneck voxel per axis, more than one in all (InstanceNorm refuses a single one), and at most a million voxels
    where the strides allow it.

    Args:
        plan: whose network is measured.
        median_shape: median case shape in voxels, three axes; the plan's own by default.
    """
    if plan.is_primus:
        return plan.patch_size  # its positions are those of the patch
    median = tuple(median_shape or plan.median_shape)[-plan.dim :]
    stride = plan.total_stride
    cells = [max(1, min(p, m) // s) for p, m, s in zip(plan.patch_size, median, stride)]
    while math.prod(c * s for c, s in zip(cells, stride)) > MOST_VOXELS and max(cells) > 2:
        axis = max(range(len(cells)), key=lambda a: (cells[a], cells[a] * stride[a]))
        cells[axis] -= 1
    if math.prod(cells) == 1:
        axis = max(range(len(cells)), key=lambda a: plan.patch_size[a] / stride[a])
        cells[axis] = 2
    return tuple(c * s for c, s in zip(cells, stride))


def choose_cases(names: Iterable[str], n: int, seed: int = 0) -> list[str]:
    """An even number of at most ``n`` cases, chosen by a hash of seed and name: the same however many others there are."""

    def key(name: str) -> str:
        return hash_of(f"{seed}/{name}")

    chosen = sorted(names, key=key)[:n]
    return sorted(chosen[: len(chosen) - len(chosen) % 2])


def read_crops(cases: Sequence[tuple[Path, str]], plan: Plan, size: Sequence[int], *, seed: int = 0) -> CropSet:
    """Read one crop per case at a position fixed by the seed.

    Of four random positions the one with the largest share of tissue is taken (voxels above a tenth of the case's range), so
    that no crop is air. 2d plans get a slice.

    Args:
        cases: folder and name of each.
        plan: for axes and channels.
        size: voxels per axis, as many as the plan's patch.
        seed: of the positions.

    Raises:
        NnsslError: a file is missing, damaged, not finite, or has another number of channels than the plan.
    """
    crops, ranges = [], []
    for folder, name in cases:
        path = Path(folder) / f"{name}{IMAGE}"
        try:
            crop, bounds = _read(path, plan, tuple(size), seed, name)
        except (OSError, ValueError) as error:
            raise NnsslError(f"{path} cannot be read for the robustness trace: {error}") from error
        crops.append(crop)
        ranges.append(bounds)
    if not crops:
        raise NnsslError("there is no case to measure robustness on.")
    data, intensity = (torch.from_numpy(np.stack(x).astype(np.float32)) for x in (crops, ranges))
    return CropSet(data, intensity, [name for _, name in cases])


def _read(path: Path, plan: Plan, size: tuple[int, ...], seed: int, name: str) -> tuple[np.ndarray, np.ndarray]:
    array = open_array(path)
    if array.shape[0] != plan.n_channels:
        raise NnsslError(f"{path} has {array.shape[0]} channels, the plan of {plan.dataset_name} {plan.n_channels}.")
    digest = int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()[:8], "little")
    rng = np.random.default_rng(np.random.SeedSequence([seed, digest]))
    window = (1,) * (3 - len(size)) + size
    candidates = []
    for _ in range(_CANDIDATES):
        start = [_start(n, w, rng) for n, w in zip(array.shape[1:], window)]
        candidates.append(read_box(array, start, window))
    if not all(np.isfinite(c).all() for c in candidates):
        raise NnsslError(f"{path} holds NaN or infinite values.")
    stack = np.stack(candidates)  # (4, C, *window)
    flat = stack.transpose(1, 0, 2, 3, 4).reshape(stack.shape[1], -1)
    bounds = np.percentile(flat, (0.5, 99.5), axis=1).T  # (C, 2)
    threshold = bounds[0, 0] + 0.1 * (bounds[0, 1] - bounds[0, 0])
    tissue = (stack[:, 0] > threshold).reshape(_CANDIDATES, -1).mean(axis=1)
    return stack[int(tissue.argmax())].reshape(stack.shape[1], *size), bounds


def _start(length: int, window: int, rng: np.random.Generator) -> int:
    """First voxel along one axis: anywhere inside the image, or centred on one that is smaller than the window."""
    drawn = rng.random()
    room = length - window
    return math.floor(room / 2) if room <= 0 else min(room, int(drawn * (room + 1)))
