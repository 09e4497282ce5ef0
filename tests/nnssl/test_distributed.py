import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from nnssl.distributed import gather_with_grad, is_distributed, mean_over_ranks, rank, world_size


def loss_of(z):
    """A loss that compares every row with every other one."""
    return torch.logsumexp((z @ z.T) / z.shape[1], dim=1).mean()


def worker(index, port, folder):
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=index, world_size=2)
    torch.manual_seed(0)
    data, layer = torch.randn(6, 5), torch.nn.Linear(5, 4)
    wrapped = torch.nn.parallel.DistributedDataParallel(layer)
    z = gather_with_grad(wrapped(data[index * 3 : index * 3 + 3]))
    flags = gather_with_grad(torch.tensor([index == 0]))
    loss = loss_of(z)
    loss.backward()
    mean = mean_over_ranks(torch.tensor(float(index)))
    torch.save((loss.detach(), layer.weight.grad, flags, mean, rank(), world_size()), f"{folder}/{index}.pt")
    dist.destroy_process_group()


def free_port():
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def test_two_processes_equal_one(tmp_path):
    mp.spawn(worker, args=(free_port(), str(tmp_path)), nprocs=2)
    torch.manual_seed(0)
    data, layer = torch.randn(6, 5), torch.nn.Linear(5, 4)
    loss = loss_of(layer(data))
    loss.backward()
    for index in range(2):
        value, grad, flags, mean, r, w = torch.load(tmp_path / f"{index}.pt")
        torch.testing.assert_close(value, loss.detach())
        torch.testing.assert_close(grad, layer.weight.grad, atol=1e-6, rtol=1e-5)
        assert flags.tolist() == [True, False]
        assert flags.dtype == torch.bool
        assert mean == 0.5
        assert (r, w) == (index, 2)


def test_alone_nothing_happens():
    x = torch.randn(3, 2, requires_grad=True)
    assert gather_with_grad(x) is x
    assert not is_distributed()
    assert (rank(), world_size()) == (0, 1)
    assert mean_over_ranks(x).requires_grad is False
