"""Voxels per second and core from disk to augmented views, beside nnU-Net's stock augmentation on the same crops.

    python benchmarks/loader.py

For each objective with its default options: read the windows, make the views on one core. nnU-Net: its own loader and its own
training transforms (spatial, noise, blur, brightness, contrast, low resolution, gamma, mirror), one process, the same crop size
and the same cases. Counted are the voxels of all image tensors that come out. The number to hold is a ratio of 3.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from common import arguments, cpu_seconds, make_dataset, report, request_of, workspace


def stock(plan: Any, size: tuple[int, ...], batches: int) -> tuple[float, int]:
    """CPU seconds and voxels of nnU-Net's loader with its training transforms."""
    from batchgenerators.utilities.file_and_folder_operations import join
    from nnunetv2.paths import nnUNet_preprocessed  # noqa: F401
    from nnunetv2.training.data_augmentation.compute_initial_patch_size import get_patch_size
    from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
    from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    from nnssl.paths import preprocessed_folder

    turn = (-30.0 / 360 * 2 * np.pi, 30.0 / 360 * 2 * np.pi)
    transforms = nnUNetTrainer.get_training_transforms(size, turn, None, (0, 1, 2), False)
    folder = join(str(preprocessed_folder()), plan.dataset_name, plan.data_identifier)
    data = infer_dataset_class(folder)(folder)
    window = get_patch_size(size, turn, turn, turn, (0.85, 1.25))
    labels = plan.manager.get_label_manager(plan.dataset_json)
    loader = nnUNetDataLoader(data, 2, window, size, labels, 0.33, None, transforms=transforms)
    next(loader)
    seconds = cpu_seconds(lambda: [next(loader) for _ in range(batches)], 1)
    return seconds, 2 * batches * int(np.prod(size))


def images_of(batch: Any, channels: int) -> int:
    """Voxels of the different image tensors of a batch."""
    from nnssl.pretrain.engine.speed import tensors_of

    found = {
        t.data_ptr(): t.numel()
        for t in tensors_of(batch)
        if t.dtype == torch.float32 and t.ndim == 5 and t.shape[1] == channels
    }
    return sum(found.values())


def ours(plan: Any, name: str, size: tuple[int, ...], batches: int) -> dict[str, float] | None:
    """CPU seconds of looking at cases for the first time, of reading alone and of reading and views, and how much that was.

    A loader process remembers what it learnt of 2,048 cases, so that a run on more looks at nearly each for the first time.
    None where the plan does not fit.
    """
    from nnssl.config import make_config
    from nnssl.pretrain.augment import Draws
    from nnssl.pretrain.data import make_loader
    from nnssl.pretrain.methods import get_method
    from nnssl.pretrain.prepare import prepare_sources

    cls = get_method(name)
    config = make_config(cls.Config, {})
    pool = prepare_sources(plan, [plan.dataset_name], held_out=0.0)
    request = request_of(cls, plan, pool.stats(), config, size)
    if request is None:
        return None
    from nnssl.networks import build_network

    method = cls(build_network(plan), plan, request, config)
    total = max(request.min_batch, 2 * request.crops_per_case)
    voxels = 0

    loader: Any = None

    def read(views: bool, fresh: bool = False) -> None:
        nonlocal voxels, loader
        voxels = 0
        if fresh or loader is None:
            steps = max(1, 2 * batches // total)
            loader = make_loader(pool, plan, request, seed=0, batch_size=total, steps=steps)
        for step, crops in enumerate(loader):
            if views:
                with torch.no_grad():
                    batch = method.views(crops, Draws(0, step, total))
                voxels += images_of(batch, plan.n_channels)

    read(True)
    first = cpu_seconds(lambda: read(False, fresh=True), 2)
    alone, both = cpu_seconds(lambda: read(False), 2), cpu_seconds(lambda: read(True), 2)
    return {"first": first - alone, "read": alone, "both": both, "voxels": voxels, "crops": len(loader) * total}


def main() -> None:
    """Print the table."""
    args = arguments(__doc__, batches=(12, "batches of two crops"), cases=(24, "different volumes"))
    torch.set_num_threads(1)
    from nnssl.pretrain.methods import list_methods

    size, shape, batches, cases = (64, 64, 64), (130, 150, 130), args.batches, args.cases
    if args.quick:
        size, shape, batches, cases = (24, 24, 24), (64, 72, 64), min(4, batches), 4
    rows = []
    with workspace():
        plan = make_dataset(cases, shape=shape, patch=size, features=(8, 16, 32, 64), different=cases)
        seconds, voxels = stock(plan, size, 10 * batches)  # its transforms are drawn: a few crops say little
        base = voxels / seconds
        crops = voxels / np.prod(size)
        rows.append({"what": "nnU-Net's stock augmentation", "Mvoxel_per_core_s": base / 1e6})
        rows[0] |= {"crops_per_core_s": crops / seconds, "ratio": 1.0}
        for name in list_methods():
            found = ours(plan, name, size, batches)
            if found is None:
                continue
            rate = found["voxels"] / found["both"]
            row = {
                "what": name,
                "Mvoxel_per_core_s": rate / 1e6,
                "crops_per_core_s": rate / np.prod(size),
                "ratio": rate / base,
            }
            many = found["voxels"] / (found["both"] + max(0.0, found["first"]))
            row |= {"ratio_new_cases": many / base, "share_reading": found["read"] / found["both"]}
            rows.append(row | {"first_look_ms": 1e3 * found["first"] / found["crops"]})
    report("loader: disk to augmented views", rows, args.out)


if __name__ == "__main__":
    main()
