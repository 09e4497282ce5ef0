"""Two gloo processes with half of the batch each give the loss and the gradients of one process with all of it."""

import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from nnssl.networks import build_network
from nnssl.plans import Plan
from nnssl.pretrain.methods import SourceStats, get_method


def build(plans, dataset_json):
    plan = Plan.from_dicts(plans, "3d_fullres", dataset_json)
    cls = get_method("robust")
    config = cls.Config()
    request = cls.crops(plan, SourceStats((24, 36, 24), 9), config)
    torch.manual_seed(0)
    return cls(build_network(plan), plan, request, config)


def batch_of(method, rows=slice(None)):
    g = torch.Generator().manual_seed(1)
    x = torch.randn(6, 1, *method.request.size, generator=g)
    y = x + 0.3 * torch.randn(x.shape, generator=g)
    return {"a": x[rows], "b": y[rows], "case": torch.tensor([5, 5, 1, 2, 3, 5])[rows]}


def worker(index, port, folder, plans, dataset_json):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=index, world_size=2)
    method = build(plans, dataset_json)
    wrapped = torch.nn.parallel.DistributedDataParallel(method)
    terms = wrapped(batch_of(method, slice(3 * index, 3 * index + 3)))
    terms["total"].backward()
    grads = {n: p.grad for n, p in method.named_parameters() if p.grad is not None}
    torch.save(({k: v.detach() for k, v in terms.items()}, grads), f"{folder}/{index}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path, tiny_plans, tiny_dataset_json):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    plans = tiny_plans(features=(4, 8, 8))
    mp.spawn(worker, args=(port, str(tmp_path), plans, tiny_dataset_json()), nprocs=2)
    method = build(plans, tiny_dataset_json())
    terms = method(batch_of(method))
    terms["total"].backward()
    grads = {n: p.grad for n, p in method.named_parameters() if p.grad is not None}
    largest = max(float(g.abs().max()) for g in grads.values())
    for index in range(2):
        theirs, their_grads = torch.load(tmp_path / f"{index}.pt")
        for name, value in terms.items():
            torch.testing.assert_close(theirs[name], value.detach(), atol=1e-5, rtol=1e-5)
        assert set(their_grads) == set(grads)
        for name, grad in grads.items():
            torch.testing.assert_close(their_grads[name], grad, atol=1e-5 * largest, rtol=1e-4, msg=name)
