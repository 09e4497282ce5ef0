"""Reads checkpoints without running code from them: ours, MIC-DKFZ nnssl's and stock nnU-Net's."""

from __future__ import annotations

import errno
import json
import os
import pickle
import re
import struct
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nnssl.errors import NnsslError

__all__ = ["ENTRIES", "Checkpoint", "load"]

ENTRIES = ("nnssl", "nnssl_adaptation_plan", "citations", "trainer_name")
"""What a safetensors file holds besides tensors, as JSON."""

_UNREADABLE = (
    *(RuntimeError, pickle.UnpicklingError, EOFError, OSError, ValueError, LookupError, AttributeError, TypeError),
    *(OverflowError, struct.error),
)
_MACHINE = re.compile(r"deserialize object on|allocate memory|not enough memory")
_GLOBAL = re.compile(r"(?:GLOBAL|[Uu]nsupported (?:class|global:?)|FUNCTION) +([\w.]*[.]\w+)")


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """The content of a checkpoint file.

    Attributes:
        path: the file.
        content: the whole dict as it is stored.
    """

    path: Path
    content: dict[str, Any]

    @property
    def weights(self) -> dict[str, Tensor]:
        """``network_weights``, with every alias key that the file has."""
        return self.content["network_weights"]

    @property
    def origin(self) -> str:
        """Who wrote it: ``"nnssl"`` (this package), ``"nnssl-mic"`` (MIC-DKFZ's package) or ``"nnU-Net"``."""
        if "nnssl" in self.content:
            return "nnssl"
        return "nnssl-mic" if "nnssl_adaptation_plan" in self.content else "nnU-Net"

    @property
    def nnssl(self) -> dict[str, Any]:
        """This package's own entry; empty in files of others."""
        return self.content.get("nnssl", {})

    @property
    def method(self) -> str:
        """Name of the objective; the trainer's name in files of others."""
        return str(self.nnssl.get("method") or self.content.get("trainer_name", "unknown"))

    @property
    def adaptation_plan(self) -> dict[str, Any] | None:
        """The entry that MIC-DKFZ's fine-tuning reads, or None."""
        return self.content.get("nnssl_adaptation_plan")

    @property
    def citations(self) -> list[dict[str, Any]]:
        """Papers to cite."""
        return list(self.content.get("citations", []))

    @property
    def training(self) -> dict[str, Any] | None:
        """The engine's state for an exact resume, or None."""
        return self.content.get("nnssl_training")

    @property
    def pretrained_parts(self) -> dict[str, Any] | None:
        """``{"encoder": bool, "decoder_stages": [...]}`` as promised by the method; None in files of others."""
        return self.nnssl.get("pretrained_parts")

    @property
    def transfer(self) -> dict[str, Any]:
        """``{"parts": str, "why": str}``: which of them segmentation gets by default; empty where not told."""
        return self.nnssl.get("transfer") or {}


def _numpy_scalars() -> AbstractContextManager[Any]:
    """Allow the numpy scalars that nnU-Net's own checkpoints hold; they rebuild numbers and run nothing."""
    if not hasattr(torch.serialization, "safe_globals"):
        return nullcontext()
    scalar = np.float64(0).__reduce__()[0]
    allowed: list[Any] = [np.dtype, *{type(np.dtype(kind)) for kind in ("f8", "f4", "f2", "i8", "i4", "u1", "?")}]
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 6):
        # the same function under the path of numpy 1 and of numpy 2, whichever wrote the file
        allowed += [(scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
    else:
        allowed.append(scalar)
    return torch.serialization.safe_globals(allowed)


def _refusal(path: Path, error: Exception) -> NnsslError:
    size = path.stat().st_size
    if size == 0:
        return NnsslError(f"{path} is empty: its writing was interrupted. Use another checkpoint of the run.")
    unsafe = _GLOBAL.search(str(error))
    if unsafe:
        return NnsslError(
            f"{path} asks to run '{unsafe.group(1)}' while it is being read, so it is not loaded: only tensors and plain values "
            "are accepted (torch.load with weights_only=True). If you trust its origin, write a safe copy of it with "
            "nnssl_convert --trust."
        )
    if isinstance(error, OSError) and error.errno != errno.EINVAL:
        return NnsslError(f"{path} cannot be read: {error.strerror or error}")
    if isinstance(error, OSError) or "PytorchStreamReader" in str(error):
        return NnsslError(
            f"{path} is damaged or was cut off ({size} bytes). Use another checkpoint of the run, or copy the file again and "
            "compare sizes."
        )
    return NnsslError(f"{path} is not a checkpoint that torch can read ({size} bytes).")


def _safetensors(path: Path, map_location: str | torch.device) -> dict[str, Any]:
    """A safetensors file as :func:`nnssl.weights.convert` writes it: one name per tensor, entries as JSON in its header."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", device=str(map_location)) as file:
            told = file.metadata() or {}
            content: dict[str, Any] = {"network_weights": {name: file.get_tensor(name) for name in file.keys()}}  # noqa: SIM118
        return {**content, **{key: json.loads(told[key]) for key in ENTRIES if key in told}}
    except (SafetensorError, ValueError) as error:
        size = path.stat().st_size
        raise NnsslError(f"{path} is damaged or no safetensors file ({size} bytes): {error}") from error


def load(
    path: str | os.PathLike[str], map_location: str | torch.device = "cpu", *, trusted: bool = False
) -> Checkpoint:
    """Read a checkpoint with ``weights_only=True``, or a ``.safetensors`` file.

    Args:
        path: the file.
        map_location: where its tensors go.
        trusted: True lets the file run code while it is read (``weights_only=False``): for files of a known origin only.

    Raises:
        NnsslError: the file is missing, empty, cut off, no checkpoint, has no ``network_weights``, or asks for a global that
            is not a tensor or a plain value (named in the message).
    """
    path = Path(path)
    if not path.is_file():
        raise NnsslError(f"There is no checkpoint {path}.")
    try:
        if path.suffix == ".safetensors":
            content = _safetensors(path, map_location)
        else:
            with nullcontext() if trusted else _numpy_scalars():
                content = torch.load(path, map_location=map_location, weights_only=not trusted)
    except NnsslError:
        raise
    except _UNREADABLE as error:
        if isinstance(error, torch.cuda.OutOfMemoryError) or _MACHINE.search(str(error)):
            raise  # the machine's fault, not the file's
        raise _refusal(path, error) from error
    if not isinstance(content, dict) or "network_weights" not in content:
        held = ", ".join(map(str, list(content)[:6])) if isinstance(content, dict) else type(content).__name__
        raise NnsslError(
            f"{path} holds no 'network_weights' as nnU-Net's and nnssl's checkpoints do. It holds: {held}."
        )
    weights = content["network_weights"]
    if not isinstance(weights, dict) or not weights or not all(isinstance(v, Tensor) for v in weights.values()):
        raise NnsslError(f"'network_weights' of {path} is not a dict of tensors.")
    return Checkpoint(path, content)
