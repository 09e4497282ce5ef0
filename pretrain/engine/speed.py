"""Options that change how fast a step is or what it needs, not what it computes: memory format, recomputation, kernels."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils.checkpoint import checkpoint

from nnssl.errors import NnsslError
from nnssl.networks import unwrap

if TYPE_CHECKING:
    from nnssl.pretrain.engine.config import EngineConfig
    from nnssl.pretrain.methods.base import Method

log = logging.getLogger("nnssl")

_FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}

VECTOR = 16
"""Channels that oneDNN's blocked layouts on a CPU are padded to; channels last spares the padding."""


def apply_options(method: Method, options: EngineConfig) -> None:
    """Set a method up as the options say, before it is compiled or wrapped."""
    last = options.channels_last
    if pads_channels(method.network) if last is None else last:
        use_channels_last(method)
    if options.checkpointing:
        activation_checkpointing(method.network)


def pads_channels(network: nn.Module) -> bool:
    """Whether channels last is faster: on a CPU, where the first convolution's features are no multiple of :data:`VECTOR`.

    By size and not by a timed step, so that a run gives the same bits whenever and however often it is started.
    """
    first = next((m for m in network.modules() if isinstance(m, _ConvNd) and m.weight.ndim in _FORMATS), None)
    return first is not None and first.weight.device.type == "cpu" and first.out_channels % VECTOR != 0


def use_channels_last(module: nn.Module) -> None:
    """Store the weights of all convolutions with the channels last; what they compute then is too."""
    for layer in module.modules():
        if isinstance(layer, _ConvNd) and layer.weight.ndim in _FORMATS:
            layer.weight.data = layer.weight.data.contiguous(memory_format=_FORMATS[layer.weight.ndim])


# ---- activation checkpointing ----------------------------------------------------------------------------------------------


def _recomputed(forward: Any, *inputs: Any) -> Any:
    """Run a stage and keep its inputs only; what it computes is computed again in the backward pass."""
    stage = forward.__self__
    # hooks of one forward (sparse masking) are gone when it would be repeated
    hooked = any(m._forward_hooks or m._forward_pre_hooks for m in stage.modules())
    if hooked or not torch.is_grad_enabled():
        return forward(*inputs)
    return checkpoint(forward, *inputs, use_reentrant=False)


def activation_checkpointing(network: nn.Module) -> int:
    """Turn it on for each stage of a U-Net's encoder and decoder, or each block of a transformer; returns their number.

    Costs about one more forward pass of these and saves what they would have kept. Keys of the state dict, results and
    gradients stay the same.

    Raises:
        NnsslError: the network has no stages that are known here.
    """
    inner: Any = unwrap(network)
    stages: list[Any] = []
    encoder: Any = getattr(inner, "encoder", None)
    decoder, transformer = getattr(inner, "decoder", None), getattr(inner, "eva", None)
    if isinstance(getattr(encoder, "stem", None), nn.Module):
        stages.append(encoder.stem)
    for part in (encoder, decoder):
        stages += list(getattr(part, "stages", ()))
    stages += list(getattr(transformer, "blocks", ()))
    if not stages:
        raise NnsslError(f"-o checkpointing=true: a {type(inner).__name__} has no stages that can be computed again.")
    for stage in stages:
        # a partial of a bound method: a copy of the network (a teacher) gets one of its own
        stage.forward = partial(_recomputed, stage.forward)
    return len(stages)


# ---- the optimiser ---------------------------------------------------------------------------------------------------------


def use_implementation(optimiser: torch.optim.Optimizer, kind: str) -> None:
    """Choose how torch does an optimiser's arithmetic, one of :data:`IMPLEMENTATIONS`; again after its state was loaded."""
    if kind == "auto":
        return
    for group in optimiser.param_groups:
        if "fused" not in group:
            raise NnsslError(f"-o optimizer_implementation={kind}: {type(optimiser).__name__} has one way only.")
        group["foreach"], group["fused"] = kind == "foreach", kind == "fused"
        for parameter in group["params"]:
            step = optimiser.state.get(parameter, {}).get("step")
            if isinstance(step, Tensor):  # fused wants it on the device, the others on the CPU
                place = parameter.device if kind == "fused" else torch.device("cpu")
                optimiser.state[parameter]["step"] = step.to(place, torch.float32)


# ---- copies to the device --------------------------------------------------------------------------------------------------


def tensors_of(value: Any) -> Iterator[Tensor]:
    """All tensors in nested objects, dicts, lists and tuples."""
    if isinstance(value, Tensor):
        yield value
        return
    fields = value if isinstance(value, dict) else getattr(value, "__dict__", {})
    for item in value if isinstance(value, (list, tuple)) else fields.values():
        yield from tensors_of(item)


class Prefetcher:
    """Copies batches to the device; on CUDA in a stream of its own, beside what the GPU still computes for the step before.

    The loop reads a step's numbers one step later, so that it asks for the next batch while the GPU is busy.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, batch: Any) -> Any:
        """The batch on the device; kernels that are started from now on wait for it, the caller does not."""
        if self._stream is None:
            return batch.to(self.device)
        with torch.cuda.stream(self._stream):
            moved = batch.to(self.device)
        current = torch.cuda.current_stream(self.device)
        current.wait_stream(self._stream)
        for tensor in tensors_of(moved):
            if tensor.device.type == "cuda":
                tensor.record_stream(current)
        return moved
