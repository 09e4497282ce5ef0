"""What ``--c`` needs of a training beyond the network's weights, and how it is taken back."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from nnssl.distributed import rank
from nnssl.errors import NnsslError

if TYPE_CHECKING:
    from nnssl.pretrain.engine.loop import Engine


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


def restore(engine: Engine, state: dict[str, Any]) -> None:
    """Take back :func:`training_state` and ``network_weights``.

    Raises:
        NnsslError: names the part that is missing or does not fit.
    """
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
