"""A side of a comparison in a process of its own."""

from __future__ import annotations

import json
import os
import resource
import subprocess
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parents[1]
"""The folder of the benchmarks."""


class Failed(Exception):
    """A side has no answer to a request."""


class Process:
    """A side's process; see sides/serve.py."""

    def __init__(self, side: str, python: str, path: list[Path], settings: Path) -> None:
        self.side, self.settings = side, settings
        inherited = os.environ.get("PYTHONPATH", "")
        self.environment = os.environ | {"PYTHONPATH": os.pathsep.join([*map(str, path), str(HERE), inherited])}
        self.command = [python, "-W", "ignore", str(HERE / "sides" / "serve.py"), side, str(settings)]
        self._process: subprocess.Popen[str] | None = None

    def ask(self, name: str, *arguments: Any) -> Any:
        """The answer to a request.

        Raises:
            Failed: with the side's error.
        """
        if self._process is None:
            pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
            self._process = subprocess.Popen(self.command, text=True, env=self.environment, **pipes)
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps([name, *arguments]) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise Failed(f"{self.side}: its process ended (run {' '.join(self.command)} to see why)")
        answer = json.loads(line)
        if "error" in answer:
            raise Failed(f"{self.side}: {answer['error']}")
        return answer["value"]

    def first_step(self) -> float:
        """CPU seconds of its training command up to the end of the first step."""
        done = subprocess.run([*self.command, "first-step"], env=self.environment, capture_output=True, text=True)
        if done.returncode or not done.stdout:
            raise Failed(f"{self.side}: {done.stderr[-500:]}")
        return float(json.loads(done.stdout)["value"])

    def cpu(self, code: str, *arguments: str) -> float:
        """CPU seconds of ``code`` in its Python, as a console command with arguments."""
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        command = [self.command[0], "-W", "ignore", "-c", code, *arguments]
        apart = self.settings.parent  # "-c" would look for packages where we are
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, cwd=apart)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        if done.returncode:
            raise Failed(f"{self.side}: {done.stderr[-500:]}")
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    def close(self) -> None:
        """End it."""
        if self._process is not None:
            self._process.communicate()
            self._process = None
