"""Finds the weights of nnU-Net's network in a file that others wrote: under which entry, and behind which prefix.

A choice is made only where there is one: a file that holds a student and a teacher is refused until the user names one of them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from nnssl.errors import NnsslError, did_you_mean
from nnssl.weights.names import from_version_1, is_version_1, looks_like, own_name, without_wrappers

_STATE_OF_TRAINING = ("optim", "scaler", "scheduler", "nnssl_training", "loops", "callbacks", "hooks", "rng")
_DEPTH = 3


class OtherNetwork(NnsslError):
    """The file holds weights, but of a network that is not nnU-Net's.

    Attributes:
        tensors: its tensors by name.
    """

    def __init__(self, message: str, tensors: Mapping[str, Tensor]) -> None:
        super().__init__(message)
        self.tensors = dict(tensors)


@dataclass(frozen=True)
class Found:
    """Weights of a network of nnU-Net's.

    Attributes:
        weights: by nnU-Net's names; aliases as far as the file has them.
        entry: keys that lead to them in the file; empty where the file itself is the state dict.
        remarks: half a sentence for each thing that was done to find them.
    """

    weights: dict[str, Tensor]
    entry: tuple[str, ...] = ()
    remarks: list[str] = field(default_factory=list)


def _is_state(value: Any) -> bool:
    return isinstance(value, Mapping) and any(isinstance(v, Tensor) for v in value.values())


def _states(content: Mapping[Any, Any], path: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], dict[str, Tensor]]]:
    """All dicts of tensors in a file, with the keys that lead to them; what only a training needs is left out."""
    found = []
    tensors = {str(k): v for k, v in content.items() if isinstance(v, Tensor)}
    if tensors:
        found.append((path, tensors))
    if len(path) < _DEPTH:
        for key, value in content.items():
            if isinstance(value, Mapping) and not any(word in str(key).lower() for word in _STATE_OF_TRAINING):
                found += _states(value, (*path, str(key)))
    return found


def _by_prefix(weights: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Prefix -> the weights behind it by nnU-Net's names. Prefixes without a first convolution count only where none has one."""
    groups: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in weights.items():
        split = own_name(name)
        if split:
            groups[split[0]][split[1]] = tensor
    for prefix in [p for p, g in groups.items() if g.keys() <= {"mask_token"}]:
        del groups[prefix]  # other transformers have one too
    whole = {
        p: g for p, g in groups.items() if any(".stem." in n or ".stages.0." in n or n.startswith("eva") for n in g)
    }
    return whole or dict(groups)


def _show(prefix: str) -> str:
    return f"'{prefix}'" if prefix else "'' (none)"


def _choose_prefix(
    groups: dict[str, Any], prefix: str | None, key: str | None, recorded: str | None, path: Path
) -> str:
    """The prefix to strip, as asked for, as the file's adaptation plan says, or the only one."""
    held, example = ", ".join(_show(p) for p in groups), next((p for p in groups if p), "''")
    if prefix is not None:
        wanted = prefix if not prefix or prefix.endswith(".") else f"{prefix}."
        wanted = without_wrappers(wanted)
        if wanted in groups:
            return wanted
        raise NnsslError(
            f"--prefix {prefix}: in {path} nnU-Net's names stand behind {held}.{did_you_mean(wanted, groups)}"
        )
    if recorded is not None:
        if recorded in groups:
            return recorded
        raise NnsslError(
            f"{path}: its adaptation plan says that the encoder lies under '{recorded}encoder', but no name begins so; nnU-Net's "
            f"names stand behind {held}. If these are the weights that you want, name the prefix: --prefix {example}"
        )
    if key is not None:
        groups = {p: g for p, g in groups.items() if key in p.split(".")} or groups
    if len(groups) == 1:
        return next(iter(groups))
    raise NnsslError(
        f"{path} holds nnU-Net's names more than once, behind {held}. Choose one, for example --prefix {example}"
    )


def _choose_state(
    states: list[tuple[tuple[str, ...], dict[str, Tensor]]], key: str | None, path: Path
) -> tuple[tuple[str, ...], dict[str, Tensor]]:
    """The entry that holds a network of nnU-Net's, as asked for or the only one."""
    fitting = [(p, s) for p, s in states if is_version_1(s) or _by_prefix(s)]
    if key is not None:
        named = [(p, s) for p, s in states if key in (".".join(p), *p)]
        inside = [(p, s) for p, s in fitting if any(key in prefix.split(".") for prefix in _by_prefix(s))]
        chosen = [pair for pair in named if pair in fitting] or inside
        if not chosen:
            known = [".".join(p) for p, _ in fitting if p]
            if named:
                raise _other_network(named, path)
            raise NnsslError(
                f"--key {key}: {path} has no such entry.{did_you_mean(key, known)} It has: {', '.join(known) or 'none'}."
            )
        fitting = chosen
    if len(fitting) == 1:
        return fitting[0]
    if not fitting:
        raise _other_network(states, path)
    first = dict(fitting).get(("network_weights",))
    if key is None and first is not None:  # where nnU-Net itself would look
        return ("network_weights",), first
    listed = ", ".join(f"'{'.'.join(p) or '(the file itself)'}'" for p, _ in fitting)
    raise NnsslError(
        f"{path} holds {len(fitting)} networks of nnU-Net's, under {listed}. Choose one, for example "
        f"--key {'.'.join(fitting[0][0] or fitting[1][0])}"
    )


def _other_network(states: list[tuple[tuple[str, ...], dict[str, Tensor]]], path: Path) -> OtherNetwork:
    entry, tensors = max(states, key=lambda pair: len(pair[1]))
    known = looks_like(tensors)
    agree = sum(own_name(without_wrappers(name)) is not None for name in tensors)
    where = f" (under '{'.'.join(entry)}')" if entry else ""
    return OtherNetwork(
        f"{path} holds another network{where}: {agree} of {len(tensors)} names are those of nnU-Net's PlainConvUNet, "
        f"ResidualEncoderUNet or Primus; "
        + (f"they look like {known}" if known else "it is none that is known here")
        + f", for example '{next(iter(tensors))}'. Weights cannot move between networks of different layers.",
        tensors,
    )


def recorded_prefix(adaptation: Any) -> str | None:
    """What an adaptation plan of MIC-DKFZ's nnssl says to stand before nnU-Net's names."""
    key = str(adaptation.get("key_to_encoder") or "") if isinstance(adaptation, Mapping) else ""
    for end in ("encoder.stages", "eva"):
        if key == end or key.endswith(f".{end}"):
            return key[: -len(end)]
    return None


def find_weights_in(content: Any, path: Path, key: str | None = None, prefix: str | None = None) -> Found:
    """Find the weights of a network of nnU-Net's.

    Args:
        content: what the file holds.
        path: the file, for messages.
        key: the entry to take, as dotted keys, or the part of a module's names (``student``).
        prefix: what stands before nnU-Net's names.

    Raises:
        OtherNetwork: there are weights, but of another network.
        NnsslError: no weights, or several networks of which none was chosen.
    """
    if not isinstance(content, Mapping):
        raise NnsslError(f"{path} holds no weights but a {type(content).__name__}.")
    if "network_weights" in content and not _is_state(content["network_weights"]):
        raise NnsslError(f"'network_weights' of {path} is not a dict of tensors.")
    states = _states(content)
    if not states:
        held = ", ".join(map(str, list(content)[:6])) or "nothing"
        raise NnsslError(f"{path} holds no weights, neither under 'network_weights' nor elsewhere. It holds: {held}.")
    entry, weights = _choose_state([(p, {without_wrappers(n): t for n, t in s.items()}) for p, s in states], key, path)
    remarks = []
    if entry != ("network_weights",):
        remarks.append(f"weights found under '{'.'.join(entry)}'" if entry else "the whole file is the weights")
    wrapped = sum(without_wrappers(n) != n for n in dict(states)[entry])
    if wrapped:
        remarks.append(f"what DDP or torch.compile had put into {wrapped} names dropped")
    if is_version_1(weights):
        return Found(from_version_1(weights), entry, [*remarks, "names of nnU-Net v1 translated"])
    groups = _by_prefix(weights)
    chosen = _choose_prefix(groups, prefix, key, recorded_prefix(content.get("nnssl_adaptation_plan")), path)
    alone = any(n.startswith(chosen) and f"encoder.{n.removeprefix(chosen)}" in groups[chosen] for n in weights)
    if not chosen and not alone:
        return Found(weights, entry, remarks)
    stripped = groups[chosen]
    if chosen:
        remarks.append(f"'{chosen}' stripped from {len(stripped)} names")
    if alone:
        remarks.append("an encoder stored alone, 'encoder.' put before its names")
    left = [n for n in weights if not (n.startswith(chosen) and own_name(n) is not None)]
    if left:
        remarks.append(f"{len(left)} other names left out, for example '{left[0]}'")
    return Found(dict(stripped), entry, remarks)
