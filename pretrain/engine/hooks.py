"""What may watch a run from outside of the loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nnssl.pretrain.engine.loop import Engine


class Hook:
    """Watches a run; every method may be left out. All ranks call it, in the same order.

    A hook that wants the run to end sets ``engine.stop_reason`` to a sentence.
    """

    name = "hook"

    def start(self, engine: Engine) -> None:
        """Before the first step (also of a continued run)."""

    def after_epoch(self, engine: Engine, row: dict[str, Any]) -> None:
        """After an epoch's held-out evaluation; may add numbers to ``row``."""

    def finish(self, engine: Engine) -> str | None:
        """At the end; a returned sentence is shown to the user."""
        return None

    def state_dict(self) -> dict[str, Any]:
        """What a continued run needs: tensors and plain values only."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what :meth:`state_dict` gave."""

    def panel(self) -> Callable[[Any], None] | None:
        """Draws into a matplotlib axis of ``progress.png``; None: nothing to draw."""
        return None

    def checkpoint_info(self) -> dict[str, Any]:
        """Entries for the checkpoint's ``nnssl`` part."""
        return {}
