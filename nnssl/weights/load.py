"""Reads checkpoints without running code from them: ours, MIC-DKFZ nnssl's, nnU-Net's, and its networks in files of others."""

from __future__ import annotations

import errno
import json
import os
import pickle
import re
import struct
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nnssl.errors import NnsslError
from nnssl.weights.unpickle import LENIENT, TENSORS_ONLY
from nnssl.weights.wrappers import OtherNetwork, find_weights_in

ENTRIES = ("nnssl", "nnssl_adaptation_plan", "citations", "trainer_name")
"""What a safetensors file holds besides tensors, as JSON."""

SCHEMA = 2
"""Of our own entry. Files of schema 1 lack ``transfer`` and the run's ``identity``; both are read."""

UNTOLD = "unknown"
"""The method of files of others that name no trainer."""
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
        content: the whole dict as it is stored, with the weights under ``network_weights`` by nnU-Net's names.
        remarks: half a sentence for each thing that was done to find the weights: entry, prefix, what was left out.
    """

    path: Path
    content: dict[str, Any]
    remarks: list[str] = field(default_factory=list)

    @property
    def told(self) -> list[str]:
        """The name of :attr:`remarks` before."""
        return self.remarks

    @property
    def weights(self) -> dict[str, Tensor]:
        """The network's weights, with every alias key that the file has."""
        return self.content["network_weights"]

    @property
    def origin(self) -> str:
        """Who wrote it: ``"nnssl"`` (this package), ``"nnssl-mic"`` (MIC-DKFZ's package), ``"nnU-Net"`` or ``"others"``."""
        if "nnssl" in self.content:
            return "nnssl"
        if "nnssl_adaptation_plan" in self.content:
            return "nnssl-mic"
        return "others" if self.remarks else "nnU-Net"

    @property
    def nnssl(self) -> dict[str, Any]:
        """This package's own entry; empty in files of others."""
        return self.content.get("nnssl", {})

    @property
    def method(self) -> str:
        """Name of the objective; the trainer's name in files of others, ``"unknown"`` where they name none."""
        return str(self.nnssl.get("method") or self.content.get("trainer_name", UNTOLD))

    @property
    def title(self) -> str:
        """The file, and in brackets what made its weights as far as it tells."""
        known = "MIC-DKFZ's nnssl" if self.origin == "nnssl-mic" else ""
        made = known if self.method == UNTOLD else self.method
        return f"{self.path} ({made})" if made else str(self.path)

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
    def verdict(self) -> tuple[bool, str] | None:
        """Whether the pretraining learnt, by its own judgement at its end, and the sentence for it; None where unknown."""
        verdict = self.nnssl.get("verdict")
        if not isinstance(verdict, dict) or "learnt" not in verdict:
            return None
        return bool(verdict["learnt"]), str(verdict.get("sentence", ""))

    @property
    def transfer(self) -> dict[str, Any]:
        """``{"parts": str, "why": str}``: which of them segmentation gets by default; empty where unknown."""
        return self.nnssl.get("transfer") or {}


def _numpy_scalars() -> AbstractContextManager[Any]:
    """Allow the numpy numbers and arrays that nnU-Net's own checkpoints hold; they rebuild numbers and run nothing."""
    if not hasattr(torch.serialization, "safe_globals"):
        return nullcontext()
    scalar = np.float64(0).__reduce__()[0]
    rebuild = np.zeros(1).__reduce__()[0]
    kinds = ("f8", "f4", "f2", "i8", "i4", "i2", "i1", "u8", "u4", "u2", "u1", "?", "U1")
    allowed: list[Any] = [np.dtype, np.ndarray, *{type(np.dtype(kind)) for kind in kinds}]
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 6):
        # the same functions under the path of numpy 1 and of numpy 2, whichever wrote the file
        for core in ("core", "_core"):
            allowed += [(scalar, f"numpy.{core}.multiarray.scalar"), (rebuild, f"numpy.{core}.multiarray._reconstruct")]
    else:
        allowed += [scalar, rebuild]
    return torch.serialization.safe_globals(allowed)


@contextmanager
def plain_loading() -> Iterator[None]:
    """Within, also ``torch.load(weights_only=False)`` of other packages reads tensors, plain values and numpy's only."""
    before = os.environ.get("TORCH_FORCE_WEIGHTS_ONLY_LOAD")
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    try:
        with _numpy_scalars():
            yield
    finally:
        if before is None:
            del os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"]
        else:
            os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = before


def _way_out(path: Path) -> str:
    """Whether ``--trust`` would lead anywhere: a look at the tensors alone, in which nothing of the file's choice runs."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=False, pickle_module=TENSORS_ONLY)
        find_weights_in(content, path)
    except OtherNetwork as error:
        return f"Nor would it be of use: it {str(error).removeprefix(f'{path} ')}"
    except Exception as error:  # whatever a file made to harm raises
        reason = f" ({error})" if isinstance(error, NnsslError) else ""
        return f"Nothing in it is known to be a network of nnU-Net's{reason}."
    return (
        "It holds a network of nnU-Net's: if you trust its origin, write a safe copy of it with "
        f"nnssl_convert {path} COPY.pth --to nnssl --trust"
    )


def _refusal(path: Path, error: Exception) -> NnsslError:
    size, unsafe = path.stat().st_size, _GLOBAL.search(str(error))
    if size == 0:
        text = f"{path} is empty: its writing was interrupted. Use another checkpoint of the run."
    elif unsafe:
        text = (
            f"{path} asks to run '{unsafe.group(1)}' while it is being read, so it is not loaded: only tensors and plain values "
            f"are accepted (torch.load with weights_only=True). {_way_out(path)}"
        )
    elif isinstance(error, OSError) and error.errno != errno.EINVAL:
        text = f"{path} cannot be read: {error.strerror or error}"
    elif isinstance(error, OSError) or "PytorchStreamReader" in str(error):
        text = (
            f"{path} is damaged or was cut off ({size} bytes). Use another checkpoint of the run, or copy the file again and "
            "compare sizes."
        )
    else:
        text = f"{path} is not a checkpoint that torch can read ({size} bytes)."
    return NnsslError(text)


def _is_safetensors(path: Path) -> bool:
    """By its first bytes, whatever its name: the length of a JSON header, and the header."""
    with open(path, "rb") as file:
        start = file.read(9)
    return len(start) == 9 and start[8:] == b"{" and int.from_bytes(start[:8], "little") < max(9, path.stat().st_size)


def _safetensors(path: Path, map_location: str | torch.device) -> dict[str, Any]:
    """The content of a safetensors file, with what :mod:`nnssl.weights.formats` has put into its header as JSON."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", device=str(map_location)) as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if not tensors:
            raise NnsslError(f"{path} holds no tensor.")
        own = {key: json.loads(metadata[key]) for key in ENTRIES if key in metadata}
        return {"network_weights": tensors, **own} if own else tensors  # of others: remarked where they are found
    except (SafetensorError, ValueError) as error:
        size = path.stat().st_size
        raise NnsslError(f"{path} is damaged or no safetensors file ({size} bytes): {error}") from error


def read_content(
    content: Any, path: Path, *, key: str | None = None, prefix: str | None = None, any_network: bool = False
) -> Checkpoint:
    """Make a checkpoint of what a file holds: find the network's weights in it; arguments and errors as those of :func:`load`."""
    try:
        found = find_weights_in(content, path, key, prefix)
    except OtherNetwork as error:
        if not any_network:
            raise
        remark = str(error).removeprefix(f"{path} holds ")
        return Checkpoint(path, {**content, "network_weights": error.tensors}, [remark])
    rest = {k: v for k, v in content.items() if k not in found.entry[:1]} if found.entry else {}
    own = rest.get("nnssl")
    schema = own.get("schema") if isinstance(own, dict) else None
    if isinstance(schema, int) and schema > SCHEMA:
        raise NnsslError(
            f"{path} is of a newer nnssl (schema {schema}); this version reads up to {SCHEMA}: update nnssl."
        )
    return Checkpoint(path, {**rest, "network_weights": found.weights}, found.remarks)


def load(
    path: str | os.PathLike[str],
    map_location: str | torch.device = "cpu",
    *,
    trusted: bool = False,
    key: str | None = None,
    prefix: str | None = None,
    any_network: bool = False,
) -> Checkpoint:
    """Read a checkpoint with ``weights_only=True``, or a safetensors file.

    nnU-Net's network is found under whatever entry and behind whatever prefix it lies, where there is one such place; what was
    done stands in :attr:`Checkpoint.remarks`.

    Args:
        path: the file.
        map_location: where its tensors go.
        trusted: True lets the file run code while it is read (``weights_only=False``): for files of a known origin only.
        key: the entry that holds the weights, where there are several (``"teacher"``, ``"model.ema"``).
        prefix: what stands before nnU-Net's names, where there are several.
        any_network: accept weights of another network too, to say what they are.

    Raises:
        NnsslError: the file is missing, empty, cut off, no checkpoint, holds no network of nnU-Net's or several, or asks for a
            global that is not a tensor or a plain value (named in the message).
    """
    path = Path(path)
    content = read_file(path, map_location, trusted=trusted)
    return read_content(content, path, key=key, prefix=prefix, any_network=any_network)


def read_file(path: Path, map_location: str | torch.device = "cpu", *, trusted: bool = False) -> Any:
    """What a file of tensors and plain values holds, whatever that is; arguments and errors as those of :func:`load`."""
    if not path.is_file():
        raise NnsslError(f"There is no checkpoint {path}.")
    try:
        if _is_safetensors(path) or path.suffix == ".safetensors":
            return _safetensors(path, map_location)
        if trusted:
            return torch.load(path, map_location=map_location, weights_only=False, pickle_module=LENIENT)
        with _numpy_scalars():
            return torch.load(path, map_location=map_location, weights_only=True)
    except NnsslError:
        raise
    except _UNREADABLE as error:
        if isinstance(error, torch.cuda.OutOfMemoryError) or _MACHINE.search(str(error)):
            raise  # the machine's fault, not the file's
        raise _refusal(path, error) from error
