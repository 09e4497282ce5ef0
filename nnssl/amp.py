"""Automatic mixed precision: which type, on which device, and the context that forward passes run in.

On a CPU this is bfloat16, which needs no scaling of the loss. Whether it is faster depends on the processor: with AMX's matrix
units it is; with avx512_bf16 alone a step took half the time of float32 on one processor and more on another
(docs/performance.md), so that there nothing is chosen without being asked for.
"""

from __future__ import annotations

import os
import sys
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from nnssl.errors import NnsslError

VARIABLE = "nnssl_cpu_bf16"
"""Environment variable: ``1`` computes in bfloat16 on any CPU, ``0`` on none."""

CPU_DEFAULT = False
"""Whether bfloat16 is used without being asked for where :func:`has_amx_bfloat16` says that it is fast."""


@lru_cache(maxsize=1)
def has_amx_bfloat16() -> bool:
    """Whether this processor reports AMX's bfloat16 unit and torch's convolutions can use bfloat16."""
    if not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return False
    if sys.platform != "linux":
        known = getattr(torch.cpu, "_is_amx_tile_supported", None)
        return bool(known and known())
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="replace") as file:
            flags = next((line for line in file if line.startswith("flags")), "")
    except OSError:
        return False
    return "amx_bf16" in flags.split()


def cpu_bfloat16() -> bool:
    """Whether forward passes on a CPU run in bfloat16: as :data:`VARIABLE` says, else by the processor.

    Raises:
        NnsslError: the variable is neither 0 nor 1.
    """
    told = os.environ.get(VARIABLE, "").strip()
    if told not in ("", "0", "1"):
        raise NnsslError(f"The environment variable {VARIABLE} is '{told}': 0 or 1 is wanted.")
    return told == "1" if told else CPU_DEFAULT and has_amx_bfloat16()


def amp_dtype(device: torch.device) -> torch.dtype | None:
    """What pretraining computes forward passes in: bfloat16 where the device has it, float16 on older GPUs, None: float32."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    return torch.bfloat16 if device.type == "cpu" and cpu_bfloat16() else None


def autocast_for(device: torch.device, amp: bool = True) -> AbstractContextManager[Any]:
    """The context of a forward pass in a trainer of nnU-Net's: float16 on CUDA as there, bfloat16 on CPUs that have it.

    Args:
        device: where the network is.
        amp: False gives a context that does nothing.
    """
    if not amp:
        return nullcontext()
    if device.type == "cuda":
        return torch.autocast("cuda")
    return torch.autocast("cpu", dtype=torch.bfloat16) if amp_dtype(device) is not None else nullcontext()


def float_outputs(value: Any) -> Any:
    """A network's output, a tensor or a list of them, in float32 for the loss; what is float32 is passed on as it is."""
    if isinstance(value, Tensor):
        return value.float()
    return type(value)(float_outputs(v) for v in value) if isinstance(value, (list, tuple)) else value


def at_least_float32(x: Tensor) -> Tensor:
    """``x`` in float32, or as it is in float64: what a loss is computed in."""
    return x if x.dtype == torch.float64 else x.float()
