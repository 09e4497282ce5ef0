"""Does a voxel embedding find the same voxel in another crop of a held-out case? For finished hdense and vox2vec runs.

    python benchmarks/nearest_voxel.py nnUNet_results/<Dataset>/nnsslHdense__<plans>__<configuration>

For each pair of overlapping crops of a held-out case, voxels that both show are looked up: the query's embedding from crop A, the
candidates all voxels of crop B. Told are the share of queries whose most similar candidate is exactly the corresponding voxel
(one over the number of candidates by chance), or is at most 2 voxels away on each axis, and the median distance in voxels;
for corrupted crops as in training and for clean ones, for the trained and for the untrained network. Without training,
clean crops are matched by their mere intensities, so the corrupted ones are the honest test.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

import torch
from torch import Tensor

from nnssl import checkpoint
from nnssl.config import make_config
from nnssl.networks import build_network
from nnssl.plans import load_plan
from nnssl.pretrain.augment import StepRNG
from nnssl.pretrain.data import HELD_OUT, SampleStream, make_loader
from nnssl.pretrain.methods import get_method
from nnssl.pretrain.prepare import prepare_sources

NEAR = 2
STREAM = 2**41  # crops and corruption that neither training nor its held-out loss has seen


def all_voxels(size: tuple[int, ...]) -> Tensor:
    """``(voxels, dim)`` int64, in the order of a flattened map."""
    return torch.cartesian_prod(*[torch.arange(s) for s in size]).reshape(-1, len(size))


@torch.no_grad()
def look_up(method, batch: dict[str, Tensor], size: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Errors of all queries ``(queries, dim)`` in voxels, and of as many guesses at random."""
    levels = method.pyramid(batch["input"])
    n, errors, guesses = len(batch["valid"]), [], []
    everywhere = all_voxels(size)
    for i in range(n):
        keep = batch["valid"][i]
        query, truth = batch["voxels"][0, i][keep], batch["voxels"][1, i][keep]
        a = method.project(method.representation([v[i : i + 1] for v in levels], query[None])[0])
        b = method.project(method.representation([v[n + i : n + i + 1] for v in levels], everywhere[None])[0])
        errors.append(everywhere[(a @ b.T).argmax(1)] - truth)
        guesses.append(everywhere[torch.randint(len(everywhere), (len(truth),))] - truth)
    return torch.cat(errors), torch.cat(guesses)


def summary(errors: Tensor, voxels: int) -> str:
    """One row of the table."""
    exact = (errors == 0).all(1).float().mean().item()
    near = (errors.abs() <= NEAR).all(1).float().mean().item()
    distance = errors.float().norm(dim=1).median().item()
    return f"exact {exact:7.3%} = {exact * voxels:8.1f} x chance | within {NEAR}: {near:6.2%} | median distance {distance:5.2f}"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="output folder of a finished run")
    parser.add_argument("--batches", type=int, default=4)
    parser.add_argument("--voxels", type=int, default=256, help="queries per pair of crops")
    args = parser.parse_args()
    torch.manual_seed(0)
    run = json.loads((args.run / "config.json").read_text())["identity"]
    plan = load_plan(run["dataset"], run["configuration"], run["plans_name"])
    cls = get_method(run["method"])
    trained = checkpoint.load(args.run / "checkpoint_latest.pth")
    pool = prepare_sources(plan, run["sources"])
    print(f"{len(pool.held_out)} held-out cases, crops of {run['crop']['size']}")
    for corrupt in (True, False):
        options = {**run["options"], "n_voxels": args.voxels, "pairs_per_volume": 2}
        if not corrupt:
            options["corruption"] = "none"
        config = make_config(cls.Config, options)
        request = cls.crops(plan, pool.stats(), config, tuple(run["crop"]["size"]))
        request = dataclasses.replace(request, read_size=tuple(run["crop"]["window"]))
        size, voxels = request.size, len(all_voxels(request.size))
        torch.manual_seed(run["seed"])
        method = cls(build_network(plan), plan, request, config)
        fresh = {k: v.clone() for k, v in method.state_dict().items()}
        weights = {f"network.{k}": v for k, v in trained.weights.items()}
        learnt = {**fresh, **weights, **trained.training["method"]}
        stream = SampleStream(run["seed"] + 1, 2 * len(pool.held_out), HELD_OUT)
        loader = make_loader(pool, plan, request, stream, range(args.batches))
        batches = [method.views(c, StepRNG(run["seed"], STREAM + i, len(c))) for i, c in enumerate(loader)]
        for name, state in {"trained": learnt, "untrained": fresh}.items():
            method.load_state_dict(state)
            # An untrained projector's running statistics mean nothing: it takes those of the crop.
            method.train(name == "untrained")
            found = [look_up(method, b, size) for b in batches]
            errors = torch.cat([f[0] for f in found])
            kind = "corrupted" if corrupt else "clean"
            print(f"{kind:9} {name:9} {summary(errors, voxels)} | {len(errors)} queries among {voxels}")
        guess = torch.cat([f[1] for f in found])
        print(f"{'':9} {'random':9} {summary(guess, voxels)}")


if __name__ == "__main__":
    main()
