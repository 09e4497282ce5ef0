"""hdense learns, is the same on one process and on two, and leaves weights that nnU-Net loads."""

import math
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F

from nnssl import checkpoint
from nnssl.networks import build_network
from nnssl.plans import Plan
from nnssl.pretrain.augment.rng import StepRNG
from nnssl.pretrain.methods import Crops, SourceStats, get_method

FOUR = ((1, 1, 1), (1, 2, 2), (2, 2, 2), (2, 2, 2))


def _crops(window, n, seed=0, channels=1):
    g = torch.Generator().manual_seed(seed)
    coarse = torch.randn(n, channels, *[w // 4 + 1 for w in window], generator=g)
    data = F.interpolate(coarse, size=window, mode="trilinear")
    data = data + 0.2 * torch.randn(data.shape, generator=g)
    position = torch.rand(n, 3, generator=g).double()
    intensity = torch.tensor([-2.0, 2.0]).expand(n, channels, 2).clone()
    share = torch.tensor([0.003, 0.5, 0.02, 0.5])[torch.arange(n) % 4].view(n, 1, 1, 1, 1)
    body = torch.rand(n, 1, *window, generator=g) < share  # the number of voxels differs between pairs
    return Crops(data, body, position, position, intensity, torch.zeros(n, 3, dtype=torch.int64), ["c"] * n)


def _method(plans, description, **options):
    plan = Plan.from_dicts(plans, "3d_fullres", description)
    cls = get_method("hdense")
    config = cls.Config(**{"pairs_per_volume": 1, "proj_dim": 16, **options})
    request = cls.crops(plan, SourceStats((20, 30, 28), 5), config, (8, 16, 16))
    torch.manual_seed(0)
    return cls(build_network(plan), plan, request, config)


def _worker(index, port, folder, plans, description):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=index, world_size=2)
    for gather in (True, False):
        method = _method(plans, description, gather=gather, n_voxels=20)
        wrapped = torch.nn.parallel.DistributedDataParallel(method)
        mine, crops = slice(2 * index, 2 * index + 2), _crops(method.request.read_size, 4)
        crops = Crops(**{k: v[mine] for k, v in vars(crops).items() if v is not None})
        with torch.no_grad():
            batch = method.views(crops, StepRNG(0, 3, 4, 2 * index, 2))
        terms = wrapped(batch)
        terms["total"].backward()
        grads = {k: p.grad for k, p in method.named_parameters() if p.grad is not None}
        torch.save(({k: v.detach() for k, v in terms.items()}, grads), f"{folder}/{gather}{index}.pt")
    dist.destroy_process_group()


def _port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def test_two_processes_equal_one(tmp_path, tiny_plans, tiny_dataset_json):
    """Two ranks with half the pairs each; the number of voxels differs between them. Local negatives do differ."""
    plans, description = tiny_plans(3, "plain", strides=FOUR, features=(4, 4, 6, 6)), tiny_dataset_json()
    mp.spawn(_worker, args=(_port(), str(tmp_path), plans, description), nprocs=2)
    method = _method(plans, description, n_voxels=20)
    with torch.no_grad():
        batch = method.views(_crops(method.request.read_size, 4), StepRNG(0, 3, 4))
    counts = batch["valid"].sum(1)
    assert counts[:2].sum() != counts[2:].sum()
    terms = method(batch)
    terms["total"].backward()
    for gather in (True, False):
        ranks = [torch.load(tmp_path / f"{gather}{i}.pt") for i in range(2)]
        mean = {k: sum(r[0][k] for r in ranks) / 2 for k in terms}
        torch.testing.assert_close(mean["restoration"], terms["restoration"].detach(), atol=1e-5, rtol=1e-5)
        if not gather:
            assert terms["contrast"] > mean["contrast"] + 0.1  # more negatives are harder
            continue
        for key in terms:
            torch.testing.assert_close(mean[key], terms[key].detach(), atol=1e-5, rtol=1e-5)
        for key, p in method.named_parameters():
            for _, grads in ranks:
                assert (key in grads) == (p.grad is not None)
                if p.grad is not None:
                    torch.testing.assert_close(grads[key], p.grad, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("arch", ["plain", "resenc"])
def test_learns_one_batch(tiny_plans, tiny_dataset_json, arch):
    """The contrast of two pairs of 32 voxels each falls from near log(127) to below 1 in 100 steps, the restoration halves."""
    plans = tiny_plans(3, arch, strides=FOUR, features=(16, 16, 16, 16))
    method = _method(plans, tiny_dataset_json(), n_voxels=32)
    crops = _crops(method.request.read_size, 2)
    crops.body[:] = True
    with torch.no_grad():
        batch = method.views(crops, StepRNG(0, 0, 2))
    assert batch["valid"].sum() == 64
    optimiser, first = method.optimiser(), None
    for _ in range(100):
        terms = method(batch)
        first = first or {k: v.item() for k, v in terms.items()}
        if terms["contrast"] < 1 and terms["restoration"] < 0.5 * first["restoration"]:
            break
        optimiser.zero_grad()
        terms["total"].backward()
        torch.nn.utils.clip_grad_norm_(method.parameters(), method.grad_clip)
        optimiser.step()
    assert first["chance"] == pytest.approx(math.log(127)) and abs(first["contrast"] - math.log(127)) < 1.5
    assert terms["contrast"] < 1
    assert terms["restoration"] < 0.5 * first["restoration"]


@pytest.mark.parametrize(("name", "arch"), [("hdense", "plain"), ("vox2vec", "resenc")])
def test_nnunet_loads_the_weights(tmp_path, tiny_plans, tiny_dataset_json, name, arch):
    from nnunetv2.run.load_pretrained_weights import load_pretrained_weights

    plan = Plan.from_dicts(tiny_plans(3, arch, strides=FOUR, features=(4, 4, 6, 6)), "3d_fullres", tiny_dataset_json())
    cls = get_method(name)
    config = cls.Config(pairs_per_volume=1, n_voxels=8)
    request = cls.crops(plan, SourceStats((20, 30, 28), 5), config, (8, 16, 16))
    method = cls(build_network(plan), plan, request, config)
    for p in method.network.parameters():
        torch.nn.init.normal_(p, 0.1, 0.2)
    payload = checkpoint.build_payload(
        method.network,
        plan,
        method=name,
        config=vars(config),
        crop_size=request.size,
        pretrained_parts=method.pretrained_parts(),
        data={},
        citations=cls.citation,
    )
    heads = {k.split(".")[0] for k in method.state_dict()} - {"network"}
    assert heads == ({"scale_proj", "projector", "restore"} if name == "hdense" else {"projector"})
    assert not any(part in key for key in payload["network_weights"] for part in heads)
    checkpoint.save(tmp_path / "weights.pth", payload)
    network = build_network(plan)
    fresh = {k: v.clone() for k, v in network.state_dict().items() if ".seg_layers." in k}
    load_pretrained_weights(network, str(tmp_path / "weights.pth"))
    assert all(torch.equal(network.state_dict()[k], v) for k, v in fresh.items())
    x = torch.randn(1, 1, 8, 16, 16)
    expected = method.pyramid(x)
    method.network = network
    for a, b in zip(expected, method.pyramid(x)):
        assert torch.equal(a, b)
