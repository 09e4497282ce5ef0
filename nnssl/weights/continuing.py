"""Whether the run of a checkpoint goes on from it, why not, and what to type."""

from __future__ import annotations

import shlex
from contextlib import suppress
from typing import Any

from nnssl.errors import NnsslError
from nnssl.files import read_json
from nnssl.results import CONFIG, LATEST
from nnssl.weights.load import Checkpoint


def has_state(checkpoint: Checkpoint) -> bool:
    """Whether the file holds the state of the training beside the weights."""
    return checkpoint.training is not None or "optimizer_state" in checkpoint.content


def how_to_continue(checkpoint: Checkpoint) -> str | None:
    """Why a pretraining of ours goes on from here or not, and on a line of its own what to type; None for files of others."""
    if checkpoint.origin != "nnssl":
        return None
    state, ours = has_state(checkpoint), checkpoint.nnssl
    latest = state or checkpoint.path.with_name(LATEST).is_file()
    run = _run_of(checkpoint) if latest else {}
    reasons = [] if state else ["this file holds the weights alone, without the state of the training"]
    command = str(run.get("command") or "")
    if not command:
        if state:
            return "by the run's own command with --c, where this file lies in the folder of its run"
        return f"{reasons[0]}. Another run starts from them with: nnssl_pretrain ... --init {shlex.quote(str(checkpoint.path))}"
    if not state:
        reasons.append(f"{LATEST} beside it holds both")
    if ours.get("step", 0) < ours.get("steps", 0):
        return f"{'; '.join([*reasons, 'to go on'])}:\n{further(command)}"
    epochs = run["identity"]["epochs"]
    reasons.append(f"the run has reached its end after {epochs} epochs")
    if run["identity"].get("omni"):
        return f"{'; '.join(reasons)}, and one with --labelled cannot be lengthened"
    return f"{'; '.join([*reasons, 'to lengthen it'])}:\n{further(command, 2 * epochs)}"


def further(command: str, epochs: int | None = None) -> str:
    """The command line that goes on with the run that ``command`` began; with ``epochs``, until there are so many."""
    words = shlex.split(command)
    if "--epochs" in words:  # a run that was lengthened has more than it began with
        i = words.index("--epochs")
        words = words[:i] + words[i + 2 :]
    return shlex.join([*words, "--c", *(["--epochs", str(epochs)] if epochs else [])])


def _run_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """``config.json`` of the run whose folder the file lies in; empty where it lies elsewhere."""
    with suppress(NnsslError):
        run = read_json(checkpoint.path.with_name(CONFIG))
        if isinstance(run, dict) and run.get("method") == checkpoint.method and "identity" in run:
            return run
    return {}
