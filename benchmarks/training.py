"""What the parts of gpu.py share: a device with its clock, and an objective on random crops."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from common import make_dataset, request_of, workspace


@dataclass
class Bench:
    """What a part needs: device, sizes, the time that is left; of the recipe its experiment, folder, and the user's folders."""

    device: torch.device
    tiny: bool
    minutes: float
    experiment: Path | None = None
    folder: Path = Path("gpu.recipe")
    users: dict[str, str] = field(default_factory=dict)
    begin: float = field(default_factory=time.perf_counter)
    longest: float = 0.0
    left_out: list[str] = field(default_factory=list)

    @property
    def size(self) -> dict[str, Any]:
        """Patch and network of the parts that do not choose their own."""
        if self.tiny:
            return {"patch": (16, 16, 16), "shape": (24, 24, 24), "features": (4, 8, 8)}
        return {"patch": (96, 96, 96), "shape": (130, 150, 130), "features": (32, 64, 128, 256, 320)}

    @property
    def steps(self) -> int:
        """Steps of a timing."""
        return 2 if self.tiny else 20

    def rows(self, what: list[str], one: Callable[[str], dict[str, Any]]) -> list[dict[str, Any]]:
        """A row for each, as long as the time allows; out of memory is a row too."""
        found = []
        for name in what:
            begin = time.perf_counter()
            if begin - self.begin + 1.5 * self.longest > 60 * self.minutes:
                self.left_out.append(name)
                continue
            try:
                row = one(name)
            except torch.cuda.OutOfMemoryError:
                row = {"note": "out of memory"}
            found.append({"what": name, **row})
            sys.stderr.write(f"  {name}: {time.perf_counter() - begin:.0f} s\n")
            self.longest = max(self.longest, time.perf_counter() - begin)
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        return found

    def seconds(self, body: Callable[[], Any], repeats: int | None = None) -> float:
        """Median wall-clock seconds of a call, the device's work included; the first call does not count."""
        times = []
        for _ in range(1 + (repeats or self.steps)):
            self.wait()
            begin = time.perf_counter()
            body()
            self.wait()
            times.append(time.perf_counter() - begin)
        return sorted(times[1:])[len(times[1:]) // 2]

    def wait(self) -> None:
        """For the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def peak(self) -> float | None:
        """GiB that tensors took at most since the last call; None on a CPU."""
        if self.device.type != "cuda":
            return None
        most = torch.cuda.max_memory_allocated(self.device) / 2**30
        torch.cuda.reset_peak_memory_stats(self.device)
        return most


class Training:
    """An objective on random crops, as the engine trains it."""

    def __init__(
        self, bench: Bench, name: str, dtype: torch.dtype | None = torch.bfloat16, batch: int = 2, **sizes: Any
    ) -> None:
        from nnssl.config import make_config
        from nnssl.networks import build_network
        from nnssl.pretrain.engine.estimate import random_crops
        from nnssl.pretrain.engine.stepping import Stepper
        from nnssl.pretrain.methods import SourceStats, get_method

        sizes = sizes or bench.size
        with workspace():
            plan = make_dataset(1, **{**sizes, "shape": sizes["patch"]}, preprocessed=False)
        cls = get_method(name)
        few = {"n_voxels": 16} if bench.tiny and hasattr(cls.Config, "n_voxels") else {}
        config = make_config(cls.Config, few)
        request = request_of(cls, plan, SourceStats(sizes.get("shape", sizes["patch"]), 100), config)
        if request is None:
            raise ValueError(f"{name}: no crop is legal on {sizes}")
        torch.manual_seed(0)
        self.method = cls(build_network(plan), plan, request, config).to(bench.device)
        self.module: Any = self.method
        self.device, self.total = bench.device, max(batch, request.min_batch)
        self.stepper = Stepper(self.method, self.module, bench.device, 10_000, 12.0, False)
        self.stepper.dtype = dtype
        if dtype is torch.float16 and bench.device.type == "cuda":
            self.stepper.scaler = torch.amp.GradScaler("cuda")
        spec: Any = SimpleNamespace(batch_size=self.total, request=request, plan=plan)
        self.host = random_crops(spec)
        self.crops = self.host.to(bench.device)
        self.at = 0

    def views(self, step: int = 0) -> Any:
        """The views of a step."""
        from nnssl.pretrain.engine.stepping import views_in_parts

        return next(views_in_parts(self.method, self.crops, 1, self.device, 0, step))

    def step(self) -> dict[str, float]:
        """A whole step."""
        from nnssl.pretrain.types import Progress

        numbers, stepped = self.stepper.step(self.views(self.at), self.at, self.crops.case, False)
        self.at += 1
        if stepped:
            self.method.after_step(Progress(self.at, 10_000, 0, 1))
        return numbers.read()

    def bare(self, batch: Any) -> None:
        """Forward and backward alone."""
        for p in self.method.parameters():
            p.grad = None
        with self.stepper.autocast():
            total = self.module(batch)["total"]
        total.backward()
