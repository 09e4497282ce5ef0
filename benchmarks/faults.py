"""Tries what machines, users and files do to a run, and counts: tried, survived, lost, hung, misadvised, tracebacks shown.

A fault is survived where the program ends as it should in time, says in one message what to do, and where doing it gives what
an undisturbed run gives, bit for bit. Lost: the result is another. Misadvised: the message is not the right one, or what it says
does not help. Runs on a CPU; two processes stand for two GPUs. ``--only PATTERN`` tries those whose name matches.
"""

# ruff: noqa: D103
from __future__ import annotations

import importlib
import re
import signal
import sys
import time

from common import arguments, make_dataset, report, workspace
from fault_kinds.lab import LAB, Failed, Fault

KINDS = ("signals", "saved", "limits", "inputs")
"""Modules of ``fault_kinds``, in the order in which they are tried."""


def attempt(fault: Fault) -> None:
    begin = time.perf_counter()
    try:
        fault.body()
        fault.verdict = "survived"
    except Failed as error:
        fault.verdict, fault.detail = error.kind, str(error)
    except Exception as error:  # noqa: BLE001  what is broken here counts against it
        fault.verdict, fault.detail = "lost", f"{type(error).__name__}: {error}"
    fault.seconds = time.perf_counter() - begin
    sys.stdout.write(f"{fault.verdict:10} {fault.seconds:6.1f} s  {fault.name}\n")
    if fault.detail:
        sys.stdout.write(f"           {fault.detail}\n")
    sys.stdout.flush()


def main() -> int:
    """Try all; status 1 where one was not survived."""
    for kind in KINDS:
        importlib.import_module(f"fault_kinds.{kind}")
    args = arguments(__doc__, only=("", "only faults whose name matches this pattern"))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if hasattr(signal, "SIGHUP"):  # under nohup it is ignored, and what is started here would ignore it too
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
    small = {"shape": (32, 40, 32), "patch": (16, 16, 16), "features": (4, 8, 16)}
    with workspace():
        make_dataset(6, **small)
        make_dataset(6, id=902, preprocessed=False, **small)
        chosen = [f for f in LAB.faults if re.search(args.only, f.name) and not (args.quick and " of 2, " in f.name)]
        for fault in chosen:
            attempt(fault)
    count = {k: sum(f.verdict == k for f in chosen) for k in ("survived", "lost", "hung", "misadvised", "traceback")}
    report("faults", [{"tried": len(chosen), **count}], args.out)
    return 0 if count["survived"] == len(chosen) else 1


if __name__ == "__main__":
    sys.exit(main())
