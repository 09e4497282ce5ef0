"""CPU seconds per million voxels from disk to augmented views, beside nnU-Net's stock augmentation on crops of the same size.

    python benchmarks/loader.py

For each objective with its default options: read the windows, make the views on one core. nnU-Net: its own loader and its own
training transforms (spatial, noise, blur, brightness, contrast, low resolution, gamma, mirror), one process, the same crop size
and the same images. Both are measured in turn, a few crops each, in processes of their own (ours keeps freed memory, as a run on
a CPU does), over volumes that all differ: links to one volume would stay in the processor's caches. Counted are the voxels of all
image tensors that come out. The number to hold is a ratio of 3.

``--folder own`` (default) reads the source as pretraining for another dataset does, from a folder that was preprocessed here;
``--folder nnunet`` reads nnU-Net's own, as pretraining on the target's images does.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from common import as_source, make_dataset, parser, ratios, report, request_of, workspace


class Stock:
    """nnU-Net's loader with its training transforms, in this process."""

    def __init__(self, plan: Any, size: tuple[int, ...]) -> None:
        from batchgenerators.utilities.file_and_folder_operations import join
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
        self.size = size
        self.loader = nnUNetDataLoader(data, 2, window, size, labels, 0.33, None, transforms=transforms)
        next(self.loader)

    def cost(self, crops: int) -> float:
        """CPU seconds per million voxels, over ``crops`` crops."""
        steps = -(-crops // 2)
        begin = time.process_time()
        for _ in range(steps):
            next(self.loader)
        return (time.process_time() - begin) / (2 * steps * np.prod(self.size)) * 1e6


def images_of(batch: Any, channels: int) -> int:
    """Voxels of the different image tensors of a batch."""
    from nnssl.pretrain.engine.speed import tensors_of

    found = {
        t.data_ptr(): t.numel()
        for t in tensors_of(batch)
        if t.dtype == torch.float32 and t.ndim == 5 and t.shape[1] == channels
    }
    return sum(found.values())


class Ours:
    """An objective's loader and views, in this process.

    Raises:
        ValueError: the plan does not fit the objective.
    """

    def __init__(self, plan: Any, source: str, name: str, size: tuple[int, ...], **options: Any) -> None:
        from nnssl.config import make_config
        from nnssl.networks import build_network
        from nnssl.pretrain.data import SampleStream, make_loader
        from nnssl.pretrain.methods import get_method
        from nnssl.pretrain.prepare import prepare_sources

        cls = get_method(name)
        config = make_config(cls.Config, options)
        self.plan, self.case_set = plan, prepare_sources(plan, [source], held_out=0.0, n_processes=1)
        request = request_of(cls, plan, self.case_set.stats(), config, size)
        if request is None:
            raise ValueError(f"{name}: no crop is legal here")
        self.method = cls(build_network(plan), plan, request, config)
        self.total = max(request.min_batch, 2 * request.crops_per_case)
        self.loader = make_loader(self.case_set, plan, request, SampleStream(0, self.total), range(100_000))
        self.stream, self.step = iter(self.loader), 0
        self.cost(self.total)

    def cost(self, crops: int, views: bool = True) -> float:
        """CPU seconds per million voxels that come out, over at least ``crops`` crops; else seconds of reading."""
        from nnssl.pretrain.augment import StepRNG

        begin, voxels = time.process_time(), 0
        for _ in range(-(-crops // self.total)):
            found = next(self.stream)
            self.step += 1
            if views:
                with torch.no_grad():
                    batch = self.method.views(found, StepRNG(0, self.step, self.total))
                voxels += images_of(batch, self.plan.n_channels)
        return (time.process_time() - begin) / (voxels / 1e6 if views else 1.0)

    def share_of_reading(self, crops: int, rounds: int) -> float:
        """Of the time of reading and views, measured in turn."""
        times = [0.0, 0.0]
        for _ in range(rounds):
            begin = time.process_time()
            self.cost(crops)
            times[0] += time.process_time() - begin
            times[1] += self.cost(crops, views=False)
        return times[1] / times[0]

    def first_look(self) -> float:
        """CPU seconds of opening a case for the first time, more than of opening it again.

        A loader process remembers what it learnt of 2,048 cases, so that a run on more looks at nearly each for the first time.
        """
        from nnssl.pretrain.data.case import CaseFormat, CaseReader

        reader = CaseReader(CaseFormat.from_plan(self.plan))
        times = []
        for _ in range(2):
            begin = time.process_time()
            for ref in self.case_set.cases:
                reader.open(ref)
            times.append(time.process_time() - begin)
        return (times[0] - times[1]) / len(self.case_set.cases)


def rows_of(sides: dict[str, Any], names: list[str], edge: int, crops: int, rounds: int) -> list[dict[str, Any]]:
    """A row for each objective that is legal here, each measured in turn with nnU-Net."""
    from sides.process import Failed

    rows = []
    for name in names:
        asked: dict[str, Callable[[], float]] = {"nnU-Net": lambda: float(sides["nnunet"].ask("loader", edge, crops))}
        asked["ours"] = partial(sides["ours"].ask, "loader", edge, crops, name)
        try:
            about = sides["ours"].ask("about", edge, crops, name)
        except Failed as error:
            sys.stderr.write(f"{name}, {edge}^3: {error}\n")
            continue
        found = ratios(asked, rounds, "ours")
        row: dict[str, Any] = {"what": name, "crop": about["crop"], "s_per_Mvoxel": found["ours"]["cost"]}
        row |= {"nnU-Net": found["nnU-Net"]["cost"], **{k: found["nnU-Net"][k] for k in ("ratio", "low", "high")}}
        rows.append(row | {k: about[k] for k in ("share_reading", "first_look_ms")})
    return rows


def main() -> None:
    """Print the table."""
    p = parser(__doc__)
    p.add_argument("--crops", type=int, default=24, help="crops of each, in each round (24)")
    p.add_argument("--rounds", type=int, default=6, help="how often both are measured in turn (6)")
    p.add_argument("--cases", type=int, default=24, help="different volumes of 130 x 150 x 130 (24)")
    p.add_argument("--sizes", type=int, nargs="+", default=[64, 96], help="edges of the crops, voxels (64 96)")
    p.add_argument("--only", nargs="+", metavar="METHOD", help="some objectives (all)")
    p.add_argument("--folder", choices=("own", "nnunet"), default="own", help="which preprocessed folder is read (own)")
    args = p.parse_args()
    torch.set_num_threads(1)
    from sides.process import HERE, Process

    from nnssl.pretrain.methods import list_methods

    sizes, shape, crops, rounds, cases = args.sizes, (130, 150, 130), args.crops, args.rounds, args.cases
    if args.quick:
        sizes, shape, crops, rounds, cases = [24], (64, 72, 64), min(4, crops), 1, 4
    rows = []
    with workspace() as folder:
        plan = make_dataset(cases, shape=shape, patch=(max(sizes),) * 3, features=(8, 16, 32, 64), different=cases)
        source = plan.dataset_name if args.folder == "nnunet" else as_source(plan)
        settings = folder / "settings.json"
        settings.write_text(json.dumps({"id": 901, "source": source}))
        sides = {name: Process(name, sys.executable, [HERE.parent], settings) for name in ("ours", "nnunet")}
        try:
            for edge in sizes:
                rows += rows_of(sides, args.only or list(list_methods()), edge, crops, rounds)
        finally:
            for side in sides.values():
                side.close()
    report(f"loader: disk to augmented views, {cases} different volumes, {args.folder} folder", rows, args.out)


if __name__ == "__main__":
    main()
