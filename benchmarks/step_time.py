"""Time of a whole training step over forward and backward of the same views alone, for each objective.

    python benchmarks/step_time.py

The whole step is what the engine does once the crops are read: views, forward, backward, clipping, optimiser, the method's
after_step (EMA and the like), numbers. The number to hold on a GPU is 1.10 with data and augmentation hidden; here all is on one
core, so that views count in full.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from common import arguments, cpu_seconds, make_dataset, report, request_of, workspace


def one(plan: Any, name: str, repeats: int, voxels: int) -> dict[str, Any] | None:
    """A row of the table; None where the plan does not fit."""
    from nnssl.config import make_config
    from nnssl.networks import build_network
    from nnssl.pretrain.augment import StepRNG
    from nnssl.pretrain.data import SampleStream, make_loader
    from nnssl.pretrain.engine.stepping import Stepper
    from nnssl.pretrain.methods import get_method
    from nnssl.pretrain.prepare import prepare_bodies, prepare_sources
    from nnssl.pretrain.types import Progress

    cls = get_method(name)
    few = {f.name: voxels for f in fields(cls.Config) if f.name == "n_voxels"}
    config = make_config(cls.Config, few)
    pool = prepare_sources(plan, [plan.dataset_name], held_out=0.0)
    request = request_of(cls, plan, pool.stats(), config)
    if request is None:
        return None
    if request.body:
        prepare_bodies(plan, pool, n_processes=1)
    torch.manual_seed(0)
    method = cls(build_network(plan), plan, request, config)
    device, total = torch.device("cpu"), max(request.min_batch, 2 * request.crops_per_case)
    stepper = Stepper(method, method, device, 100, 12.0, False)
    crops = next(iter(make_loader(pool, plan, request, SampleStream(0, total), range(1))))
    steps = iter(range(10_000))
    batch: Any = None

    def views() -> Any:
        nonlocal batch
        with torch.no_grad():
            batch = method.views(crops, StepRNG(0, next(steps), total))

    def bare() -> None:
        for p in method.parameters():
            p.grad = None
        method(batch)["total"].backward()

    def whole() -> None:
        step = next(steps)
        views()
        stepper.step(batch, step, crops.case, False)[0].read()
        method.after_step(Progress(step, 10_000, 0, 1))

    whole()
    a, b, c = cpu_seconds(views, repeats), cpu_seconds(bare, repeats), cpu_seconds(whole, repeats)
    row = {
        "method": name,
        "crop": "x".join(map(str, request.size)),
        "batch": total,
        "views_s": a,
        "forward_backward_s": b,
    }
    return row | {"step_s": c, "step_over_bare": c / b, "rest_over_bare": (c - a) / b}


def main() -> None:
    """Print the table."""
    args = arguments(
        __doc__,
        repeats=(3, "steps of which the fastest counts"),
        voxels=(
            512,
            "voxels per crop that hdense and vox2vec contrast; their default takes minutes a step on one core",
        ),
    )
    torch.set_num_threads(1)
    from nnssl.pretrain.methods import list_methods

    big = {"shape": (64, 80, 64), "patch": (32, 32, 32), "features": (16, 32, 64, 128)}
    small = {"shape": (48, 56, 48), "patch": (24, 24, 24), "features": (4, 8, 16)}
    with workspace():
        plan = make_dataset(8, **(small if args.quick else big))
        rows = [
            one(plan, name, 2 if args.quick else args.repeats, 64 if args.quick else args.voxels)
            for name in list_methods()
        ]
    rows = [row for row in rows if row is not None]
    report("step time over bare forward and backward", rows, args.out)


if __name__ == "__main__":
    main()
