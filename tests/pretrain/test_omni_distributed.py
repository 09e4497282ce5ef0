"""Two gloo processes with half of the labelled and pseudo-labelled patches each give the loss and gradients of one process."""

import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from nnssl.networks import build_network
from nnssl.plans import Plan
from nnssl.pretrain.augment import StepRNG
from nnssl.pretrain.methods import Crops, SourceStats, get_method
from nnssl.pretrain.omni import OmniConfig, make_omni
from nnssl.pretrain.omni.auxiliary import OmniCrops
from nnssl.pretrain.omni.patches import Patches

IGNORE = 3


def build(plans, dataset_json, name):
    plan = Plan.from_dicts(plans, name, dataset_json)
    cls = make_omni(get_method("robust"), OmniConfig(threshold=0.36), largest=[1])
    config = cls.Config()
    request = cls.crops(plan, SourceStats((24, 36, 24), 9), config)
    torch.manual_seed(0)
    return cls(build_network(plan), plan, request, config)


def terms_of(method, run, first=0, count=4):
    """Labels with an unequal number of ignored voxels on both ranks."""
    g = torch.Generator().manual_seed(1)
    rows, window = slice(first, first + count), method.omni_augmentation.read_size
    ssl = torch.randn(4, 1, *method.request.read_size, generator=g)
    label = torch.randint(0, 3, (4, 1, *window), generator=g, dtype=torch.int16)
    label[0, :, : window[0] // 2] = IGNORE
    data = torch.randn(2, 4, 1, *window, generator=g)
    zero = torch.zeros(count, 3)
    crops = Crops(
        data=ssl[rows],
        body=torch.ones_like(ssl[rows], dtype=torch.bool),
        position=zero,
        axis_position=zero,
        intensity=torch.tensor([-2.5, 2.5]).repeat(count, 1, 1),
        start=zero.long(),
        case=[f"case{i}" for i in range(4)][rows],
    )
    patches = [
        Patches(x[rows], y, [None] * count, ["a"] * count, first, 4)
        for x, y in ((data[0], label[rows]), (data[1], None))
    ]
    with torch.no_grad():
        batch = method.views(OmniCrops(crops, *patches), StepRNG(0, 0, 4, first, count))
    return run(batch)


def worker(index, port, folder, plans, dataset_json, name):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=index, world_size=2)
    method = build(plans, dataset_json, name)
    wrapped = torch.nn.parallel.DistributedDataParallel(
        method
    )  # without a name it would be gone before the backward pass
    terms = terms_of(method, wrapped, 2 * index, 2)
    terms["total"].backward()
    grads = {n: p.grad for n, p in method.named_parameters() if p.grad is not None}
    torch.save(({k: v.detach() for k, v in terms.items()}, grads), f"{folder}/{index}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("dim", [2, 3])  # 2d plans have batch Dice
def test_two_processes_equal_one(tmp_path, tiny_plans, tiny_dataset_json, dim):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    plans = tiny_plans(dim, features=(4, 8, 8), patch=(8, 16, 12))
    info = tiny_dataset_json()
    info["labels"]["ignore"] = IGNORE
    name = "3d_fullres" if dim == 3 else "2d"
    mp.spawn(worker, args=(port, str(tmp_path), plans, info, name), nprocs=2)
    method = build(plans, info, name)
    terms = terms_of(method, method)
    terms["total"].backward()
    assert 0 < float(terms["confident"]) < 1
    grads = {n: p.grad for n, p in method.named_parameters() if p.grad is not None}
    largest = max(float(g.abs().max()) for g in grads.values())
    found = [torch.load(tmp_path / f"{index}.pt") for index in range(2)]
    for name, value in terms.items():
        mean = (found[0][0][name] + found[1][0][name]) / 2
        torch.testing.assert_close(
            mean, value.detach(), atol=1e-5, rtol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )
    for _, their_grads in found:
        assert set(their_grads) == set(grads)
        for name, grad in grads.items():
            torch.testing.assert_close(
                their_grads[name], grad, atol=1e-5 * largest, rtol=1e-3, msg=lambda text, name=name: f"{name}: {text}"
            )
