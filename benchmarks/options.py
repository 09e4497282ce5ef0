"""What the engine's options cost and save: accumulation, checkpointing, memory format, optimiser kernels.

    python benchmarks/options.py

One objective (mae, AdamW) on one core. ``kept_MiB`` is what a forward pass keeps for its backward pass (the memory that a batch
needs), counted exactly; ``optimiser_ms`` is the optimiser's step alone.
"""

from __future__ import annotations

from typing import Any

import torch
from common import arguments, cpu_seconds, make_dataset, report, workspace


def one(plan: Any, what: str, options: dict[str, Any], total: int) -> dict[str, Any]:
    """A row of the table."""
    from nnssl.config import make_config
    from nnssl.networks import build_network
    from nnssl.pretrain.engine.config import EngineConfig
    from nnssl.pretrain.engine.estimate import random_crops
    from nnssl.pretrain.engine.speed import apply_options
    from nnssl.pretrain.engine.stepping import Stepper, views_in_parts
    from nnssl.pretrain.methods import SourceStats, get_method

    cls = get_method("mae")
    config = make_config(cls.Config, {"optimiser": "adamw", "augment_p": 0.0, "masking": "dense"})
    request = cls.crops(plan, SourceStats(plan.patch_size, 8), config)
    torch.manual_seed(0)
    method = cls(build_network(plan), plan, request, config)
    engine = make_config(EngineConfig, options)
    apply_options(method, engine)
    parts, device = engine.accumulate or 1, torch.device("cpu")
    stepper = Stepper(method, method, device, 100, 12.0, False, engine.optimiser_kernels)

    class Spec:
        batch_size = total

    Spec.request, Spec.plan = request, plan
    crops = random_crops(Spec)
    draw = {"seed": 0, "step": 0, "total": total, "first": 0}

    def step() -> None:
        batches = views_in_parts(method, crops, parts, device, **draw)
        stepper.step(batches if parts > 1 else next(batches), 0, crops.case, False, parts)

    step()
    kept: dict[int, int] = {}

    def count(t: torch.Tensor) -> torch.Tensor:
        if not isinstance(t, torch.nn.Parameter):
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    batch = next(views_in_parts(method, crops, parts, device, **draw))
    with torch.autograd.graph.saved_tensors_hooks(count, lambda t: t):
        total_loss = method(batch)["total"]
    held = sum(kept.values()) / 2**20
    total_loss.backward()
    seconds, update = cpu_seconds(step, 2), cpu_seconds(stepper.optimiser.step, 3)
    return {"options": what, "step_s": seconds, "optimiser_ms": 1e3 * update, "kept_MiB": held}


def main() -> None:
    """Print the table."""
    args = arguments(__doc__, batch=(4, "crops per step"))
    torch.set_num_threads(1)
    big = {"shape": (32, 32, 32), "patch": (32, 32, 32), "features": (16, 32, 64, 128)}
    small = {"shape": (16, 16, 16), "patch": (16, 16, 16), "features": (4, 8)}
    variants: dict[str, dict[str, Any]] = {
        "none": {},
        "accumulate=2": {"accumulate": 2},
        "accumulate=4": {"accumulate": 4},
        "checkpointing=true": {"checkpointing": True},
        "channels_last=true": {"channels_last": True},
        "optimiser_kernels=foreach": {"optimiser_kernels": "foreach"},
        "optimiser_kernels=fused": {"optimiser_kernels": "fused"},
    }
    with workspace():
        plan = make_dataset(1, **(small if args.quick else big))
        rows = [one(plan, what, options, args.batch) for what, options in variants.items()]
    report("options of the engine", rows, args.out)


if __name__ == "__main__":
    main()
