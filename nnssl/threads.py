"""How many threads a CPU computes with: what ``OMP_NUM_THREADS`` says, where it says something."""

from __future__ import annotations

import os

import torch

VARIABLE = "OMP_NUM_THREADS"


def threads_asked() -> int | None:
    """The number in ``OMP_NUM_THREADS``, of a list such as ``4,2`` the first; None where it is unset or no positive number."""
    first = os.environ.get(VARIABLE, "").partition(",")[0].strip()
    return int(first) if first.isdecimal() and int(first) > 0 else None


def keep_to_threads() -> None:
    """Let torch compute with the threads that ``OMP_NUM_THREADS`` asks for, which ``nnUNetv2_train -device cpu`` does not.

    Two trainings side by side on two cores would have four threads, which wait for each other.
    """
    asked = threads_asked()
    if asked is not None:
        torch.set_num_threads(asked)
