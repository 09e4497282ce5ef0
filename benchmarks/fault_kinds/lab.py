"""A fault, what it is tried on, and how its end is judged."""

# ruff: noqa: D101, D102, D103
from __future__ import annotations

import contextlib
import io
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch  # isort: skip

LIMIT = 600.0
"""Seconds after which a program counts as hung."""

RUN = ["-d", "901", "-m", "mae", "-device", "cpu", "--robustness-every", "0", "--epochs", "3", "--iterations", "6"]
OPTIONS = ["-o", "workers=0", "picture_every=0", "held_out_batches=1"]
COMMAND = [sys.executable, "-m", "nnssl.pretrain.cli"]


@dataclass
class Told:
    """How a program ended."""

    code: int | None
    text: str

    @property
    def hung(self) -> bool:
        return self.code is None


@dataclass
class Fault:
    """One of them: ``body`` raises :class:`Failed` where it is not survived."""

    name: str
    body: Callable[[], None]
    verdict: str = ""
    detail: str = ""
    seconds: float = 0.0


class Failed(Exception):
    """``kind`` is one of the columns."""

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(detail)
        self.kind = kind


@dataclass
class Lab:
    faults: list[Fault] = field(default_factory=list)
    straight: dict[int, dict[str, torch.Tensor]] = field(default_factory=dict)

    def add(self, name: str) -> Callable[[Callable[[], None]], Callable[[], None]]:
        def keep(body: Callable[[], None]) -> Callable[[], None]:
            self.faults.append(Fault(name, body))
            return body

        return keep


LAB = Lab()


DAMAGES: dict[str, Callable[[Path], object]] = {
    "cut": lambda f: f.write_bytes(f.read_bytes()[:-1000]),
    "empty": lambda f: f.write_bytes(b""),
    "garbage": lambda f: f.write_bytes(b"garbage" * 999),
}


def program(name: str, *more: str, at: str = "epoch 2/", act: Callable[[subprocess.Popen], None] | None = None,
            before: list[str] | None = None, options: list[str] | None = None) -> Told:  # fmt: skip
    """Run the command; once a line begins with ``at``, do something to it."""
    command = [*(before or []), *COMMAND, *RUN, "--name", name, *more, *(options or OPTIONS)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    clock = threading.Timer(LIMIT, lambda: os.killpg(process.pid, signal.SIGKILL))
    clock.start()
    lines = []
    for line in process.stdout or ():
        lines.append(line)
        if act is not None and line.startswith(at):
            act(process)
            act = None
    code = process.wait()
    hung = not clock.is_alive()
    clock.cancel()
    return Told(None if hung else code, "".join(lines))


def here(*arguments: str, command: str = "pretrain") -> Told:
    """Run a command in this process; an exception that it lets through counts as a traceback."""
    import logging
    import traceback

    from nnssl.experiments.cli import main as experiment
    from nnssl.pretrain.cli import main as pretrain

    out, main = io.StringIO(), {"pretrain": pretrain, "experiment": experiment}[command]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            code = main(list(arguments))
        except SystemExit as error:
            code = int(error.code or 0)
        except Exception:  # noqa: BLE001  to be counted
            out.write(traceback.format_exc())
            code = 1
    logging.getLogger("nnssl").setLevel(logging.INFO)
    return Told(code, out.getvalue())


def go(name: str, *more: str) -> Told:
    return here(*RUN, "--name", name, *more, *OPTIONS)


def expect(told: Told, code: int, words: str) -> None:
    """The program ended like this and said this, in one message."""
    if told.hung:
        raise Failed("hung", told.text[-300:])
    if "Traceback (most recent call last)" in told.text:
        raise Failed("traceback", told.text[-600:])
    if told.code != code or re.search(words, told.text, re.DOTALL) is None:
        raise Failed("misadvised", f"status {told.code}, wanted {code} and '{words}': {told.text[-300:]}")


def folder(name: str, method: str = "Mae") -> Path:
    return Path(os.environ["nnUNet_results"]) / "Dataset901_Phantom" / f"nnssl{method}_{name}__nnUNetPlans__3d_fullres"


def weights(name: str, method: str = "Mae") -> dict[str, torch.Tensor]:
    from nnssl import checkpoint

    return checkpoint.load(folder(name, method) / "checkpoint_final.pth").weights


def straight(ranks: int) -> dict[str, torch.Tensor]:
    """What an undisturbed run gives."""
    if ranks not in LAB.straight:
        told = go("straight1") if ranks == 1 else program(f"straight{ranks}", "-num_gpus", str(ranks))
        expect(told, 0, "Weights:")
        LAB.straight[ranks] = weights(f"straight{ranks}")
    return LAB.straight[ranks]


def same(name: str, ranks: int = 1) -> None:
    found, wanted = weights(name), straight(ranks)
    if any(not torch.equal(found[k], wanted[k]) for k in wanted):
        raise Failed("lost", "the weights are others")
    left = [p.name for p in folder(name).iterdir() if p.name.endswith(".tmp")]
    if left:
        raise Failed("lost", f"left over: {left}")


def continues(name: str, ranks: int = 1, words: str = "Continuing after step|starts from the beginning") -> None:
    """``--c`` goes on and gives what an undisturbed run gives."""
    told = go(name, "--c") if ranks == 1 else program(name, "-num_gpus", str(ranks), "--c")
    expect(told, 0, words)
    same(name, ranks)


def children(pid: int) -> list[int]:
    """Of a process, from Linux' own files."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with contextlib.suppress(OSError):
                state = (entry / "stat").read_text().rpartition(")")[2].split()
                if state[1] == str(pid) and state[0] != "Z":
                    found.append(int(entry.name))
    return [*found, *(g for c in found for g in children(c))]
