"""How fast a teacher follows its student."""

from __future__ import annotations

__all__ = ["averaging_momentum"]


def averaging_momentum(step: int, most: float = 0.99) -> float:
    """``m_i = min(1 - 1 / (i + 2), m)``: the plain mean of all steps at first, then a moving average.

    1/2 at step 0, 2/3 at step 1, and with ``most`` 0.99 constant from step 98 on.

    Args:
        step: optimiser steps that the teacher has followed, from 0.
        most: largest momentum, in [0, 1].
    """
    return min(1.0 - 1.0 / (step + 2), most)
