"""What ``--dry-run`` tells: time and memory of a few real steps on random images."""

from __future__ import annotations

import resource
import sys
import time
from typing import TYPE_CHECKING, Any

import torch

from nnssl.networks import build_network
from nnssl.pretrain.engine.speed import apply_options
from nnssl.pretrain.engine.stepping import Stepper, views_in_parts
from nnssl.pretrain.types import Crops
from nnssl.words import spoken

if TYPE_CHECKING:
    from nnssl.pretrain.engine.spec import RunSpec

TIMED_STEPS = 3


def random_crops(spec: RunSpec) -> Crops:
    """A batch of random images with random positions, as the loader would deliver it."""
    b, read_size, channels = spec.batch_size, spec.request.read_size, spec.plan.n_channels
    generator = torch.Generator().manual_seed(0)
    data = torch.randn(b, channels, *read_size, generator=generator)
    position = torch.rand(b, 3, generator=generator, dtype=torch.float64)
    return Crops(
        data=data,
        body=torch.ones(b, 1, *read_size, dtype=torch.bool),
        position=position,
        axis_position=position.flip(1),
        intensity=torch.tensor([-2.5, 2.5]).repeat(b, channels, 1),
        start=torch.zeros(b, 3, dtype=torch.int64),
        case=[f"case{i}" for i in range(b)],
    )


def estimate(spec: RunSpec) -> str:
    """Run a few steps and tell what a run would take; data are loaded beside the steps and are no part of it."""
    torch.manual_seed(spec.seed)
    device = spec.device
    method = spec.method(build_network(spec.plan), spec.plan, spec.request, spec.config).to(device)
    apply_options(method, spec.engine)
    stepper, parts = Stepper.of(spec, method, method), spec.engine.accumulate or 1
    crops: Any = random_crops(spec)
    crops = (crops if spec.auxiliary is None else spec.auxiliary.random(crops)).to(device)
    seconds = []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    for step in range(TIMED_STEPS):
        begin = time.perf_counter()
        batches = views_in_parts(method, crops, parts, device, spec.seed, step)
        stepper.step(batches, step, crops.case, stop=False, parts=parts)[0].read()
        seconds.append(time.perf_counter() - begin)
    per_step = min(seconds[1:])
    trained = sum(p.numel() for p in method.parameters() if p.requires_grad)
    return (
        f"Estimate: {per_step:.2f} s/step, {spec.steps} steps in about {spoken(per_step * spec.steps)}; peak memory "
        f"{_peak(device)}; {trained / 1e6:.2g} million trained parameters. Nothing was written."
    )


def _peak(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB on the GPU"
    unit = 1 if sys.platform == "darwin" else 1024
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30:.1f} GiB"
