"""State dicts of nnU-Net's networks, which hold most tensors under several names.

The decoder stores the encoder again and each convolution block stores its layers again in ``all_modules``: 188
names for the 68 tensors of a PlainConvUNet. In memory one name per tensor is used (the first), in files all of them.
"""

from __future__ import annotations

from torch import Tensor, nn


def unwrap(network: nn.Module) -> nn.Module:
    """Strip DistributedDataParallel (``module``) and torch.compile (``_orig_mod``), in any order."""
    while True:
        inner = getattr(network, "_orig_mod", None)
        if inner is None and isinstance(network, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            inner = network.module
        if inner is None:
            return network
        network = inner


def alias_map(network: nn.Module) -> dict[str, str]:
    """Every name of the state dict -> the one name under which its tensor is known here (the first, ``encoder...conv``)."""
    first: dict[int, str] = {}
    return {
        name: first.setdefault(id(tensor), name) for name, tensor in unwrap(network).state_dict(keep_vars=True).items()
    }


def canonical_state_dict(network: nn.Module) -> dict[str, Tensor]:
    """One name per tensor. The tensors are the network's own, detached, not copies."""
    state = unwrap(network).state_dict()
    return {name: state[name] for name, canonical in alias_map(network).items() if name == canonical}


def full_state_dict(network: nn.Module) -> dict[str, Tensor]:
    """Every name of the state dict, as nnU-Net's files have it: copies on the CPU, aliases sharing one copy."""
    state = canonical_state_dict(network)
    copies = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in state.items()}
    return {name: copies[canonical] for name, canonical in alias_map(network).items()}
