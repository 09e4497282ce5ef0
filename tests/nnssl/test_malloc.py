"""Freed memory is kept on glibc, where nobody has said otherwise; each case in a process of its own."""

import os
import platform
import subprocess
import sys

import pytest

from nnssl import malloc

GLIBC = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")

FAULTS = """
import resource, sys
import numpy as np
from nnssl.malloc import keep_freed_memory
print(keep_freed_memory())
def use():
    for _ in range(3):  # larger than the thresholds that glibc reaches by itself
        np.empty(1 << 26, dtype=np.uint8).fill(1)
use()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
use()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def run(**environment):
    known = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_", "LD_PRELOAD", "nnssl_"))}
    known["NUMPY_MADVISE_HUGEPAGE"] = "0"
    done = subprocess.run(
        [sys.executable, "-c", FAULTS], env={**known, **environment}, capture_output=True, text=True, check=True
    )
    kept, faults = done.stdout.split()
    return kept == "True", int(faults)


@GLIBC
def test_pages_are_kept():
    kept, faults = run()
    assert kept
    assert faults < 100


@GLIBC
@pytest.mark.parametrize(
    "environment",
    [
        {"nnssl_malloc": "0"},
        {"MALLOC_TRIM_THRESHOLD_": "131072"},
        {"GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=131072"},
    ],
)
def test_left_alone_where_told(environment):
    kept, faults = run(**environment)
    assert not kept
    assert faults > 4096


@pytest.mark.parametrize("libc", [("", ""), ("musl", "1.2")])
def test_left_alone_elsewhere(monkeypatch, libc):
    monkeypatch.setattr(malloc, "_done", None)
    monkeypatch.setattr(malloc.platform, "libc_ver", lambda: libc)
    monkeypatch.setattr(malloc, "_raise", lambda: pytest.fail("called"))
    assert malloc.keep_freed_memory() is False


def test_older_glibc_gets_its_highest_threshold(monkeypatch):
    calls = []

    class Library:
        @staticmethod
        def mallopt(key, value):
            calls.append((key, value))
            return int(key != -3 or value <= 1 << 25)

    monkeypatch.setattr(malloc.ctypes, "CDLL", lambda name: Library)
    assert malloc._raise()
    assert calls == [(-1, 1 << 30), (-3, 1 << 30), (-3, 1 << 25)]
