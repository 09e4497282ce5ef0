"""Tries what machines, users and files do to a run, and counts: tried, survived, lost, hung, misadvised, tracebacks shown.

A fault is survived where the program ends as it should in time, says in one message what to do, and where doing it gives what
an undisturbed run gives, bit for bit. Lost: the result is another. Misadvised: the message is not the right one, or what it says
does not help. Runs on a CPU; two processes stand for two GPUs. ``--only PATTERN`` tries those whose name matches.
"""

# ruff: noqa: D101, D102, D103
from __future__ import annotations

import contextlib
import copy
import errno
import io
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common import arguments, make_dataset, report, workspace

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


# ---- programs --------------------------------------------------------------------------------------------------------------


def program(name: str, *more: str, at: str = "epoch 2/", act: Callable[[subprocess.Popen], None] | None = None,
            before: list[str] | None = None, options: list[str] | None = None) -> Told:  # fmt: skip
    """Run the command; once a line begins with ``at``, do something to it."""
    command = [*(before or []), *COMMAND, *RUN, "--name", name, *more, *(options or OPTIONS)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    clock = threading.Timer(LIMIT, lambda: os.killpg(process.pid, signal.SIGKILL))
    clock.start()
    lines, done = [], act is None
    for line in process.stdout or ():
        lines.append(line)
        if not done and line.startswith(at):
            done = True
            act(process)  # type: ignore[misc]
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


# ---- signals ---------------------------------------------------------------------------------------------------------------


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


# ---- two at a time, stopped clocks, terminals ---------------------------------------------------------------------------------


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


# ---- what a run has saved --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def stopped(name: str) -> Iterator[Path]:
    """The folder of a run with two checkpoints, ended by itself after the second epoch."""
    from nnssl.pretrain.engine.loop import Engine

    save = Engine.save

    def end(self: Engine, **options: Any) -> None:
        save(self, **options)
        if self.step == 12:
            raise KeyboardInterrupt

    Engine.save = end  # type: ignore[method-assign]
    try:
        expect(go(name), 130, "Stopped")
    finally:
        Engine.save = save  # type: ignore[method-assign]
    yield folder(name)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "cut": lambda f: f.write_bytes(f.read_bytes()[:-1000]),
    "empty": lambda f: f.write_bytes(b""),
    "garbage": lambda f: f.write_bytes(b"garbage" * 999),
}
for kind, damage in DAMAGES.items():

    def latest(kind: str = kind, damage: Callable[[Path], object] = damage) -> None:
        with stopped(f"latest-{kind}") as where:
            damage(where / "checkpoint_latest.pth")
            continues(f"latest-{kind}", words="Going on from the checkpoint before it.*Continuing after step")

    LAB.add(f"checkpoint_latest.pth: {kind}")(latest)


@LAB.add("checkpoint_latest.pth and the one before it damaged")
def _both() -> None:
    with stopped("both") as where:
        for file in ("latest", "previous"):
            DAMAGES["garbage"](where / f"checkpoint_{file}.pth")
        expect(go("both", "--c"), 1, "Error: .*checkpoint_latest.pth.*No other checkpoint of this run is left")


@LAB.add("the checkpoint of a run with another seed")
def _other_seed() -> None:
    expect(go("seed5", "--seed", "5"), 0, "Weights:")
    with stopped("seed0") as where:
        shutil.copyfile(folder("seed5") / "checkpoint_latest.pth", where / "checkpoint_latest.pth")
        expect(go("seed0", "--c"), 1, "belongs to a run with another configuration.*seed: 5 in the checkpoint, 0 now")


for part in ("nnssl_training", "stepper", "rng", "history", "shapes", "step"):

    def without(part: str = part) -> None:
        with stopped(f"part-{part}") as where:
            file = where / "checkpoint_latest.pth"
            content = torch.load(file, weights_only=True)
            if part == "nnssl_training":
                del content[part]
            elif part == "shapes":
                content["network_weights"] = {k: v[:1] for k, v in content["network_weights"].items()}
            elif part == "step":
                content["nnssl_training"]["step"] = "many"
            else:
                del content["nnssl_training"][part]
            torch.save(content, file)
            words = {"shapes": "network_weights", "step": "step"}.get(part, part)
            expect(go(f"part-{part}", "--c"), 1, f"Error: .*checkpoint_latest.pth.*{words}")

    LAB.add(f"a checkpoint with another or no part: {part}")(without)

for place, value in {
    ("identity", "epochs"): "many",
    ("identity", "options"): 3,
    ("identity", "crop"): {"size": "big"},
    ("identity", "seed"): -1.5,
    ("identity",): [],
    ("identity", "weights"): 7,
}.items():

    def record(place: tuple[str, ...] = place, value: Any = value) -> None:
        name = "record-" + "-".join(place)
        with stopped(name) as where:
            file = where / "config.json"
            content = json.loads(file.read_text())
            at = content
            for k in place[:-1]:
                at = at[k]
            at[place[-1]] = value
            file.write_text(json.dumps(content))
            expect(go(name, "--c"), 1, rf"Error: .*config.json.*'{'.'.join(place)}[^']*' must be")

    LAB.add(f"config.json with {'.'.join(place)} = {value!r}")(record)


@LAB.add("config.json that is no JSON")
def _no_json() -> None:
    with stopped("nojson") as where:
        (where / "config.json").write_text('{"schema": 1,')
        expect(go("nojson", "--c"), 1, "Error: .*config.json cannot be read")


def _directory(file: Path) -> None:
    file.unlink(missing_ok=True)
    file.mkdir()


IMAGES = "images.json cannot be read.*Remove it, and the images are not compared|Is a directory: .*images.json"
for name, told in {
    "images.json": IMAGES,
    "config.json": "config.json.*--name",
    "metrics.jsonl": "Is a directory",
}.items():
    for kind, damage in {**DAMAGES, "a folder": _directory}.items():
        if name == "metrics.jsonl" and kind != "a folder":
            continue  # is only ever appended to

        def beside(name: str = name, told: str = told, damage: Callable[[Path], object] = damage) -> None:
            run = f"beside{len(list(folder('x').parent.glob('*')))}"
            with stopped(run) as where:
                content = (where / name).read_bytes()
                if damage is DAMAGES["cut"]:
                    (where / name).write_bytes(content[:-20])
                else:
                    damage(where / name)
                expect(go(run, "--c"), 1, f"Error: .*({told})")
                if (where / name).is_dir():
                    (where / name).rmdir()
                if name != "images.json":
                    (where / name).write_bytes(content)
                else:
                    (where / name).unlink(missing_ok=True)
                continues(run)

        LAB.add(f"{name} of a run: {kind}")(beside)


@LAB.add("checkpoint_latest.pth that is a folder")
def _latest_folder() -> None:
    with stopped("latestfolder") as where:
        _directory(where / "checkpoint_latest.pth")
        continues("latestfolder", words="Going on from the checkpoint before it.*Continuing after step")


@LAB.add("plans whose network has changed since the start")
def _changed_plans() -> None:
    file = Path(os.environ["nnUNet_preprocessed"]) / "Dataset901_Phantom" / "nnUNetPlans.json"
    text = file.read_text()
    with stopped("changedplans"):
        try:
            content = json.loads(text)
            content["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]["features_per_stage"][0] += 2
            file.write_text(json.dumps(content))
            expect(go("changedplans", "--c"), 1, "Error: .*another configuration.*architecture_hash")
        finally:
            file.write_text(text)
        continues("changedplans")


# ---- disks and memory ------------------------------------------------------------------------------------------------------


@LAB.add("the disk is full at the second checkpoint")
def _full() -> None:
    from nnssl import checkpoint

    save, calls = checkpoint.save, []

    def fail(path: Path, payload: Any) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(path, payload)

    checkpoint.save = fail
    try:
        expect(go("full"), 1, "cannot save.*checkpoint saved before is whole. Free space, then continue with --c")
    finally:
        checkpoint.save = save
    continues("full")


@LAB.add("the disk is full at the first checkpoint")
def _full_first() -> None:
    from nnssl import checkpoint

    def fail(path: Path, payload: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    save, checkpoint.save = checkpoint.save, fail
    try:
        told = go("full1")
    finally:
        checkpoint.save = save
    expect(told, 1, "cannot save.*Free space, then continue with --c")
    if "is whole" in told.text:
        raise Failed("misadvised", told.text)
    continues("full1", words="Weights:")


@LAB.add("a limit on the size of files that the checkpoint exceeds")
def _file_size() -> None:
    told = program("filesize", before=["bash", "-c", 'ulimit -f 100; exec "$@"', "bash"])
    expect(told, 1, "Error: cannot save.*File too large. Lift the limit on the size of files .*continue with --c")
    continues("filesize", words="Weights:")


if shutil.which("unshare") and hasattr(os, "geteuid") and os.geteuid() == 0:

    @LAB.add("a results folder on a disk that is really full")
    def _really_full() -> None:
        place = Path(os.environ["nnUNet_results"]) / "small"
        place.mkdir()
        script = f'mount -t tmpfs -o size=400k tmpfs {place} && nnUNet_results={place} exec "$@"'
        told = program("small", before=["unshare", "-m", "sh", "-c", script, "sh"])
        expect(told, 1, "Error: (cannot save|No space left).*Free space, then continue with --c")

    @LAB.add("a results folder that is mounted read-only")
    def _read_only() -> None:
        place = Path(os.environ["nnUNet_results"]) / "mounted"
        place.mkdir()
        script = f"mount --bind {place} {place} && mount -o remount,bind,ro {place} && nnUNet_results={place} "
        told = program("mounted", before=["unshare", "-m", "sh", "-c", script + 'exec "$@"', "sh"])
        expect(told, 1, "Error: cannot write into .*Read-only file system. nnUNet_results must be writable")


@LAB.add("images of nnU-Net's folder that hold NaN, or nothing")
def _spoilt() -> None:
    import blosc2

    cases = Path(os.environ["nnUNet_preprocessed"]) / "Dataset901_Phantom" / "nnUNetPlans_3d_fullres"
    file = sorted(f for f in cases.glob("*.b2nd") if "_seg" not in f.name)[1]
    content, voxels = file.read_bytes(), blosc2.open(str(file))[:]
    voxels[:] = float("nan")
    try:
        file.unlink()
        blosc2.asarray(voxels, urlpath=str(file))
        expect(go("spoilt"), 1, f"Error: Case {file.stem} .*NaN or infinite voxels.*--exclude")
        for spoilt in (b"", content[: len(content) // 2]):
            file.write_bytes(spoilt)
            expect(go("spoilt"), 1, f"Error: Case .*{file.name} is damaged.*nnUNetv2_preprocess.*--exclude")
    finally:
        file.unlink()
        file.write_bytes(content)
    expect(go("spoilt"), 0, "Weights:")  # nothing was saved, so the same command starts
    same("spoilt")


@LAB.add("pictures cannot be written")
def _pictures() -> None:
    from nnssl.pretrain.engine import drawing, logs

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(errno.EACCES, os.strerror(errno.EACCES))

    before = drawing.save_picture, logs.plot_progress
    drawing.save_picture, logs.plot_progress = fail, fail
    try:
        told = here(*RUN, "--name", "pictures", "-o", "workers=0", "picture_every=1", "held_out_batches=1")
    finally:
        drawing.save_picture, logs.plot_progress = before
    expect(told, 0, "progress.png could not be written.*Weights:")
    same("pictures")


@LAB.add("weights that are not finite after the last step")
def _nan() -> None:
    from nnssl.pretrain.engine.stepping import Stepper

    step = Stepper.step

    def spoil(self: Stepper, batch: Any, number: int, *more: Any, **options: Any) -> Any:
        out = step(self, batch, number, *more, **options)
        if number == 17:
            with torch.no_grad():
                next(iter(self.method.network.parameters())).fill_(float("nan"))
        return out

    Stepper.step = spoil  # type: ignore[method-assign]
    try:
        expect(go("nan"), 1, "Error: step 17: a weight after it is not finite. Cases of the batch:")
    finally:
        Stepper.step = step  # type: ignore[method-assign]
    continues("nan")


for size in ("64k", "8k"):

    def shared(size: str = size) -> None:
        script = f'mount -t tmpfs -o size={size} tmpfs /dev/shm && exec "$@"'
        before = ["unshare", "-m", "sh", "-c", script, "sh"]
        told = program(f"shm{size}", before=before, options=["-o", "workers=2", "picture_every=0"])
        expect(told, 1, "Error: Shared memory ran out.*--shm-size.*workers=0")

    if shutil.which("unshare") and hasattr(os, "geteuid") and os.geteuid() == 0:
        LAB.add(f"/dev/shm of {size}")(shared)


# ---- preprocessing ---------------------------------------------------------------------------------------------------------

PREPARE = ["-d", "902", "-t", "901", "--preprocess-only", "-np", "1"]


def prepared() -> Path:
    expect(here(*PREPARE), 0, "cases are preprocessed")
    (made,) = [
        p for p in (Path(os.environ["nnUNet_preprocessed"]) / "Dataset902_Phantom").glob("nnssl_*") if p.is_dir()
    ]
    return made


for ending in (".pkl", ".b2nd", "_seg.b2nd"):
    for kind, damage in {**DAMAGES, "gone": os.unlink}.items():

        def case(ending: str = ending, damage: Callable[[Path], object] = damage) -> None:
            from nnssl.properties import read_properties

            made = prepared()
            file = made / f"case_000001{ending}"
            before = read_properties(made / "case_000001.pkl"), (made / "case_000001.b2nd").stat().st_size
            if ending == "_seg.b2nd" and damage is DAMAGES["cut"]:
                file.write_bytes(file.read_bytes()[:-10])
            elif damage is DAMAGES["cut"]:
                file.write_bytes(file.read_bytes()[:-20])
            else:
                damage(file)
            after = prepared()
            found = read_properties(after / "case_000001.pkl"), (after / "case_000001.b2nd").stat().st_size
            if found != before:
                raise Failed("lost", f"{file} is another")

        LAB.add(f"a preprocessed case whose {ending} is {kind}")(case)


class _Bomb:
    def __reduce__(self) -> Any:
        return os.mkdir, (str(Path(tempfile.gettempdir()) / "nnssl_bomb"),)


@LAB.add("a .pkl that wants to run something")
def _bomb() -> None:
    (prepared() / "case_000001.pkl").write_bytes(pickle.dumps(_Bomb()))
    prepared()
    if (Path(tempfile.gettempdir()) / "nnssl_bomb").exists():
        raise Failed("lost", "it has run")


@LAB.add("memory runs out for one image")
def _memory() -> None:
    from nnssl.pretrain.prepare.worker import CaseWorker

    made, run = prepared(), CaseWorker._run
    (made / "case_000001.pkl").unlink()

    def fail(self: CaseWorker, case: Any, state: Any) -> None:
        raise MemoryError

    CaseWorker._run = fail  # type: ignore[method-assign]
    try:
        expect(here(*PREPARE), 1, "case_000001.*does not fit into this machine's memory.*--skip-bad")
        expect(here(*PREPARE, "--skip-bad"), 0, "5 cases are preprocessed")
    finally:
        CaseWorker._run = run  # type: ignore[method-assign]
    prepared()


# ---- plans and experiments -------------------------------------------------------------------------------------------------

HOME = ("configurations", "3d_fullres")
for place, value in {
    (*HOME, "patch_size"): "big",
    (*HOME, "spacing"): [1, "a", 1],
    (*HOME, "batch_size"): None,
    (*HOME, "data_identifier"): "../../../evil",
    (*HOME, "normalization_schemes"): "ZScoreNormalization",
    (*HOME, "use_mask_for_norm"): [1],
    (*HOME, "architecture"): [],
    (*HOME, "architecture", "arch_kwargs", "n_stages"): "three",
    (*HOME, "architecture", "arch_kwargs", "strides"): [[1, 1], [2, 2, 2], [2, 2, 2]],
    (*HOME, "architecture", "arch_kwargs", "norm_op"): 5,
    (*HOME, "median_image_size_in_voxels"): {},
    (*HOME, "inherits_from"): 9,
    ("transpose_forward",): [0, 0, 1],
    ("plans_name",): "../evil",
    ("dataset_name",): 4,
    ("configurations",): [],
}.items():

    def plan(place: tuple[str, ...] = place, value: Any = value) -> None:
        file = Path(os.environ["nnUNet_preprocessed"]) / "Dataset901_Phantom" / "nnUNetPlans.json"
        text = file.read_text()
        try:
            content = copy.deepcopy(json.loads(text))
            at = content
            for k in place[:-1]:
                at = at[k]
            at[place[-1]] = value
            file.write_text(json.dumps(content))
            told = here(*RUN, "--dry-run", *OPTIONS)
        finally:
            file.write_text(text)
        words = "architecture" if place[-1] == "norm_op" else place[-1]
        expect(told, 1, f"^Error: [^\n]*{words}[^\n]*\n$|Error: [^\n]*{words}")

    LAB.add(f"plans with {place[-1]} = {value!r}")(plan)

for option, value in (("-p", "../../../evil"), ("--name", "../evil"), ("--name", "a/b")):

    def outside(option: str = option, value: str = value) -> None:
        expect(here(*RUN, option, value, "--dry-run", *OPTIONS), 1, f"Error: .*{option}.*cannot be used")

    LAB.add(f"{option} {value}")(outside)

HEAD = "dataset: 901\nmethods: [scratch, mae]\nlabels: [2]\n"
for name, text in {
    "a key that is a list": "? [a, b]\n: 1\n",
    "infinite seeds": "seeds: .inf\n",
    "5000 digits": f"training: {{epochs: {'9' * 5000}}}\n",
    "a day that does not exist": "name: 2024-02-31\n",
    "3000 brackets": "a: " + "[" * 3000 + "]" * 3000 + "\n",
    "a reference to itself": "training: &a {figures: *a}\n",
    "a Python object": "methods: !!python/object/apply:os.system [true]\n",
    "a key given twice": "dataset: 5\n",
    "dates for seeds": "seeds: 2024-01-01\n",
}.items():

    def experiment(text: str = text) -> None:
        file = Path(os.environ["nnUNet_results"]) / "experiment.yaml"
        file.write_text(HEAD + text)
        expect(
            here(str(file), "--dry-run", "-device", "cpu", command="experiment"),
            1,
            "^Error: [^\n]*experiment.yaml[^\n]*\n$",
        )

    LAB.add(f"an experiment file with {name}")(experiment)


# ---- all of them -----------------------------------------------------------------------------------------------------------


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
