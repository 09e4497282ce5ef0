"""What the engine's options cost and save: accumulation, checkpointing, memory format, precision, optimiser implementations.

    python benchmarks/options.py
    python benchmarks/options.py --features 8 16 32 64 --crop 64 --only bfloat16    # is nnssl_cpu_bf16=1 faster here?

One objective (mae, AdamW) on one core. ``ratio`` is to a step without options, measured in turn with it; ``kept_MiB`` is what a
forward pass keeps for its backward pass (the memory that a batch needs), counted exactly; ``optimiser_ms`` is the optimiser's
step alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from common import cpu_seconds, make_dataset, parser, ratios, report, workspace


def one(plan: Any, options: dict[str, Any], total: int) -> tuple[Callable[[], float], dict[str, Any]]:
    """What measures a step once, and the other columns of a row."""
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
    engine = make_config(EngineConfig, {k: v for k, v in options.items() if k != "dtype"})
    apply_options(method, engine)
    parts, device = engine.accumulate or 1, torch.device("cpu")
    stepper = Stepper(method, method, device, 100, 12.0, False, engine.optimizer_implementation)
    stepper.dtype = options.get("dtype")

    class Spec:
        batch_size = total

    Spec.request, Spec.plan = request, plan
    crops = random_crops(Spec)

    def step() -> None:
        stepper.step(views_in_parts(method, crops, parts, device, 0, 0), 0, crops.case, False, parts)

    step()
    kept: dict[int, int] = {}

    def count(t: torch.Tensor) -> torch.Tensor:
        if not isinstance(t, torch.nn.Parameter):
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    batch = next(views_in_parts(method, crops, parts, device, 0, 0))
    with torch.autograd.graph.saved_tensors_hooks(count, lambda t: t), stepper.autocast():
        total_loss = method(batch)["total"]
    held = sum(kept.values()) / 2**20
    total_loss.backward()
    update = cpu_seconds(stepper.optimiser.step, 3)
    return lambda: cpu_seconds(step, 1), {"optimiser_ms": 1e3 * update, "kept_MiB": held}


def main() -> None:
    """Print the table."""
    variants: dict[str, dict[str, Any]] = {
        "none": {"channels_last": False},
        "accumulate=2": {"accumulate": 2},
        "accumulate=4": {"accumulate": 4},
        "checkpointing=true": {"checkpointing": True},
        "channels_last=true": {"channels_last": True},
        "optimizer_implementation=foreach": {"optimizer_implementation": "foreach"},
        "optimizer_implementation=fused": {"optimizer_implementation": "fused"},
        "bfloat16": {"dtype": torch.bfloat16},
        "bfloat16 channels_last=true": {"dtype": torch.bfloat16, "channels_last": True},
    }
    p = parser(__doc__)
    p.add_argument("--batch", type=int, default=4, help="crops per step (4)")
    p.add_argument("--features", type=int, nargs="+", default=[16, 32, 64, 128], help="of the stages (16 32 64 128)")
    p.add_argument("--crop", type=int, default=32, help="edge of the crops, voxels (32)")
    p.add_argument("--rounds", type=int, default=3, help="how often a step of each is measured, in turn (3)")
    p.add_argument(
        "--only", nargs="+", choices=list(variants), default=list(variants), metavar="OPTIONS", help="some rows"
    )
    args = p.parse_args()
    torch.set_num_threads(1)
    big = {"shape": (args.crop,) * 3, "patch": (args.crop,) * 3, "features": tuple(args.features)}
    small = {"shape": (16, 16, 16), "patch": (16, 16, 16), "features": (4, 8)}
    rows = []
    with workspace():
        plan = make_dataset(1, **(small if args.quick else big))
        none, columns = one(plan, variants["none"], args.batch)
        for what in dict.fromkeys(["none", *args.only]):
            step, found = (
                (none, columns) if what == "none" else one(plan, {"channels_last": False} | variants[what], args.batch)
            )
            row = ratios({"none": none, "with": step}, 1 if args.quick else args.rounds, "none")["with"]
            ratio = {"ratio": row["ratio"], "low": row["low"], "high": row["high"]}
            rows.append({"options": what, "step_s": row["cost"], **ratio, **found})
    report("options of the engine", rows, args.out)


if __name__ == "__main__":
    main()
