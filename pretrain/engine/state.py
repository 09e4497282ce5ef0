"""The state that a run is continued from: saved, read whole and of this very run, and taken back."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from nnssl import checkpoint
from nnssl.distributed import rank
from nnssl.errors import NnsslError
from nnssl.pretrain.engine.folder import RunFolder, differences

if TYPE_CHECKING:
    from nnssl.pretrain.engine.loop import Engine

log = logging.getLogger("nnssl")

DAMAGED = "checkpoint_damaged.pth"


def training_state(engine: Engine) -> dict[str, Any]:
    """Tensors and plain values only, for ``nnssl_training`` of a checkpoint."""
    spec = engine.spec
    own = {k: v.detach().cpu() for k, v in engine.method.state_dict().items() if not k.startswith("network.")}
    return {
        "method": own,
        "stepper": engine.stepper.state_dict(),
        "step": engine.step,
        "first": engine.first,
        "history": engine.log.history,
        "sums": engine.sums,
        "counted": engine.counted,
        "hooks": {h.name: h.state_dict() for h in spec.hooks},
        "started_from": engine.started_from,
        "rng": torch.get_rng_state(),
        "cuda_rng": torch.cuda.get_rng_state(spec.device) if spec.device.type == "cuda" else None,
        "identity": spec.identity,
    }


def load_state(folder: RunFolder, identity: dict[str, Any]) -> dict[str, Any]:
    """Read ``checkpoint_latest.pth``; where it is damaged, the one before it.

    ``identity`` is that of the run that is to go on. Returns the engine's state, with the network's weights under
    ``network_weights``.

    Raises:
        NnsslError: no checkpoint is whole, or it is of a run with another seed or other options, or holds no training state.
    """
    damages: list[str] = []
    for file in (folder.latest, folder.previous):
        if not file.exists() and (file != folder.previous or damages):
            continue
        try:
            loaded = checkpoint.load(file)
        except NnsslError as error:
            damages.append(str(error))
            continue
        if damages and rank() == 0:  # the next save must not put the damaged file in the place of the good one
            os.replace(folder.latest, folder.path / DAMAGED)
            log.warning("%s\nGoing on from the checkpoint before it; the damaged file is %s.", damages[0], DAMAGED)
        return _state(loaded, file, identity)
    raise NnsslError("\n".join(damages) + "\nNo other checkpoint of this run is left: start anew with a --name.")


def _state(loaded: checkpoint.Checkpoint, file: Path, identity: dict[str, Any]) -> dict[str, Any]:
    training = loaded.training
    if not isinstance(training, dict):
        raise NnsslError(
            f"{file} holds no training state (nnssl_training), so it cannot be continued. Put the run's own checkpoint back, or "
            "give this run a --name."
        )
    saved = training.get("identity", {"method": loaded.method})  # a version did not write it
    common = {k: v for k, v in identity.items() if k in saved and k != "epochs"}
    changed = differences(saved, common)
    if changed:
        lines = "\n".join(f"  - {c.replace('in the folder', 'in the checkpoint')}" for c in changed)
        raise NnsslError(
            f"{file} belongs to a run with another configuration than config.json beside it:\n{lines}\nPut the run's own "
            "checkpoint back, or give this run a --name."
        )
    return {**training, "network_weights": loaded.weights}


def restore(engine: Engine, state: dict[str, Any]) -> None:
    """Take back :func:`training_state` and ``network_weights``; refuses a part that is missing or does not fit."""
    spec, method = engine.spec, engine.method

    def take_weights(weights: dict[str, torch.Tensor]) -> None:
        method.load_state_dict({**method.state_dict(), **{f"network.{k}": v for k, v in weights.items()}})

    def take_method(own: dict[str, torch.Tensor]) -> None:
        network = {k: v for k, v in method.state_dict().items() if k.startswith("network.")}
        method.load_state_dict({**network, **own})

    def take_hooks(states: dict[str, Any]) -> None:
        for hook in spec.hooks:
            hook.load_state_dict(states.get(hook.name, {}))

    def take_rng(saved: torch.Tensor) -> None:
        if rank():  # only rank 0's generators are saved; the others' must differ from them
            torch.manual_seed(spec.seed + 7919 * rank() + engine.step)
        else:
            torch.set_rng_state(saved.cpu())

    def take_cuda_rng(saved: torch.Tensor | None) -> None:
        if not rank() and saved is not None and spec.device.type == "cuda":
            torch.cuda.set_rng_state(saved.cpu(), spec.device)

    steps: dict[str, Callable[[Any], None]] = {
        "network_weights": take_weights,
        "method": take_method,
        "stepper": engine.stepper.load_state_dict,
        "step": lambda v: setattr(engine, "step", int(v)),
        "first": lambda v: setattr(engine, "first", dict(v)),
        "history": lambda v: setattr(engine.log, "history", [dict(row) for row in v]),
        "sums": lambda v: setattr(engine, "sums", dict(v)),
        "counted": lambda v: setattr(engine, "counted", int(v)),
        "hooks": take_hooks,
        "rng": take_rng,
        "cuda_rng": take_cuda_rng,
    }
    latest = spec.folder.latest
    for part, take in steps.items():
        try:
            take(state[part])
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError, IndexError) as error:
            lines = str(error).splitlines() or [""]
            missing = isinstance(error, KeyError) and error.args == (part,)
            why = "is missing" if missing else f"does not fit ({lines[-1].strip()})"
            raise NnsslError(
                f"{latest} cannot be continued: its part '{part}' {why}. Start anew with a --name, or put the run's own "
                "checkpoint back."
            ) from error
    engine.started_from = state.get("started_from")
    if not 0 <= engine.step <= spec.steps:
        raise NnsslError(f"{latest} is from step {engine.step}; this run has {spec.steps}.")
