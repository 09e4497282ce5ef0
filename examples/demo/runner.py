"""Runs commands one after another as a user would type them: shows them, keeps a log of each, and times them."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

TAIL = 25


@dataclass(frozen=True)
class Step:
    """One command: what it does, how it is typed, and variables that are exported before it, for it and what follows."""

    name: str
    title: str
    command: list[str]
    exports: dict[str, str] = field(default_factory=dict)
    result: str = ""


class StepFailed(RuntimeError):
    """A command ended with an error; the message holds the end of its log and where the log lies."""


class Runner:
    """Runs steps in ``folder``; logs go to ``<logs>/<number>_<name>.log``.

    Args:
        folder: working directory of the commands; paths are shown relative to it.
        logs: folder of the logs.
        env: the environment of all commands.
        total: number of steps, for the display.
    """

    def __init__(self, folder: Path, logs: Path, env: dict[str, str], total: int) -> None:
        self.folder, self.logs, self.env, self.total = folder, logs, env, total
        self.seconds: dict[str, float] = {}
        logs.mkdir(parents=True, exist_ok=True)

    def run(self, step: Step) -> float:
        """Run one step and return its seconds.

        Raises:
            StepFailed: where the command does not exist or does not end with status 0.
        """
        number = len(self.seconds) + 1
        log = self.logs / f"{number:02d}_{step.name}.log"
        exports = "".join(f"\n$ export {k}={v}" for k, v in step.exports.items())
        self.env.update(step.exports)
        print(f"\n[{number}/{self.total}] {step.title}{exports}\n$ {shlex.join(step.command)}", flush=True)
        start = time.monotonic()
        with log.open("wb") as out:
            try:
                process = subprocess.Popen(
                    step.command, cwd=self.folder, env=self.env, stdin=subprocess.DEVNULL, stdout=out, stderr=out
                )
            except OSError as error:
                raise StepFailed(f"{step.command[0]} cannot be started: {error}") from error
            self._wait(process, log, start)
        seconds = time.monotonic() - start
        if process.returncode != 0:
            raise StepFailed(
                f"'{shlex.join(step.command)}' ended with status {process.returncode}. The end of its log:\n\n"
                + "\n".join(last_lines(log, TAIL))
                + f"\n\nThe whole log: {log}"
            )
        self.seconds[step.name] = seconds
        print(f"  {clock(seconds)}, log: {self.relative(log)}", flush=True)
        return seconds

    def _wait(self, process: subprocess.Popen, log: Path, start: float) -> None:
        live = sys.stdout.isatty()
        while True:
            try:
                process.wait(timeout=0.5)
                break
            except subprocess.TimeoutExpired:
                if live:
                    line = (last_lines(log, 1) or [""])[0]
                    width = os.get_terminal_size().columns - 1
                    text = f"  {clock(time.monotonic() - start)}  {line}"[:width]
                    print("\r" + text.ljust(width), end="", flush=True)
            except KeyboardInterrupt:
                process.wait()
                raise
        if live:
            print("\r" + " " * (os.get_terminal_size().columns - 1) + "\r", end="", flush=True)

    def relative(self, path: Path) -> str:
        """The path as seen from the working directory where it is below it."""
        return str(path.relative_to(self.folder)) if path.is_relative_to(self.folder) else str(path)


def last_lines(log: Path, count: int) -> list[str]:
    """The last non-empty lines of a log; of a progress bar its last state."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 20_000))
        text = file.read().decode(errors="replace")
    lines = [re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", part.rsplit("\r", 1)[-1]).rstrip() for part in text.split("\n")]
    return [line for line in lines if line][-count:]


def clock(seconds: float) -> str:
    """``75.3`` -> ``"1:15"`` (minutes:seconds)."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
