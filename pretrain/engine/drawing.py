"""When a run draws its curves and pictures; what cannot be drawn or written gives a warning, no more."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from nnssl.distributed import rank
from nnssl.pretrain.engine.pictures import save_picture
from nnssl.pretrain.engine.progress import plot_details, plot_progress

if TYPE_CHECKING:
    from nnssl.pretrain.engine.loop import Engine
    from nnssl.pretrain.methods.base import Method

log = logging.getLogger("nnssl")


def draw(engine: Engine, epoch: int, last: bool = True) -> None:
    """Rank 0 draws the curves and, every few epochs, a picture."""
    if rank() != 0 or not engine.log.history:
        return
    spec, history = engine.spec, engine.log.history
    with _only_told("progress.png"):
        first, now = engine.ends()
        words = {"title": _heading(engine, epoch), "sentence": engine.method.verdict(first, now)[1]}
        panels = [panel for panel in (hook.panel() for hook in spec.hooks) if panel is not None]
        file = spec.folder.path / "progress.png"
        plot_progress(history, file, engine.method.curves(), panels, first=engine.first, **words)
    every = max(1, spec.epochs // 10) if spec.engine.picture_every is None else spec.engine.picture_every
    if every and (last or epoch % every == 0):
        with _only_told("progress_details.png"):
            plot_details(history, spec.folder.path / "progress_details.png")
        draw_views(engine, epoch)


def draw_views(engine: Engine, epoch: int, method: Method | None = None) -> None:
    """Rank 0 draws what the network, or that of another method, makes of the first held-out batch."""
    spec, method = engine.spec, engine.method if method is None else method
    if rank() != 0 or not engine.held_out or spec.engine.picture_every == 0:
        return
    name = f"views_epoch_{epoch:04d}.png"
    training = method.training
    method.eval()
    try:
        own_rng = torch.random.fork_rng([spec.device] if spec.device.type == "cuda" else [])
        with _only_told(name), own_rng, torch.no_grad(), engine.stepper.autocast():
            picture = method.pictures(engine.held_out.batch(method, 0))
            if picture is not None:
                heading = f"{_heading(engine, epoch)}, on held-out images"
                aspect = spec.plan.spacing[-2] / spec.plan.spacing[-1]
                save_picture(picture, spec.folder.path / name, heading=heading, aspect=aspect)
    finally:
        method.train(training)


def _heading(engine: Engine, epoch: int) -> str:
    when = f"after epoch {epoch} of {engine.spec.epochs}" if epoch else "before training"
    return f"{engine.method.name}, pretraining for {engine.spec.plan.dataset_name}, {when}"


@contextmanager
def _only_told(what: str) -> Iterator[None]:
    """A picture that fails is worth a warning, never a run of days."""
    try:
        yield
    except Exception as error:  # noqa: BLE001  drawing code, and disks
        log.warning("%s could not be written (%s: %s); the run goes on.", what, type(error).__name__, error)
