"""Whatever compares the samples of a batch: two processes with half of it each have the value and the gradient of one."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F

from nnssl.heads import standardise
from nnssl.heads.dino import RunningStandardisation
from nnssl.losses.consistency import Centre, Health, embedding_spread, koleo, retrieval, variance_hinge
from nnssl.losses.masked import masked_error

B, D = 6, 5


def _running(x, batch):
    norm = RunningStandardisation(D, batch=batch)
    norm(0.5 * x.detach() + 1)
    return norm(x), norm.mean, norm.var


def _centre(x):
    centre = Centre(D)
    centre.observe(x)
    centre.step()
    return centre.value


def _retrieval(x):
    """The own volume's global view is the nearest of all ranks, or that of the next sample is."""
    volume = torch.arange(len(x)) + len(x) * (dist.get_rank() if dist.is_initialized() else 0)
    return torch.stack(retrieval(x[None], x, volume) + retrieval(x[None], x.roll(1, 0) * 0.5, volume))


# Functions of this rank's rows ``(b, D)``; what they return is the same on each rank.
EQUAL = {
    "variance_hinge": lambda x: variance_hinge(0.6 * x[None]),
    "koleo": lambda x: koleo(F.normalize(x, dim=1)[None]),
    "embedding_spread": lambda x: embedding_spread(F.normalize(x, dim=1)),
    "retrieval": _retrieval,
    "centre": _centre,
    "health": lambda x: torch.stack(Health(D)(F.softmax(x, 1))),
    "running mean": lambda x: _running(x, False)[1],
    "running variance": lambda x: _running(x, False)[2],
}
# Functions whose rows are this rank's part of the whole.
ROWS = {
    "standardise": standardise,
    "running": lambda x: _running(x, False)[0],
    "running, of the batch": lambda x: _running(x, True)[0],
}


def data(device_rows=slice(None)):
    g = torch.Generator().manual_seed(3)
    x = torch.randn(B, D, generator=g) + torch.arange(B)[:, None] * 0.3
    return x[device_rows].clone().requires_grad_()


def weights(rows=slice(None)):
    return torch.randn(B, D, generator=torch.Generator().manual_seed(4))[rows]


def error(rows=slice(None)):
    """Ranks differ in how many voxels are hidden."""
    x = data(rows)
    region = (torch.arange(B)[:, None] > torch.arange(D))[rows]
    value = masked_error(x[:, None], torch.zeros_like(x)[:, None], region[:, None])
    value.backward()
    return value.detach(), x.grad


def measure(rows=slice(None)):
    """Value and gradient of each function on some rows, as a rank that has these."""
    out = {}
    for name, function in EQUAL.items():
        x = data(rows)
        value = function(x)
        if value.requires_grad:
            value.backward()
        out[name] = (value.detach(), x.grad)
    for name, function in ROWS.items():
        x = data(rows)
        value = function(x)
        (value * weights(rows)).sum().backward()
        out[name] = (value.detach(), x.grad)
    return out


def worker(rank, store, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2)
    try:
        half = slice(rank * B // 2, (rank + 1) * B // 2)
        torch.save((measure(half), error(half)), f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


def test_two_ranks_equal_one(tmp_path):
    mp.spawn(worker, (str(tmp_path / "store"), str(tmp_path)), nprocs=2)
    ranks = [torch.load(tmp_path / f"{r}.pt") for r in range(2)]
    one = measure()
    for name, (value, grad) in one.items():
        values, grads = zip(*(r[0][name] for r in ranks))
        if name in ROWS:
            torch.testing.assert_close(torch.cat(values), value, atol=1e-5, rtol=1e-4, msg=name)
        else:
            for theirs in values:
                torch.testing.assert_close(theirs, value, atol=1e-5, rtol=1e-4, msg=name)
        assert (grad is None) == (grads[0] is None), name
        if grad is not None:  # a loss that is the same on each rank counts twice until it is averaged
            parts = torch.cat(grads) / (1 if name in ROWS else 2)
            torch.testing.assert_close(parts, grad, atol=1e-5, rtol=1e-4, msg=name)
            assert float(grad.abs().max()) > 1e-3 or name == "running", name
    value, grad = error()
    torch.testing.assert_close(sum(r[1][0] for r in ranks) / 2, value)
    torch.testing.assert_close(torch.cat([r[1][1] for r in ranks]) / 2, grad)
    assert abs(float(ranks[0][1][0] - ranks[1][1][0])) > 0.1  # their parts differ


@pytest.mark.parametrize("name", [*EQUAL, *ROWS])
def test_a_rank_alone_would_give_something_else(name):
    """So that the comparison above can fail."""
    function = {**EQUAL, **ROWS}[name]
    whole, half = function(data()).detach(), function(data(slice(B // 2))).detach()
    assert not torch.allclose(half, whole[: B // 2] if name in ROWS else whole, atol=1e-3)
