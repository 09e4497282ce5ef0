"""Finds the weights of nnU-Net's network in a file that others wrote: under which entry, and behind which prefix.

A choice is made only where there is one: a file that holds a student and a teacher is refused until the user names one of them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from nnssl.errors import NnsslError, did_you_mean
from nnssl.weights.names import from_version_1, is_version_1, looks_like, own_name, without_wrappers

State = dict[str, Tensor]
Entry = tuple[str, ...]
"""Keys that lead to a state dict in a file; empty where the file itself is it."""

_STATE_OF_TRAINING = ("optim", "scaler", "scheduler", "nnssl_training", "loops", "callbacks", "hooks", "rng")
_DEPTH = 3
_NNUNETS = ("network_weights",)


class OtherNetwork(NnsslError):
    """The file holds weights, ``tensors`` by name, but of a network that is not nnU-Net's."""

    def __init__(self, message: str, tensors: Mapping[str, Tensor]) -> None:
        super().__init__(message)
        self.tensors = dict(tensors)


class Found(NamedTuple):
    """Weights of a network of nnU-Net's: by its names, where they lay, and half a sentence for each thing done to find them."""

    weights: State
    entry: Entry
    remarks: list[str]


def _states(content: Mapping[Any, Any], entry: Entry = ()) -> dict[Entry, State]:
    """All dicts of tensors in a file; what only a training needs is left out."""
    tensors = {str(k): v for k, v in content.items() if isinstance(v, Tensor)}
    found = {entry: tensors} if tensors else {}
    if len(entry) < _DEPTH:
        for key, value in content.items():
            if isinstance(value, Mapping) and not any(word in str(key).lower() for word in _STATE_OF_TRAINING):
                found |= _states(value, (*entry, str(key)))
    return found


def _by_prefix(weights: Mapping[str, Tensor]) -> dict[str, State]:
    """Prefix -> the weights behind it by nnU-Net's names. Prefixes without a first convolution count only where none has one."""
    groups: dict[str, State] = defaultdict(dict)
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


def _choose_prefix(
    groups: Mapping[str, State], prefix: str | None, key: str | None, recorded: str | None, path: Path
) -> str:
    """The prefix to strip, as asked for, as the file's adaptation plan says, or the only one."""
    held = ", ".join(f"'{p}'" if p else "'' (none)" for p in groups)
    example = next((p for p in groups if p), "''")
    if prefix is not None:
        wanted = without_wrappers(prefix if not prefix or prefix.endswith(".") else f"{prefix}.")
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
    fitting = [p for p in groups if key in p.split(".")] or list(groups)
    if len(fitting) == 1:
        return fitting[0]
    raise NnsslError(
        f"{path} holds nnU-Net's names more than once, behind {held}. Choose one, for example --prefix {example}"
    )


def _choose_entry(states: Mapping[Entry, State], key: str | None, path: Path) -> Entry:
    """The entry that holds a network of nnU-Net's, as asked for or the only one."""
    fitting = [entry for entry, state in states.items() if is_version_1(state) or _by_prefix(state)]
    if key is not None:
        named = [entry for entry in states if key in (".".join(entry), *entry)]
        inside = [entry for entry in fitting if any(key in prefix.split(".") for prefix in _by_prefix(states[entry]))]
        chosen = [entry for entry in named if entry in fitting] or inside
        if named and not chosen:
            raise _other_network({entry: states[entry] for entry in named}, path)
        if not chosen:
            known = [".".join(entry) for entry in fitting if entry]
            raise NnsslError(
                f"--key {key}: {path} has no such entry.{did_you_mean(key, known)} It has: {', '.join(known) or 'none'}."
            )
        fitting = chosen
    if not fitting:
        raise _other_network(states, path)
    if len(fitting) == 1:
        return fitting[0]
    if key is None and _NNUNETS in fitting:  # where nnU-Net itself would look
        return _NNUNETS
    listed = ", ".join(f"'{'.'.join(entry) or '(the file itself)'}'" for entry in fitting)
    raise NnsslError(
        f"{path} holds {len(fitting)} networks of nnU-Net's, under {listed}. Choose one, for example "
        f"--key {'.'.join(fitting[0] or fitting[1])}"
    )


def _other_network(states: Mapping[Entry, State], path: Path) -> OtherNetwork:
    entry, tensors = max(states.items(), key=lambda pair: len(pair[1]))
    known = looks_like(tensors)
    agree = sum(own_name(without_wrappers(name)) is not None for name in tensors)
    where = f" (under '{'.'.join(entry)}')" if entry else ""
    return OtherNetwork(
        f"{path} holds another network{where}: {agree} of {len(tensors)} names are those of nnU-Net's PlainConvUNet, "
        f"ResidualEncoderUNet or Primus; {f'they look like {known}' if known else 'it is none that is known here'}, for example "
        f"'{next(iter(tensors))}'. Weights cannot move between networks of different layers.",
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
    """Find the weights of a network of nnU-Net's in what the file ``path`` holds.

    Args:
        content: what it holds.
        path: for messages.
        key: the entry to take, as dotted keys, or the part of a module's names (``student``).
        prefix: what stands before nnU-Net's names.

    Raises:
        OtherNetwork: there are weights, but of another network.
        NnsslError: no weights, or several networks of which none was chosen.
    """
    if not isinstance(content, Mapping):
        raise NnsslError(f"{path} holds no weights but a {type(content).__name__}.")
    states = _states(content)
    if "network_weights" in content and _NNUNETS not in states:
        raise NnsslError(f"'network_weights' of {path} is not a dict of tensors.")
    if not states:
        held = ", ".join(map(str, list(content)[:6])) or "nothing"
        raise NnsslError(f"{path} holds no weights, neither under 'network_weights' nor elsewhere. It holds: {held}.")
    bare = {entry: {without_wrappers(n): t for n, t in state.items()} for entry, state in states.items()}
    entry = _choose_entry(bare, key, path)
    weights, remarks = bare[entry], []
    if entry != _NNUNETS:
        remarks.append(f"weights found under '{'.'.join(entry)}'" if entry else "the whole file is the weights")
    wrapped = sum(without_wrappers(n) != n for n in states[entry])
    if wrapped:
        remarks.append(f"what DDP or torch.compile had put into {wrapped} names dropped")
    if is_version_1(weights):
        return Found(from_version_1(weights), entry, [*remarks, "names of nnU-Net v1 translated"])
    groups = _by_prefix(weights)
    chosen = _choose_prefix(groups, prefix, key, recorded_prefix(content.get("nnssl_adaptation_plan")), path)
    stripped = groups[chosen]
    alone = any(n.startswith(chosen) and f"encoder.{n.removeprefix(chosen)}" in stripped for n in weights)
    if not chosen and not alone:
        return Found(weights, entry, remarks)
    if chosen:
        remarks.append(f"'{chosen}' stripped from {len(stripped)} names")
    if alone:
        remarks.append("an encoder stored alone, 'encoder.' put before its names")
    left = [n for n in weights if not (n.startswith(chosen) and own_name(n) is not None)]
    if left:
        remarks.append(f"{len(left)} other names left out, for example '{left[0]}'")
    return Found(dict(stripped), entry, remarks)
