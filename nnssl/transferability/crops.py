"""The fixed crops that robustness is measured on: one per case, read once from nnU-Net's preprocessed files, without labels."""

from __future__ import annotations

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
    """Held-out crops of N cases, one each, in memory."""

    data: Tensor  # (N, C, *size) float32, normalised as nnU-Net does, 0 outside the image
    intensity: Tensor  # (N, C, 2) percentiles 0.5 and 99.5 of each case, estimated from a few crops of it
    case: list[str]

    def __len__(self) -> int:
        return len(self.data)


def crop_size(plan: Plan) -> tuple[int, ...]:
    """The largest crop that the network takes and that lies within both the patch and the median case.

    At least one bottleneck voxel per axis, more than one in all (InstanceNorm refuses a single one), and at most a million voxels
    where the strides allow it.
    """
    if plan.is_primus:
        return plan.patch_size  # its positions are those of the patch
    stride = plan.total_stride
    cells = [max(1, min(p, m) // s) for p, m, s in zip(plan.patch_size, plan.median_shape[-plan.dim :], stride)]
    while math.prod(c * s for c, s in zip(cells, stride)) > MOST_VOXELS and max(cells) > 2:
        axis = max(range(len(cells)), key=lambda a: (cells[a], cells[a] * stride[a]))
        cells[axis] -= 1
    if math.prod(cells) == 1:
        axis = max(range(len(cells)), key=lambda a: plan.patch_size[a] / stride[a])
        cells[axis] = 2
    return tuple(c * s for c, s in zip(cells, stride))


def choose_cases(names: Iterable[str], n: int, seed: int = 0) -> list[str]:
    """An even number of at most ``n`` cases, chosen by a hash of seed and name: the same however many others there are."""
    chosen = sorted(names, key=lambda name: hash_of(f"{seed}/{name}"))[:n]
    return sorted(chosen[: len(chosen) // 2 * 2])


def read_crops(cases: Sequence[tuple[Path, str]], plan: Plan, size: Sequence[int], *, seed: int = 0) -> CropSet:
    """Read one crop of ``size`` voxels per case, given as folder and name, at a position fixed by the seed.

    Of four random positions the one with the largest share of tissue is taken (voxels above a tenth of the case's range), so
    that no crop is air. 2d plans get a slice.

    Raises:
        NnsslError: a file is missing, damaged, not finite, or has another number of channels than the plan.
    """
    if not cases:
        raise NnsslError("there is no case to measure robustness on.")
    crops, ranges = [], []
    for folder, name in cases:
        path = Path(folder) / f"{name}{IMAGE}"
        try:
            crop, bounds = _read(path, plan, tuple(size), seed, name)
        except (OSError, ValueError) as error:
            raise NnsslError(f"{path} cannot be read for the robustness trace: {error}") from error
        crops.append(crop)
        ranges.append(bounds)
    data, intensity = (torch.from_numpy(np.stack(x).astype(np.float32)) for x in (crops, ranges))
    return CropSet(data, intensity, [name for _, name in cases])


def _read(path: Path, plan: Plan, size: tuple[int, ...], seed: int, name: str) -> tuple[np.ndarray, np.ndarray]:
    array = open_array(path)
    if array.shape[0] != plan.n_channels:
        raise NnsslError(f"{path} has {array.shape[0]} channels, the plan of {plan.dataset_name} {plan.n_channels}.")
    digest = int.from_bytes(bytes.fromhex(hash_of(name))[:8], "little")
    rng = np.random.default_rng(np.random.SeedSequence([seed, digest]))
    window = (1,) * (3 - len(size)) + size
    starts = [[_start(n, w, rng) for n, w in zip(array.shape[1:], window)] for _ in range(_CANDIDATES)]
    stack = np.stack([read_box(array, start, window) for start in starts])  # (4, C, *window)
    if not np.isfinite(stack).all():
        raise NnsslError(f"{path} holds NaN or infinite values.")
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
