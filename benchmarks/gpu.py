"""What only a GPU can tell, in parts of a few minutes each; ``-device cpu --tiny`` shows that every part runs.

    python benchmarks/gpu.py --out gpu.json                       # all parts
    python benchmarks/gpu.py --out gpu.json --only steps plans    # some; what the file holds of others is kept

Each part ends by itself within ``--minutes`` (9): it stops before the next row that might not fit, and says which were left out.

precision   losses of the same steps in float32, bfloat16 and float16, and the seconds of a step
compile     graph breaks of each objective's forward (0 wanted), its loss compiled and not, and the seconds of a step
nccl        a process group of one process, a gather with gradients, and a step in DistributedDataParallel
steps       a whole step over forward and backward of the same views (1.10 wanted), and peak memory
waiting     a real run with loader processes: the share of the time that it waits for data (0 wanted)
transfers   copies of a batch to the GPU from pinned and from pageable memory
layout      a step with channels last and without
plans       seconds and memory of a step on networks and patches as large as nnU-Net plans them
recipe      few labels: labels only against the mean teacher from random weights and from a pretrained encoder, by
            ``nnssl_label_efficiency`` on a data set of yours (``--experiment``); a further call goes on with it
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import machine, make_dataset, parser, table, workspace
from recipe import FOLDERS, recipe
from training import Bench, Training

PLANS: dict[str, dict[str, Any]] = {
    "hippocampus (40x56x40)": {"patch": (40, 56, 40), "features": (32, 64, 128, 256), "batch": 8},
    "atrium (64x128x128)": {"patch": (64, 128, 128), "features": (32, 64, 128, 256, 320), "batch": 2},
    "ResEnc M (128x128x128)": {
        "patch": (128, 128, 128),
        "features": (32, 64, 128, 256, 320, 320),
        "batch": 2,
        "arch": "resenc",
    },
    "ResEnc L (160x192x160)": {
        "patch": (160, 192, 160),
        "features": (32, 64, 128, 256, 320, 320),
        "batch": 2,
        "arch": "resenc",
    },
}


def methods() -> list[str]:
    """All objectives."""
    from nnssl.pretrain.methods import list_methods

    return list(list_methods())


def precision(bench: Bench) -> list[dict[str, Any]]:
    """The same steps in three types."""
    dtypes = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if bench.device.type == "cpu":
        del dtypes["float16"]  # not without a scaler, which CPUs have no use for
    first: dict[str, list[float]] = {}

    def one(what: str) -> dict[str, Any]:
        name, kind = what.split(" ")
        training = Training(bench, name, dtypes[kind])
        losses = [training.step()["total"] for _ in range(3 if bench.tiny else 50)]
        first.setdefault(name, losses)
        late = len(losses) // 5 or 1
        means = [sum(x[-late:]) / late for x in (losses, first[name])]
        row = {"first_loss": losses[0], "last_loss": means[0], "last_over_float32": means[0] / means[1]}
        return row | {"step_s": bench.seconds(training.step), "peak_GiB": bench.peak()}

    names = ["mae"] if bench.tiny else ["mae", "macl", "voco"]
    return bench.rows([f"{name} {kind}" for name in names for kind in dtypes], one)


def compiled(bench: Bench) -> list[dict[str, Any]]:
    """Graph breaks, and a step of the compiled module; on a CPU without a compiler only the graphs."""
    import torch._dynamo

    backend = "eager" if bench.device.type == "cpu" else "inductor"

    def one(name: str) -> dict[str, Any]:
        torch._dynamo.reset()
        training = Training(bench, name, None)
        batch = training.views()
        plain = float(training.method(batch)["total"])
        found = torch._dynamo.explain(training.method.forward)(batch)
        reasons = [str(reason.reason).splitlines()[0][:80] for reason in found.break_reasons]
        row: dict[str, Any] = {"graph_breaks": found.graph_break_count, "why": "; ".join(dict.fromkeys(reasons))[:200]}
        torch._dynamo.reset()
        before = bench.seconds(lambda: training.bare(batch))
        training.module = torch.compile(training.method, backend=backend)
        begin = time.perf_counter()
        same = float(training.module(batch)["total"])
        row |= {"compile_s": time.perf_counter() - begin, "loss": plain, "loss_compiled": same}
        return row | {"bare_s": before, "bare_compiled_s": bench.seconds(lambda: training.bare(batch))}

    return bench.rows(["mae"] if bench.tiny else methods(), one)


def nccl(bench: Bench) -> list[dict[str, Any]]:
    """One process is enough to see that the backend starts and that a step goes through it."""
    import torch.distributed as dist

    from nnssl.distributed import gather_with_grad

    backend = "nccl" if bench.device.type == "cuda" else "gloo"
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29533")

    def one(name: str) -> dict[str, Any]:
        begin = time.perf_counter()
        dist.init_process_group(backend, rank=0, world_size=1)
        try:
            x = torch.ones(4, 3, device=bench.device, requires_grad=True)
            dist.all_reduce(x.detach().clone())
            gather_with_grad(x).sum().backward()
            bench.wait()
            started = time.perf_counter() - begin
            training = Training(bench, name)
            plain = bench.seconds(training.step)
            ids = [bench.device.index or 0] if bench.device.type == "cuda" else None
            training.stepper.module = torch.nn.parallel.DistributedDataParallel(training.method, device_ids=ids)
            ok = x.grad is not None and torch.equal(x.grad, torch.ones_like(x))
            row = {"backend": backend, "start_s": started, "gather_right": ok, "step_s": plain}
            return row | {"step_ddp_s": bench.seconds(training.step)}
        finally:
            dist.destroy_process_group()

    return bench.rows(["mae"], one)


def steps(bench: Bench) -> list[dict[str, Any]]:
    """The number to hold: step over bare at most 1.10."""

    def one(name: str) -> dict[str, Any]:
        training = Training(bench, name)
        batch = training.views()
        bench.peak()
        bare, whole = bench.seconds(lambda: training.bare(batch)), bench.seconds(training.step)
        row = {"batch": training.total, "bare_s": bare, "views_s": bench.seconds(training.views), "step_s": whole}
        return row | {"step_over_bare": whole / bare, "peak_GiB": bench.peak()}

    return bench.rows(["mae", "macl"] if bench.tiny else methods(), one)


def waiting(bench: Bench) -> list[dict[str, Any]]:
    """A run through the public interface."""
    from nnssl.pretrain import run

    def one(what: str) -> dict[str, Any]:
        workers = int(what.split(" ")[0])
        with workspace():
            make_dataset(5 if bench.tiny else 48, **bench.size, different=5 if bench.tiny else 24)
            options = {"workers": workers, "picture_every": 0, "held_out_batches": 1, "batch_size": 2}
            length = {"epochs": 2, "iterations": 2 if bench.tiny else 100}
            done = run(901, method="mae", device=bench.device.type, robustness_every=0, options=options, **length)
            lines = [json.loads(line) for line in (done.folder / "metrics.jsonl").read_text().splitlines()]
        last = [line for line in lines if line["event"] == "epoch"][-1]
        return {"step_s": last["step_s"], "share_waiting": last["data_wait"], "peak_GiB": bench.peak()}

    return bench.rows(["0 workers"] if bench.tiny else ["4 workers", "8 workers", "12 workers"], one)


def transfers(bench: Bench) -> list[dict[str, Any]]:
    """One batch of crops."""

    def one(what: str) -> dict[str, Any]:
        if what == "pinned" and bench.device.type != "cuda":
            return {"note": "no CUDA device: memory cannot be pinned for one"}
        host = Training(bench, "mae").host
        crops = host.pin_memory() if what == "pinned" else host
        seconds = bench.seconds(lambda: crops.to(bench.device))
        return {"MB": crops.data.nbytes / 1e6, "ms": 1e3 * seconds, "GB_per_s": crops.data.nbytes / 1e9 / seconds}

    return bench.rows(["pageable", "pinned"], one)


def layout(bench: Bench) -> list[dict[str, Any]]:
    """Both memory formats, by width of the network."""
    from nnssl.pretrain.engine.speed import use_channels_last

    widths = (4,) if bench.tiny else (8, 16, 32)

    def one(what: str) -> dict[str, Any]:
        first = int(what.split("-")[0])
        features = tuple(min(320, first * 2**i) for i in range(len(bench.size["features"])))
        row = {}
        for key, last in (("plain_s", False), ("channels_last_s", True)):
            training = Training(bench, "mae", **{**bench.size, "features": features})
            if last:
                use_channels_last(training.method)
            row[key] = bench.seconds(training.step)
        return row | {"ratio": row["channels_last_s"] / row["plain_s"]}

    return bench.rows([f"{w}-..." for w in widths], one)


def plans(bench: Bench) -> list[dict[str, Any]]:
    """mae and macl on large networks."""
    small = {"patch": (16, 16, 16), "features": (4, 8, 8), "batch": 2, "arch": "resenc"}

    def one(what: str) -> dict[str, Any]:
        name, kind = what.split(" on ")
        sizes = dict(small if bench.tiny else PLANS[kind])
        batch = sizes.pop("batch")
        bench.peak()
        training = Training(bench, name, batch=batch, **sizes)
        seconds = bench.seconds(training.step)
        crops = "x".join(map(str, training.method.request.size))
        return {"crops": f"{training.total} of {crops}", "step_s": seconds, "peak_GiB": bench.peak()}

    kinds = list(PLANS)[:1] if bench.tiny else list(PLANS)
    return bench.rows([f"{name} on {kind}" for kind in kinds for name in ("mae", "macl")], one)


PARTS: dict[str, Callable[[Bench], list[dict[str, Any]]]] = {
    "precision": precision,
    "compile": compiled,
    "nccl": nccl,
    "steps": steps,
    "waiting": waiting,
    "transfers": transfers,
    "layout": layout,
    "plans": plans,
    "recipe": recipe,
}


def run_parts(names: list[str], make: Callable[[], Bench]) -> Iterator[tuple[str, Any]]:
    """Each part's name and what came of it; one that fails does not keep the others from running."""
    for name in names:
        bench = make()
        sys.stderr.write(f"{name}\n")
        try:
            rows = PARTS[name](bench)
        except Exception as error:  # a borrowed GPU is not to be lost on the first part that fails
            yield name, {"error": f"{type(error).__name__}: {error}"[:2000]}
            continue
        yield name, {"rows": rows, "left_out": bench.left_out, "seconds": time.perf_counter() - bench.begin}


def main() -> int:
    """Run the parts; the JSON is written after each."""
    p = parser(__doc__)
    p.add_argument("--only", nargs="+", choices=sorted(PARTS), default=list(PARTS), metavar="PART", help="some parts")
    p.add_argument("-device", choices=("cuda", "cpu"), default="cuda", help="cuda (default) or cpu")
    p.add_argument("--tiny", action="store_true", help="sizes at which every part runs in seconds")
    p.add_argument("--minutes", type=float, default=9.0, help="most for each part (9)")
    p.add_argument("--experiment", type=Path, metavar="FILE", help="of the part recipe (examples/.../recipe_gpu.yaml)")
    args = p.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.stderr.write("There is no CUDA device: -device cpu --tiny shows that every part runs.\n")
        return 2
    kept: dict[str, Any] = {}
    if args.out is not None and args.out.exists():
        with suppress(ValueError):
            kept = json.loads(args.out.read_text()).get("parts", {})
    failed = False
    begun = {
        "experiment": args.experiment,
        "folder": args.out.with_suffix(".recipe") if args.out else Path("gpu.recipe"),
        "users": {name: os.environ.get(name, "") for name in FOLDERS},
    }
    make = partial(Bench, torch.device(args.device), args.tiny or args.quick, args.minutes, **begun)
    for name, found in run_parts(args.only, make):
        kept[name] = found
        failed |= "error" in found
        text = found.get("error") or table(found["rows"])
        sys.stdout.write(f"\n## {name}\n\n{text}\n")
        sys.stdout.flush()
        if args.out is not None:
            content = {"benchmark": "gpu", "machine": machine(), "tiny": args.tiny or args.quick, "parts": kept}
            Path(args.out).write_text(json.dumps(content, indent=2) + "\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
