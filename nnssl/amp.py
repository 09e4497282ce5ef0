"""Automatic mixed precision: which type, on which device, and the context that forward passes run in.

On a CPU this is bfloat16 where the user asks for it; it needs no scaling of the loss. Whether it is faster depends on the
processor: with AMX's matrix units it is; with avx512_bf16 alone a step took half the time of float32 on one processor and more
on another (docs/performance.md).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from nnssl.errors import NnsslError

VARIABLE = "nnssl_cpu_bf16"
"""Environment variable: ``1`` computes in bfloat16 on a CPU."""


def cpu_bfloat16() -> bool:
    """Whether forward passes on a CPU run in bfloat16, as :data:`VARIABLE` says.

    Raises:
        NnsslError: the variable is neither 0 nor 1.
    """
    value = os.environ.get(VARIABLE, "").strip()
    if value not in ("", "0", "1"):
        raise NnsslError(f"The environment variable {VARIABLE} is '{value}': 0 or 1 is wanted.")
    return value == "1"


def amp_dtype(device: torch.device) -> torch.dtype | None:
    """What pretraining computes forward passes in: bfloat16 where the device has it, float16 on older GPUs, None: float32."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    return torch.bfloat16 if device.type == "cpu" and cpu_bfloat16() else None


def autocast_for(device: torch.device, amp: bool = True) -> AbstractContextManager[Any]:
    """The context of a forward pass in a trainer of nnU-Net's: float16 on CUDA as there, bfloat16 on a CPU that is asked for it.

    Without ``amp`` it does nothing.
    """
    if not amp:
        return nullcontext()
    if device.type == "cuda":
        return torch.autocast("cuda")
    return torch.autocast("cpu", dtype=torch.bfloat16) if amp_dtype(device) is not None else nullcontext()


WRONG = 0.1
"""Relative error from which on a result in bfloat16 is wrong; rounding gives 0.003."""


def wrong_in_bfloat16(module: nn.Module, forward: Callable[[nn.Module], Any]) -> list[str]:
    """A line for each kind of convolution that a CPU computes wrongly in bfloat16 at the shapes that it has in a forward pass.

    torch 2.14 makes garbage of the weights' gradient of 3D maps that are two voxels deep, on processors with avx512_bf16.

    Args:
        module: what is trained; a copy of it is used.
        forward: runs the copy once.
    """
    found: dict[str, tuple[_ConvNd, torch.Size]] = {}

    def see(layer: Any, inputs: tuple[Any, ...]) -> None:
        x = inputs[0]
        size = "x".join(map(str, x.shape[2:]))
        name = (
            f"{type(layer).__name__} {layer.in_channels} to {layer.out_channels}, kernel {layer.kernel_size}, on {size}"
        )
        found.setdefault(f"{name}, stride {layer.stride}, batch {len(x)}", (layer, x.shape))

    copy = deepcopy(module)
    for layer in copy.modules():
        if isinstance(layer, _ConvNd):
            layer.register_forward_pre_hook(see)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        forward(copy)
    return [name for name, (layer, shape) in found.items() if _is_wrong(layer, shape)]


def _is_wrong(layer: _ConvNd, shape: torch.Size) -> bool:
    """Whether output and gradients on random numbers differ between float32 and bfloat16."""
    g = torch.Generator().manual_seed(0)
    tried = deepcopy(layer).requires_grad_(True)
    tried._forward_pre_hooks.clear()
    tried._forward_hooks.clear()
    with torch.no_grad():
        tried.weight.copy_(torch.randn(tried.weight.shape, generator=g) / tried.weight[0].numel() ** 0.5)
    x = torch.randn(shape, generator=g).requires_grad_(True)
    weights: Tensor | None = None
    made: list[tuple[Tensor, ...]] = []
    for narrow in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=narrow):
            y = tried(x).float()
        weights = torch.randn(y.shape, generator=g) if weights is None else weights
        made.append((y.detach(), *torch.autograd.grad((y * weights).sum(), (x, tried.weight))))
    return any(not bool((a - b).norm() <= WRONG * a.norm()) for a, b in zip(*made))


def float_outputs(value: Any) -> Any:
    """A network's output, a tensor or a list of them, in float32 for the loss; what is float32 is passed on as it is."""
    if isinstance(value, Tensor):
        return value.float()
    return type(value)(float_outputs(v) for v in value) if isinstance(value, (list, tuple)) else value


def at_least_float32(x: Tensor) -> Tensor:
    """``x`` in float32, or as it is in float64: what a loss is computed in."""
    return x if x.dtype == torch.float64 else x.float()
