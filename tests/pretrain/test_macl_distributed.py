"""Two gloo processes with half a batch each equal one with all of it (spec T20)."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from nnssl.networks import build_network
from nnssl.plans import Plan
from nnssl.pretrain.augment import StepRNG
from nnssl.pretrain.methods import Crops, SourceStats
from nnssl.pretrain.methods.macl import MACL, MACLConfig

B = 4
TERMS = ("total", "image", "dense", "equivariance", "image_collapse", "n_positives", "n_negatives", "off_diagonal_cos")


FORMS = {
    "default": {},
    "shifted crops and sites": {"padding": "zeros", "offset": 1, "sites": "both"},
    "local": {"negatives": "local"},
}


def method_of(plans, dataset_json, form):
    torch.manual_seed(0)
    plan = Plan.from_dicts(plans, "3d_fullres", dataset_json)
    config = MACLConfig(**FORMS[form])
    request = MACL.crops(plan, SourceStats((20, 28, 20), 4), config)
    return MACL(build_network(plan), plan, request, config)


def crops_of(method, rows):
    generator = torch.Generator().manual_seed(1)
    window = method.request.read_size
    data = torch.randn(B, 1, *window, generator=generator)
    body = torch.ones(B, 1, *window, dtype=torch.bool)
    body[1, :, : window[0] // 2 + 2] = False  # masked sites on the first rank only
    position = torch.tensor([0.1, 0.5, 0.15, 0.9], dtype=torch.float64)[:, None].expand(B, 3).contiguous()
    full = [data, body, position, position, torch.zeros(B, 1, 2), torch.zeros(B, 3, dtype=torch.long)]
    return Crops(*[t[rows] for t in full], ["case"] * len(range(*rows.indices(B))))


def one_step(module, method, rows):
    first, n = rows.start or 0, len(range(*rows.indices(B)))
    batch = method.views(crops_of(method, rows), StepRNG(0, 0, B, first, n))
    terms = module(batch)
    terms["total"].backward()
    values = {k: float(torch.as_tensor(terms[k]).detach()) for k in TERMS}
    return values, {k: p.grad.clone() for k, p in method.named_parameters() if p.requires_grad}


def worker(rank, plans, dataset_json, store, out):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2)
    try:
        for form in FORMS:
            method = method_of(plans, dataset_json, form)
            result = one_step(DistributedDataParallel(method), method, slice(rank * 2, rank * 2 + 2))
            torch.save(result, f"{out}_{form}_{rank}")
    finally:
        dist.destroy_process_group()


def test_two_ranks_equal_one(tiny_plans, tiny_dataset_json, tmp_path):
    plans, info = tiny_plans(patch=(16, 24, 16), features=(4, 6, 8)), tiny_dataset_json()
    mp.spawn(worker, (plans, info, str(tmp_path / "store"), str(tmp_path / "rank")), nprocs=2)
    for form in FORMS:
        (a, grad_a), (b, grad_b) = (torch.load(tmp_path / f"rank_{form}_{r}", weights_only=True) for r in range(2))
        method = method_of(plans, info, form)
        values, gradients = one_step(method, method, slice(0, B))
        assert all(torch.equal(grad_a[k], grad_b[k]) for k in gradients)
        worst = max(float((g - grad_a[k]).abs().max()) for k, g in gradients.items())
        if form == "local":  # each rank contrasts its own half: another loss, by design
            assert worst > 1e-4 and abs(values["image"] - a["image"]) > 1e-3
            continue
        assert worst < 1e-5, form
        for key in values:
            assert (a[key] + b[key]) / 2 == pytest.approx(values[key], abs=1e-5), key
            if key not in ("equivariance", "total"):  # those of the gathered batch are equal on each rank
                assert a[key] == pytest.approx(b[key], abs=1e-5), key
