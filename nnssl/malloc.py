"""On a CPU: let the C library keep freed memory, so that a step does not fetch the same pages from the kernel again.

glibc returns large blocks to the system as soon as they are freed. A training step frees and allocates the same activations over
and over: with features 16 to 128 and 2 crops of 96^3 that is two million page faults and a third of the step's CPU time.
Measurements: docs/performance-changes.md.
"""

from __future__ import annotations

import ctypes
import os
import platform

VARIABLE = "nnssl_malloc"
"""Environment variable: ``0`` leaves the allocator as it is."""

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_LARGEST = 1 << 30
_OLD_LARGEST = 1 << 25
"""The highest mmap threshold that glibc before 2.35 takes."""

_done: bool | None = None


def keep_freed_memory() -> bool:
    """Raise glibc's mmap and trim thresholds to 1 GiB for this process and those that it forks; a second call does nothing.

    Peak memory grows by a few percent up to a fifth. Returns whether they are raised: not with another C library or system,
    where ``nnssl_malloc=0`` is set, or where the user has tuned the allocator (``MALLOC_*``, ``GLIBC_TUNABLES``, ``LD_PRELOAD``).
    """
    global _done
    if _done is None:
        _done = _wanted() and _raise()
    return _done


def _wanted() -> bool:
    if os.environ.get(VARIABLE, "").strip().lower() in ("0", "false", "no", "off"):
        return False
    tuned = any(k in os.environ for k in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_MAX_"))
    tuned = tuned or "malloc" in os.environ.get("GLIBC_TUNABLES", "") or "malloc" in os.environ.get("LD_PRELOAD", "")
    return not tuned and platform.libc_ver()[0] == "glibc"


def _raise() -> bool:
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    # 1 is success; setting one of them turns off glibc's own adaptation of both
    kept = mallopt(_M_TRIM_THRESHOLD, _LARGEST)
    return bool(kept and (mallopt(_M_MMAP_THRESHOLD, _LARGEST) or mallopt(_M_MMAP_THRESHOLD, _OLD_LARGEST)))
