"""Two looks into nnU-Net's trainer that it offers no way for: what it would save, and whether its weights changed."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from typing import Any

import torch

from nnssl.networks import canonical_state_dict

__all__ = ["content_of", "digests"]

_saving = threading.Lock()


def content_of(save: Callable[[Any], None]) -> dict[str, Any] | None:
    """What ``save(filename)`` would write with ``torch.save``, without writing it; None where it writes nothing.

    A stand-in takes the place of the file name, and ``torch.save`` hands back what is meant for it; whatever other threads
    save meanwhile is saved as ever.
    """
    stand_in, taken = object(), []
    with _saving:
        original = torch.save

        def divert(content: Any, file: Any, *args: Any, **kwargs: Any) -> None:
            if file is stand_in:
                taken.append(content)
            else:
                original(content, file, *args, **kwargs)

        torch.save = divert  # type: ignore[assignment]
        try:
            save(stand_in)
        finally:
            torch.save = original
    return taken[0] if taken else None


def digests(network: torch.nn.Module) -> dict[str, str]:
    """A short hash of each tensor, over at most about 1000 of its values: exact, cheap, and nothing large is kept."""
    found = {}
    for name, tensor in canonical_state_dict(network).items():
        values = tensor.detach().flatten()
        sample = values[:: max(1, values.numel() // 1000)].cpu().contiguous()
        found[name] = hashlib.blake2b(sample.view(torch.uint8).numpy().tobytes(), digest_size=8).hexdigest()
    return found
