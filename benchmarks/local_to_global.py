"""Does a masked local view find the global view of its own volume among those of other volumes? For glmae runs.

    python benchmarks/local_to_global.py nnUNet_results/<Dataset>/nnsslGlmae__<plans>__<configuration> --cases unseen.txt

Of each case one window is read per round, and one local and one global view are cut from it. The student embeds the local
views with blocks hidden as in training, the teacher the whole global ones; told is the share of local views whose most similar
global view is their own case's, by chance one over the number of cases, and its standard error over rounds. For the trained
network, and for the untrained one, whose pooled features are standardised by the views at hand. Unseen cases are the honest
test: ``--cases`` names some that the run left out (``--cases`` or ``--exclude`` of nnssl_pretrain); without it, the run's
held-out cases are taken, which are few.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

import torch

from nnssl import checkpoint
from nnssl.config import make_config
from nnssl.networks import build_network
from nnssl.plans import load_plan
from nnssl.pretrain.augment import StepRNG
from nnssl.pretrain.data import HELD_OUT, TRAIN, SampleStream, make_loader
from nnssl.pretrain.methods import get_method
from nnssl.pretrain.prepare import prepare_sources

STREAM = 2**41  # crops and masks that neither training nor its held-out loss has seen


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="output folder of a run")
    parser.add_argument("--cases", type=Path, help="text file of cases, one a line; default: the run's held-out cases")
    parser.add_argument("--rounds", type=int, default=20, help="windows of each case")
    parser.add_argument("--checkpoint", default="checkpoint_latest.pth")
    args = parser.parse_args()
    torch.manual_seed(0)
    run = json.loads((args.run / "config.json").read_text())["identity"]
    plan = load_plan(run["dataset"], run["configuration"], run["plans_name"])
    cls = get_method(run["method"])
    trained = checkpoint.load(args.run / args.checkpoint)
    chosen = {"cases": args.cases, "held_out": 0.0} if args.cases else {}
    pool = prepare_sources(plan, run["sources"], **chosen)
    cases = pool.train if args.cases else pool.held_out
    options = {**run["options"], "global_views": 1, "local_views": 1}
    config = make_config(cls.Config, options)
    request = cls.crops(plan, pool.stats(), config, tuple(run["crop"]["size"]))
    request = dataclasses.replace(request, read_size=tuple(run["crop"]["window"]))
    torch.manual_seed(run["seed"])
    method = cls(build_network(plan), plan, request, config)
    fresh = {k: v.clone() for k, v in method.state_dict().items()}
    weights = {f"network.{k}": v for k, v in trained.weights.items()}
    learnt = {**fresh, **weights, **trained.training["method"]}
    stream = SampleStream(run["seed"] + 1, len(cases), TRAIN if args.cases else HELD_OUT)
    loader = make_loader(pool, plan, request, stream, range(args.rounds))
    batches = [method.views(c, StepRNG(run["seed"], STREAM + i, len(c))) for i, c in enumerate(loader)]
    print(f"{len(cases)} cases, {len(batches)} rounds, views of {request.size}")
    for name, state in {"trained": learnt, "untrained": fresh}.items():
        method.load_state_dict(state)
        method.train(name == "untrained")  # an untrained network's running moments mean nothing: it takes the views'
        hits, chance, same, other = [], [], [], []
        for batch in batches:
            local, whole = batch["local"], batch["global"]["input"]
            with torch.no_grad():
                skips, _, active = method.reconstruct(local["input"], local["mask"])
                features = method.summarise(skips, active, 2)
                found = method.agreement.retrieval(features, whole, local["volume"])
                z = torch.nn.functional.normalize(method.agreement.project("local", features), dim=1)
                alike = z @ method.agreement.embed(whole).T
            hits.append(found["retrieval"])
            chance.append(found["retrieval_chance"])
            own = torch.eye(len(alike), dtype=torch.bool)
            same.append(alike[own].mean())
            other.append(alike[~own].mean())
        found = torch.stack(hits)
        error = found.std().item() / len(found) ** 0.5
        guess, own, others = (torch.stack(v).mean() for v in (chance, same, other))
        print(
            f"{name:9} finds {found.mean():6.1%} +- {error:.1%} (chance {guess:.1%}); "
            f"cosine with its own global view {own:.3f}, with others {others:.3f}"
        )


if __name__ == "__main__":
    main()
