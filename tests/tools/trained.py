"""What the tests of trainers ask of a trainer and its network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from nnssl import checkpoint
from nnssl.networks import canonical_state_dict


def equal_weights(network: nn.Module, file: Path) -> set[str]:
    """Names of the network's tensors that equal the file's."""
    stored = checkpoint.load(file).weights
    return {n for n, t in canonical_state_dict(network).items() if torch.equal(t, stored[n])}


def log_of(trainer: Any) -> str:
    return Path(trainer.log_file).read_text()


def is_constant(name: str) -> bool:
    """Norms start at one and zero and biases of convolutions at zero, in each network."""
    return ".norm." in name or name.endswith(".bias")
