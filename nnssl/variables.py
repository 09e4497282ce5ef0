"""Environment variables: those that decide a result or its speed, for records of what was run, and those that are numbers."""

from __future__ import annotations

import os

from nnssl.errors import raise_problems

DECIDING = (
    "nnssl_cpu_bf16",
    "nnssl_malloc",
    "nnUNet_compile",
    "nnUNet_n_proc_DA",
    "OMP_NUM_THREADS",
    "CUDA_VISIBLE_DEVICES",
    "CUBLAS_WORKSPACE_CONFIG",
    "PYTORCH_ENABLE_MPS_FALLBACK",
)
"""nnU-Net's three folders are not among them: they are other ones on each machine."""


def variables() -> dict[str, str]:
    """Those of :data:`DECIDING` that are set."""
    return {name: os.environ[name] for name in DECIDING if name in os.environ}


NUMBERS = ("OMP_NUM_THREADS", "nnUNet_def_n_proc", "nnUNet_n_proc_DA", "WORLD_SIZE", "RANK", "LOCAL_RANK")
"""What nnU-Net, torch and others read as a whole number, and end with a traceback where it is none."""


def check_variables() -> None:
    """Refuse values of :data:`NUMBERS` that are no whole number.

    Raises:
        NnsslError: names all of them.
    """
    values = {name: os.environ[name].strip() for name in NUMBERS if name in os.environ}
    wrong = {k: v for k, v in values.items() if not v.isdecimal() and (v or k != "OMP_NUM_THREADS")}
    problems = [f"{name} is '{value}'; it must be a whole number" for name, value in wrong.items()]
    advice = f"Set it anew, or leave it out: unset {' '.join(wrong)}"
    raise_problems(problems, "environment", advice=advice)
