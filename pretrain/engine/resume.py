"""The state that a run is continued from: whole, of this very run, or refused."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

from nnssl import checkpoint
from nnssl.distributed import rank
from nnssl.errors import NnsslError
from nnssl.pretrain.engine.folder import RunFolder, differences

log = logging.getLogger("nnssl")

DAMAGED = "checkpoint_damaged.pth"


def load_state(folder: RunFolder, identity: dict[str, Any]) -> dict[str, Any]:
    """Read ``checkpoint_latest.pth``; where it is damaged, the one before it.

    Args:
        folder: of the run.
        identity: of the run that is to go on.

    Returns:
        The engine's state with the network's weights under ``network_weights``.

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
        if damages and rank() == 0:
            os.replace(
                folder.latest, folder.path / DAMAGED
            )  # the next save must not put it in the place of the good one
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
    saved = training.get("identity")
    if not isinstance(saved, dict):  # of a version that did not write it
        saved = {"method": loaded.method}
    common = {k: v for k, v in identity.items() if k in saved and k != "epochs"}
    changed = differences(saved, common)
    if changed:
        lines = "\n".join(f"  - {c.replace('in the folder', 'in the checkpoint')}" for c in changed)
        raise NnsslError(
            f"{file} belongs to a run with another configuration than config.json beside it:\n{lines}\nPut the run's own "
            "checkpoint back, or give this run a --name."
        )
    return {**training, "network_weights": loaded.weights}
