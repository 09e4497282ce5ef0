"""Two looks into nnU-Net's trainer that it offers no way for: what it would save, and whether its weights changed."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from typing import Any

import torch

from nnssl.networks import canonical_state_dict


def content_of(save: Callable[[Any], None]) -> dict[str, Any] | None:
    """What ``save(file)`` writes with ``torch.save``, on the CPU; None where it writes nothing."""
    file = io.BytesIO()
    save(file)
    if not file.tell():
        return None
    file.seek(0)
    return torch.load(file, map_location="cpu", weights_only=False)  # nnU-Net's numbers of this very moment, no file


def digests(network: torch.nn.Module) -> dict[str, str]:
    """A short hash of each tensor, over at most about 1000 of its values: exact, cheap, and nothing large is kept."""
    found = {}
    for name, tensor in canonical_state_dict(network).items():
        values = tensor.detach().flatten()
        sample = values[:: max(1, values.numel() // 1000)].cpu().contiguous()
        found[name] = hashlib.blake2b(sample.view(torch.uint8).numpy().tobytes(), digest_size=8).hexdigest()
    return found
