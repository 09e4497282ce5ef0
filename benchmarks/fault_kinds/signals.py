"""Signals, two runs at a time, stopped clocks, terminals and environments."""

# ruff: noqa: D101, D102, D103
from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

from fault_kinds.lab import (
    LAB,
    Failed,
    Fault,
    Told,
    children,
    continues,
    expect,
    program,
    same,
    straight,
    weights,
)

import torch  # isort: skip


def send(*names: str, to: str = "main") -> Callable[[subprocess.Popen], None]:
    def act(process: subprocess.Popen) -> None:
        target = process.pid if to == "main" else children(process.pid)[-1]
        for name in names:
            os.kill(target, getattr(signal, f"SIG{name}"))
            time.sleep(0.02)

    return act


def _signal(names: tuple[str, ...], ranks: int, to: str, code: int, words: str, at: str = "epoch 2/") -> None:
    case = f"{'-'.join(names)}{ranks}{to}{at[:5].strip()}".lower()

    def body() -> None:
        more = ("-num_gpus", str(ranks)) if ranks > 1 else ()
        spawned: list[int] = []

        def act(process: subprocess.Popen) -> None:
            spawned.extend(children(process.pid))
            send(*names, to=to)(process)

        expect(program(case, *more, at=at, act=act), code, words)
        end = time.monotonic() + 60
        while any(_alive(pid) for pid in spawned):
            if time.monotonic() > end:
                raise Failed("hung", f"processes are left: {spawned}")
            time.sleep(0.2)
        continues(case, ranks)

    LAB.faults.append(Fault(f"{' '.join(names)} to the {to} process of {ranks}, at '{at.strip()}'", body))


def _alive(pid: int) -> bool:
    with contextlib.suppress(OSError, IndexError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


SAVED = "Stopped by SIG{}.*continue with --c"
_signal(("KILL",), 1, "main", -9, "")
_signal(("TERM",), 1, "main", 143, SAVED.format("TERM"))
_signal(("TERM", "TERM"), 1, "main", 143, SAVED.format("TERM"))
_signal(("INT",), 1, "main", 130, SAVED.format("INT"))
_signal(("HUP",), 1, "main", 129, SAVED.format("HUP"))
_signal(("INT", "INT"), 1, "main", 130, "Stopped")
_signal(("KILL",), 1, "main", -9, "", at="Output:")
_signal(("TERM",), 1, "main", 143, "Stopped", at="Output:")
_signal(("TERM",), 2, "main", 143, SAVED.format("TERM"))
_signal(("INT",), 2, "main", 130, SAVED.format("INT"))
_signal(("HUP",), 2, "main", 129, SAVED.format("HUP"))
_signal(("KILL",), 2, "last", 137, r"was killed \(SIGKILL\).*--c")
_signal(("KILL",), 2, "main", -9, "")

SLOW = """
import os, time, traceback
from nnssl.pretrain.methods import register
from nnssl.pretrain.methods.mae.method import MAE, MAEConfig

@register("slowsave", config=MAEConfig)
class SlowSave(MAE):
    def state_dict(self, *args, **options):
        if "FAULTS_SLOW" in os.environ and any(f.name == "training_state" for f in traceback.extract_stack()):
            print("saving", flush=True)
            time.sleep(20)
        return super().state_dict(*args, **options)
"""
"""An objective like mae whose checkpoints take 20 seconds where told, so that a signal can meet them."""


def _in_a_save(names: tuple[str, ...], ranks: int, code: int, words: str) -> None:
    case = f"save{'-'.join(names)}{ranks}".lower()

    def body() -> None:
        file = Path(os.environ["nnUNet_results"]) / "slowsave.py"
        file.write_text(SLOW)
        more = ["-m", str(file), *(("-num_gpus", str(ranks)) if ranks > 1 else ())]
        spawned: list[int] = []

        def act(process: subprocess.Popen) -> None:
            spawned.extend(children(process.pid))
            for name in names:
                os.killpg(process.pid, getattr(signal, f"SIG{name}"))  # as a terminal does
                time.sleep(1)

        told = program(case, *more, at="saving", act=act, before=["env", "FAULTS_SLOW=1"])
        expect(told, code, words)
        if words == "Stopped" and "after step" in told.text:
            raise Failed("misadvised", "the save was waited for")
        end = time.monotonic() + 60
        while any(_alive(pid) for pid in spawned):
            if time.monotonic() > end:
                raise Failed("hung", f"processes are left: {spawned}")
            time.sleep(0.2)
        expect(program(case, *more, "--c"), 0, "Continuing after step|starts from the beginning")
        found, wanted = weights(case, "Slowsave"), straight(ranks)
        if any(not torch.equal(found[k], wanted[k]) for k in wanted):
            raise Failed("lost", "the weights are others")

    LAB.faults.append(Fault(f"{' '.join(names)} of {ranks}, while a checkpoint is written", body))


_in_a_save(("INT", "INT"), 1, 130, "Stopped")
_in_a_save(("INT", "INT"), 2, 130, "Stopped")
_in_a_save(("HUP", "TERM", "TERM"), 2, 129, SAVED.format("HUP"))


@LAB.add("HUP to the main process of 2, under nohup")
def _nohup() -> None:
    told = program("nohup", "-num_gpus", "2", at="epoch 2/", act=send("HUP"), before=["nohup"])
    expect(told, 0, "Weights:")
    same("nohup", 2)


@LAB.add("two are started at once for one folder")
def _twice() -> None:
    told: list[Told] = []
    threads = [threading.Thread(target=lambda: told.append(program("twice"))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    first, second = sorted(told, key=lambda t: t.code or 0)
    expect(first, 0, "Weights:")
    expect(second, 1, "is in use by another process.*--name|holds this very run, finished")
    same("twice")


for ranks in (1, 2):

    def frozen(ranks: int = ranks) -> None:
        def act(process: subprocess.Popen) -> None:
            target = process.pid if ranks == 1 else children(process.pid)[-1]
            os.kill(target, signal.SIGSTOP)
            time.sleep(20)
            os.kill(target, signal.SIGCONT)

        name = f"frozen{ranks}"
        more = ("-num_gpus", "2") if ranks == 2 else ()
        expect(program(name, *more, act=act), 0, "Weights:")
        same(name, ranks)

    LAB.add(f"STOP to one process of {ranks}, and CONT after 20 seconds")(frozen)

TERMINALS = {
    "whose output nobody reads": ["bash", "-c", 'set -o pipefail; "$@" | head -1', "bash"],
    "without stdin, stdout and stderr": ["bash", "-c", 'exec "$@" <&- >&- 2>&-', "bash"],
    "whose output goes to a full disk": ["bash", "-c", 'exec "$@" > /dev/full', "bash"],
    "in a terminal without letters but ASCII, without a home": [
        "env",
        "-u",
        "HOME",
        "LC_ALL=C",
        "PYTHONIOENCODING=ascii",
    ],
    "in a locale that does not exist": ["env", "LC_ALL=xx_YY.none", "LANG=nonsense"],
    "whose temporary folder does not exist": ["env", "TMPDIR=/nonexistent"],
}
for number, (what, before) in enumerate(TERMINALS.items()):

    def terminal(number: int = number, before: list[str] = before) -> None:
        expect(program(f"terminal{number}", before=before), 0, "")
        same(f"terminal{number}")

    LAB.add(f"a run {what}")(terminal)

for variable, words in {
    "OMP_NUM_THREADS=4,2": "OMP_NUM_THREADS is '4,2'; it must be a whole number",
    "nnUNet_n_proc_DA=many": "nnUNet_n_proc_DA is 'many'; it must be a whole number",
    "WORLD_SIZE=2": "WORLD_SIZE=2 says that this is one of several.*unset WORLD_SIZE",
}.items():

    def environment(variable: str = variable, words: str = words) -> None:
        expect(program("environment", before=["env", variable]), 1, f"Error: .*{words}")

    LAB.add(f"{variable} in the environment")(environment)
