"""The environment variables that decide a result or how fast it comes, for records of what was run."""

from __future__ import annotations

import os

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
