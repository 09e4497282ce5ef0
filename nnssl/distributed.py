"""The few collective operations that losses need; all are the identity in a single process."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def is_distributed() -> bool:
    """Whether a process group with more than one rank is up."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    """Index of this process, 0 without a process group."""
    return dist.get_rank() if is_distributed() else 0


def world_size() -> int:
    """Number of processes, 1 without a process group."""
    return dist.get_world_size() if is_distributed() else 1


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.n = x.shape[0]
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        # Each rank computes the same loss from the gathered tensor. Its own rows receive a gradient from every
        # rank's copy of the loss; DistributedDataParallel divides by the number of ranks afterwards.
        grad = grad.contiguous()
        dist.all_reduce(grad)
        start = dist.get_rank() * ctx.n
        return grad[start : start + ctx.n]


def gather_with_grad(x: Tensor) -> Tensor:
    """Concatenate ``x`` of all ranks along axis 0, in rank order, with gradients to every rank.

    A loss computed from the result is the loss of the whole batch on each rank; after the averaging that
    DistributedDataParallel does, its gradient equals that of one process with the whole batch.

    ``(N, ...)``, the same shape on each rank, becomes ``(world_size * N, ...)``; ``x`` itself in a single process. Boolean and
    integer tensors are gathered without gradient. (torch.distributed.nn does the same and is deprecated.)
    """
    if not is_distributed():
        return x
    if x.dtype == torch.bool:
        return gather_with_grad(x.to(torch.uint8)).bool()
    return _Gather.apply(x)


def mean_over_ranks(x: Tensor) -> Tensor:
    """Mean of a detached tensor over ranks, for logging. Shape as ``x``."""
    if not is_distributed():
        return x.detach()
    x = x.detach().clone()
    dist.all_reduce(x)
    return x / dist.get_world_size()
