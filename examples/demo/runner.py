"""Runs commands as a user would type them, some side by side: shows them, keeps a log of each, and times them."""

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
    """One command: what it does, how it is typed, and variables that are exported before it, for it and what follows.

    ``beside`` says that it runs side by side with the step before.
    """

    name: str
    title: str
    command: list[str]
    exports: dict[str, str] = field(default_factory=dict)
    result: str = ""
    beside: bool = False


class StepFailed(RuntimeError):
    """A command ended with an error; the message holds the end of its log and where the log lies."""


@dataclass
class _Running:
    """A command that was started."""

    step: Step
    process: subprocess.Popen
    log: Path
    start: float = field(default_factory=time.monotonic)
    seconds: float = 0.0

    def ended(self) -> bool:
        """Whether the command has ended, and well.

        Raises:
            StepFailed: it ended with another status than 0.
        """
        if self.seconds:
            return True
        code = self.process.poll()
        if code is None:
            return False
        self.seconds = time.monotonic() - self.start
        if code:
            raise StepFailed(
                f"'{shlex.join(self.step.command)}' ended with status {code}. The end of its log:\n\n"
                + "\n".join(last_lines(self.log, TAIL))
                + f"\n\nThe whole log: {self.log}"
            )
        return True

    def stop(self) -> None:
        """End a command whose neighbour failed."""
        if self.process.poll() is None:
            self.process.terminate()
            self.process.wait()


def groups(steps: list[Step]) -> list[list[Step]]:
    """The steps in order, those together that run side by side."""
    out: list[list[Step]] = []
    for step in steps:
        out[-1].append(step) if step.beside else out.append([step])
    return out


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

    def run(self, *steps: Step) -> None:
        """Run one step, or several side by side, and note the seconds of each.

        Raises:
            StepFailed: where a command does not exist or does not end with status 0; what runs beside it is stopped.
        """
        together = len(steps) > 1
        for number, step in enumerate(steps, len(self.seconds) + 1):
            self.env.update(step.exports)
            exports = "".join(f"\n$ export {k}={v}" for k, v in step.exports.items())
            line = f"{exports}\n$ {shlex.join(step.command)}{' &' if together else ''}"
            print(f"\n[{number}/{self.total}] {step.title}{line}", flush=True)
        if together:
            print("\n$ wait", flush=True)
        running: list[_Running] = []
        try:
            for step in steps:
                running.append(self._start(step, len(self.seconds) + 1 + len(running)))
            self._wait(running)
        except KeyboardInterrupt:  # which the commands were sent as well
            for one in running:
                one.process.wait()
            raise
        finally:
            for one in running:
                one.stop()
        for one in running:
            self.seconds[one.step.name] = one.seconds
            name = f"{one.step.name}: " if together else ""
            print(f"  {name}{clock(one.seconds)}, log: {self.relative(one.log)}", flush=True)

    def _start(self, step: Step, number: int) -> _Running:
        log = self.logs / f"{number:02d}_{step.name}.log"
        with log.open("wb") as out:
            try:
                process = subprocess.Popen(
                    step.command, cwd=self.folder, env=self.env, stdin=subprocess.DEVNULL, stdout=out, stderr=out
                )
            except OSError as error:
                raise StepFailed(f"{step.command[0]} cannot be started: {error}") from error
        return _Running(step, process, log)

    def _wait(self, running: list[_Running]) -> None:
        live, start, left = sys.stdout.isatty(), time.monotonic(), running
        while left := [one for one in left if not one.ended()]:
            time.sleep(0.2)
            if live:
                width = os.get_terminal_size().columns - 1
                lines = [(last_lines(one.log, 1) or [""])[0] for one in left]
                room = max(1, width // len(lines) - 8)
                text = f"  {clock(time.monotonic() - start)}  " + " | ".join(line[:room].ljust(room) for line in lines)
                print("\r" + text[:width].ljust(width), end="", flush=True)
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
